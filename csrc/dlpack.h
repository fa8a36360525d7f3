// The part of DLPack's C ABI that moekern reads: the unversioned exchange structure of DLPack 0.8 and later, and the
// table of functions that a type may have since 1.3 (DLPackExchangeAPI), which lends a tensor without a capsule.
// Layouts, names and values are those of the DLPack specification, https://github.com/dmlc/dlpack
// DLPack: Copyright (c) 2017 by Contributors, Apache License 2.0 (http://www.apache.org/licenses/LICENSE-2.0).
#pragma once

#include <cstdint>

extern "C" {

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2 };

enum DLDataTypeCode { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };

struct DLDevice {
  DLDeviceType device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means contiguous
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

struct DLPackExchangeAPI {
  uint32_t major, minor;  // version: the layout is that of the major one
  void* previous;
  void* owning[3];  // functions for tensors that are kept
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // or null; -1: a Python error is set
  void* current_work_stream;
};
}

"""llama.cpp's own quantiser, of the library that node-llama-cpp ships: `quantise_worker.py FOLDER IN OUT TYPE`, what
`llama-quantize IN OUT TYPE` does. FOLDER: where the shared libraries lie."""

import ctypes
import sys
from pathlib import Path

TYPES = {"Q8_0": 7, "Q4_K_M": 15}  # enum llama_ftype


class Parameters(ctypes.Structure):
    """struct llama_model_quantize_params: its first two fields, and room for the others."""

    _fields_ = (("threads", ctypes.c_int32), ("type", ctypes.c_int32), ("rest", ctypes.c_byte * 1024))


if __name__ == "__main__":
    folder, source, out, kind = sys.argv[1:]
    for name in ("libggml-base.so", "libggml.v*.so", "libllama.v*.so"):
        library = ctypes.CDLL(str(next(Path(folder).glob(name))), mode=ctypes.RTLD_GLOBAL)
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    library.llama_model_quantize.restype = ctypes.c_uint32
    parameters = library.llama_model_quantize_default_params()
    parameters.threads, parameters.type = 1, TYPES[kind]
    sys.exit(library.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)))

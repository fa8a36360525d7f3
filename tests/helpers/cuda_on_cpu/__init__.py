"""The CUDA kernels' logic without a GPU: csrc/cuda and csrc/bindings*.cpp, compiled by g++ against a CUDA of our own.

What it cannot show: what nvcc makes of the code, how fast it is, and races between threads that no order of whole
stretches between two barriers brings out.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.helpers import ROOT

HERE = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
COMPILER = shutil.which("g++")
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing",
    "-fno-extern-tls-init", "-U_FORTIFY_SOURCE", '-DMOEKERN_CUDA_ARCHITECTURES="none: a CPU"',
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
)  # fmt: skip


def build(folder: Path) -> Path:
    """The extension's CUDA side as a module of its own, compiled into the folder."""
    import pybind11

    include = [f"-I{HERE}", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    sources = [*SOURCES.glob("bindings*.cpp"), *SOURCES.glob("cuda/*.cu"), *HERE.glob("*.cpp")]  # the longest first

    def compiled(source: Path) -> str:
        out = folder / f"{source.name}.o"
        command = [str(COMPILER), *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", str(out)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return str(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / "_C.so"
    subprocess.run([str(COMPILER), "-shared", *objects, "-o", str(library)], check=True)
    return library


def loaded(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Borrowed(ctypes.Structure):
    """The start of DLPack's DLTensor."""

    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class OnDevice:
    """A tensor that says it is on a GPU. Its elements lie between pages that may not be touched."""

    def __init__(self, tensor: Tensor, driver: ctypes.CDLL, at_end: bool) -> None:
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        self.driver = driver
        self.data = driver.cuda_on_cpu_allocate(self.bytes, at_end)
        if tensor.is_contiguous():
            ctypes.memmove(self.data, tensor.data_ptr(), self.bytes)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int) -> object:
        assert stream == -1  # torch is not asked to make streams wait for each other
        capsule = self.tensor.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        borrowed = Borrowed.from_address(pointer(capsule, b"dltensor"))
        borrowed.data, borrowed.device_type = self.data, 2
        return capsule

    def back(self, copy: bool) -> None:
        if copy and self.tensor.is_contiguous():
            ctypes.memmove(self.tensor.data_ptr(), self.data, self.bytes)
        self.driver.cuda_on_cpu_release(self.data)


class Extension:
    """moekern._C as the native backend sees it, every tensor of a call on a GPU and in memory of its own.

    `seed` says in which order threads and blocks take turns. `at_end`: arguments end where memory does, and start
    where they happen to, as slices of larger tensors do; otherwise they start on a page.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.driver = ctypes.CDLL(str(module.__file__))
        self.driver.cuda_on_cpu_allocate.restype = ctypes.c_void_p
        self.driver.cuda_on_cpu_allocate.argtypes = [ctypes.c_size_t, ctypes.c_bool]
        self.driver.cuda_on_cpu_release.argtypes = [ctypes.c_void_p]
        self.driver.cuda_on_cpu_seed.argtypes = [ctypes.c_uint64]
        self.seed, self.at_end = 0, True

    def __getattr__(self, op: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            held: list[OnDevice] = []
            self.driver.cuda_on_cpu_seed(self.seed)
            done = False
            try:
                result = getattr(self.module, op)(*(self.moved(arg, held) for arg in args))
                done = True
            finally:
                for tensor in held:
                    tensor.back(done)
            assert self.driver.cuda_on_cpu_allocations() == 0  # scratch memory is freed
            return result

        return call

    def moved(self, arg: Any, held: list[OnDevice]) -> Any:
        if isinstance(arg, tuple):
            parts = [self.moved(part, held) for part in arg]
            return type(arg)(*parts) if hasattr(arg, "_fields") else tuple(parts)
        if not isinstance(arg, torch.Tensor):
            return arg
        held.append(OnDevice(arg, self.driver, self.at_end))
        return held[-1]


@cache
def extension(folder: Path) -> Extension:
    """Compiled by the first process that asks for it in this folder; where that fails, it has failed for all."""
    library = folder / "cuda_on_cpu" / "_C.so"
    with (folder / "cuda_on_cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.parent.exists():
            library.parent.mkdir()
            build(library.parent)
        assert library.exists(), "the first test that needed the CUDA side could not build it and says why"
    return Extension(loaded(library))

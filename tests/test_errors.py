"""Memory that is not there is told by what it was for."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch

from moekern.errors import InputError, is_out_of_memory, memory_for


class OutOfMemoryError(RuntimeError):
    """As torch's of a GPU is named."""


NO_MEMORY = [
    MemoryError(),
    OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_is_not_there_is_told_by_what_it_was_for(error: Exception) -> None:
    assert is_out_of_memory(error)
    with (
        pytest.raises(InputError, match=r"^not enough memory for layer 3 \(.*\); use --memory$") as told,
        memory_for("the whole", "nothing helps"),
        memory_for("layer 3", "use --memory"),
    ):
        raise error
    assert (told.value.kind, told.value.__cause__) == ("memory", error)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), OSError(errno.ENOSPC, "No space left"), ValueError()])
def test_other_errors_pass(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as told, memory_for("layer 3", "use --memory"):
        raise error
    assert told.value is error


def test_what_torch_says_is_known() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 55)
    assert is_out_of_memory(told.value)


def test_the_command_line_tells_it_in_one_line() -> None:
    code = (
        "import sys, moekern.cli.app as app\n"
        "def fail(**options): raise MemoryError\n"
        "app.app = fail\n"
        "sys.argv = ['moekern']\n"
        "app.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("moekern: not enough memory (MemoryError); ")
    assert done.stderr.count("\n") == 1

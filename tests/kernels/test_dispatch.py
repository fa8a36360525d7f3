"""Which backend serves which op."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moekern import _C, kernels
from tests.helpers import ROOT


def test_a_named_backend_never_falls_back() -> None:
    assert kernels.backend_for("router_stats", "cpu") == "native"
    assert kernels.backend_for("router_stats", "cpu", "reference") == "reference"
    with pytest.raises(NotImplementedError, match=r"\[router_stats\] backend: expected one of .* on cpu, got tpu"):
        kernels.router_stats(
            None, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), None, kernels.router_sums(4), backend="tpu"
        )
    with pytest.raises(NotImplementedError, match=r"\[combine_and_measure\] backend: .* on tpu, got None"):
        kernels.backend_for("combine_and_measure", "tpu")


def test_every_op_is_available_and_the_default_comes_first() -> None:
    for op, devices in kernels.available().items():
        assert op in kernels.OPS
        for device, backends in devices.items():
            assert backends[0] == kernels.backend_for(op, device)
            assert "reference" in backends
            assert all(kernels.backend_for(op, device, b) == b for b in backends)


def test_what_is_missing_is_in_the_table() -> None:
    """A backend has a function for each op that the table does not name, and for no op that it names."""
    for backend in kernels.BACKENDS:
        for device, names in kernels.PREFERENCE.items():
            if backend in names:
                module = kernels.dispatch.backend_module(backend)
                missing = kernels.MISSING.get((backend, device), frozenset())
                assert module is None or all(hasattr(module, op) for op in set(kernels.OPS) - missing)
                assert backend != "reference" or not missing


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as where it is not installed: importing it is a ModuleNotFoundError
import torch
from moekern import kernels

assert all("triton" not in backends for devices in kernels.available().values() for backends in devices.values())
assert not kernels.serves("triton", "router_stats", "cuda")
sums = kernels.router_sums(4)
kernels.router_stats(torch.zeros(3, 4), torch.tensor([[0], [2], [2]]), torch.ones(3, 1), None, sums)
order, offsets = kernels.sort_by_expert(torch.tensor([[0], [2], [2]]), 4)
x, gate_up, down = torch.ones(3, 8), torch.ones(4, 4, 8), torch.ones(4, 8, 2)
kernels.grouped_mlp(x, gate_up, down, torch.ones(3, 1), torch.tensor([[0], [2], [2]]), order, offsets, None, None)
print(sums.count.tolist())
"""


def test_without_triton_all_else_works() -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[1, 0, 2, 0]\n", "")


def test_the_extension_links_neither_torch_nor_a_cuda_runtime() -> None:
    binary = Path(_C.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in binary
    assert _C.cuda_device_count() >= 0
    assert (_C.cuda_architectures() == "") <= (_C.cuda_device_count() == 0)

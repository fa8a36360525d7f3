"""Which backend serves which op."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moekern import _C, kernels


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


def test_the_extension_links_neither_torch_nor_a_cuda_runtime() -> None:
    binary = Path(_C.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in binary
    assert _C.cuda_device_count() >= 0
    assert (_C.cuda_architectures() == "") <= (_C.cuda_device_count() == 0)

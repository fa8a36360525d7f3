"""Which backend serves which op."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moekern import _C, kernels
from moekern.kernels import native
from tests.helpers import ROOT


def test_a_named_backend_never_falls_back() -> None:
    assert kernels.backend_for("router_stats", "cpu") == "native"
    assert kernels.backend_for("router_stats", "cpu", "reference") == "reference"
    with pytest.raises(
        NotImplementedError,
        match=r"^\[router_stats\] backend: expected one of .* on cpu, got tpu \(tpu: no such backend\)$",
    ):
        kernels.router_stats(
            None, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), None, kernels.router_sums(4), backend="tpu"
        )
    with pytest.raises(
        NotImplementedError, match=r"^\[combine_and_measure\] backend: expected one of \[\] on tpu, got"
    ) as e:
        kernels.backend_for("combine_and_measure", "tpu")
    said = str(e.value).split("got None (")[1].removesuffix(")").split("; ")
    assert said == [f"{name}: does not run on tpu" for name in kernels.BACKENDS]


def test_a_refusal_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(backend: str, op: str, device: str) -> str:
        with pytest.raises(NotImplementedError) as error:
            kernels.backend_for(op, device, backend)
        assert "\n" not in str(error.value)
        return str(error.value).split(f"got {backend} ({backend}: ")[1].removesuffix(")")

    assert why("native", "grouped_mlp", "cpu") == "lacks the op"
    assert why("triton", "similarity", "cpu") == "lacks the op"
    monkeypatch.setattr(native._C, "cuda_device_count", lambda: 0)
    monkeypatch.setattr(native._C, "cuda_architectures", lambda: "80-real 90")
    assert why("native", "router_stats", "cuda") == "no CUDA device that it was built for (80-real 90)"
    monkeypatch.setattr(native._C, "cuda_architectures", lambda: "")
    assert why("native", "router_stats", "cuda") == "built without CUDA"


COMPILED = """
from moekern import kernels
try:
    kernels.backend_for("router_stats", "cpu", "triton")
except NotImplementedError as error:
    print(str(error).split("got triton ")[1])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_on_a_cpu_asks_for_its_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    want = "(triton: on a CPU it needs Triton's interpreter, with TRITON_INTERPRET=1 in the environment)\n"
    assert done.stdout == want


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
                assert isinstance(module, str) or all(hasattr(module, op) for op in set(kernels.OPS) - missing)
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
try:
    kernels.backend_for("router_stats", "cuda", "triton")
except NotImplementedError as error:
    print(str(error).split("got triton ")[1])
"""


def test_without_triton_all_else_works() -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    counts, why = done.stdout.splitlines()
    assert counts == "[1, 0, 2, 0]"
    assert why.startswith("(triton: Triton is not installed: ")


def test_the_extension_links_neither_torch_nor_a_cuda_runtime() -> None:
    binary = Path(_C.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in binary
    assert _C.cuda_device_count() >= 0
    assert (_C.cuda_architectures() == "") <= (_C.cuda_device_count() == 0)

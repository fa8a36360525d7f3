"""Compute: one object from the command line to the core."""

from __future__ import annotations

import pytest
import torch

from moekern.errors import InputError
from moekern.model.compute import Compute


def test_a_type_is_the_same_by_name_and_as_torchs() -> None:
    named, torchs = Compute(dtype="bfloat16"), Compute(dtype=torch.bfloat16)
    assert named.torch_dtype is torchs.torch_dtype is torch.bfloat16
    assert named.dtype_name == torchs.dtype_name == "bfloat16"
    assert (Compute().dtype, Compute().torch_dtype, Compute().dtype_name) == ("auto", None, None)


@pytest.mark.parametrize("name", ["float31", "nn"])
def test_a_type_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"--dtype {name}: no such type"):
        _ = Compute(dtype=name).torch_dtype


def test_auto_is_the_first_cuda_device_where_torch_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Compute().device == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert Compute().place == torch.device("cuda:0")
    assert Compute().described == "computing on cuda:0 (GPU 0)"
    assert Compute(device="cpu").place == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert Compute().described == "computing on the CPU, 2 threads"


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="--device nowhere: not usable here"):
        _ = Compute(device="nowhere").place

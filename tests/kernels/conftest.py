"""Shared by the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moekern.kernels import native
from tests.helpers import cuda_on_cpu


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> cuda_on_cpu.Extension:
    """The native backend runs its CUDA side."""
    extension = cuda_on_cpu.extension()
    monkeypatch.setattr(native, "_C", extension)
    extension.seed, extension.at_end = 0, True
    return extension

"""Shared by the kernels' tests."""

from __future__ import annotations

import os
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
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> cuda_on_cpu.Extension:
    """The native backend runs its CUDA side, which is built once for all processes of a run."""
    folder = tmp_path_factory.getbasetemp()
    extension = cuda_on_cpu.extension(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)
    monkeypatch.setattr(native, "_C", extension)
    extension.seed, extension.at_end = 0, True
    return extension

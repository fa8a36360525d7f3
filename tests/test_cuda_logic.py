"""The CUDA kernels, run on the CPU: see tests/cuda_on_cpu."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moekern.kernels import native
from tests import cuda_on_cpu
from tests.cases import Case, router
from tests.test_sort import WIDE, by_hand

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no g++")


@pytest.fixture(scope="session")
def built() -> cuda_on_cpu.Extension:
    return cuda_on_cpu.extension()


@pytest.fixture
def cuda(built: cuda_on_cpu.Extension, monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda_on_cpu.Extension]:
    """The native backend runs its CUDA side."""
    monkeypatch.setattr(native, "_C", built)
    built.seed, built.at_end = 0, True
    return built


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_sort_by_expert_gives_the_defined_permutation(cuda: cuda_on_cpu.Extension, case: Case) -> None:
    args = router(case)
    for mask in (None, args.mask):
        for cuda.seed in range(2):
            order, offsets = native.sort_by_expert(args.topk_idx, case.E, mask)
            assert (order.tolist(), offsets.tolist()) == by_hand(args.topk_idx, case.E, mask)

"""What ops add to: declared once, and taken by name."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from moekern import kernels
from moekern.kernels import sums as declaration
from tests.helpers.cases import Case, router, rows, stream
from tests.helpers.ops import runs

CASE = Case(40, 5, 2, 12, masked=True)
KINDS = (kernels.RouterSums, kernels.ExpertSums, kernels.SimilaritySums, kernels.WeightSums)


def backwards(sums: Any) -> Any:
    """The same fields in the reverse order: taken by place, sums of one shape would be exchanged."""
    names = sums._fields[::-1]
    return namedtuple("Backwards", names)(*(getattr(sums, name) for name in names))


def added(op: str, sums: Any, device: str, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    if op == "router_stats":
        kernels.router_stats(*(a if a is None else a.to(device) for a in router(CASE)), sums, backend=backend)
    elif op == "combine_and_measure":
        args, h = [a if a is None else a.to(device) for a in rows(CASE)], stream(rows(CASE)).to(device)
        kernels.combine_and_measure(*args, sums, residual=h, backend=backend)  # type: ignore[arg-type]
    elif op == "similarity":
        kernels.similarity(torch.randn(5, 7, 12, generator=g).to(device), None, sums, backend=backend)
    else:
        kernels.weight_stats(torch.randn(5, 4, 6, generator=g).to(device), sums, backend=backend)


ZEROS = {
    "router_stats": lambda device: kernels.router_sums(5, device, gram=True),
    "combine_and_measure": lambda device: kernels.expert_sums(5, 12, device),
    "similarity": lambda device: kernels.similarity_sums(5, device),
    "weight_stats": lambda device: kernels.weight_sums(5, device),
}
ROADS = [
    pytest.param(op, *run.values, marks=run.marks, id=f"{op}-{run.id}")
    for op in ZEROS
    for run in [*runs(op), pytest.param("cpu", "reference", id="cpu-reference")]
]


@pytest.mark.parametrize(("op", "device", "backend"), ROADS)
def test_every_backend_takes_sums_by_name(op: str, device: str, backend: str) -> None:
    want, got = ZEROS[op](device), backwards(ZEROS[op](device))
    added(op, want, device, backend)
    added(op, got, device, backend)
    for name, value in want._asdict().items():
        assert torch.equal(getattr(got, name), value), name
        assert value.any(), name  # a sum that stays zero would hide an exchange


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_as_declared(kind: type[Any]) -> None:
    sizes = {"E": 3, "E?": 3, "H?": 0}
    zeros, declared = declaration.zeros(kind, sizes), declaration.declared(kind)
    assert list(declared) == list(kind._fields)
    for name, tensor in zeros._asdict().items():
        assert tensor.dtype == declared[name].dtype
        assert list(tensor.shape) == [sizes.get(word, 1) for word in declared[name].shape.split()]


def test_sums_of_another_dtype_are_refused_by_their_name() -> None:
    sums = kernels.similarity_sums(5)._replace(cosine_sum=torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"^\[similarity\] cosine_sum: expected float64, got float32"):
        added("similarity", sums, "cpu", "native")


def test_the_extension_names_a_field_that_is_not_there() -> None:
    names = ("abs_sum", "count", "max_abs")
    short: Any = namedtuple("Short", names)(*(getattr(kernels.weight_sums(5), name) for name in names))
    dense: Tensor = torch.ones(5, 6)
    with pytest.raises(ValueError, match=r"^\[weight_stats\] square_sum: expected a field of the sums"):
        kernels.native.weight_stats(dense, short)

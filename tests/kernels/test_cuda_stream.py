"""On a GPU: the ops of calibration wait for nothing, keep to torch's stream, and a CUDA graph may record them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moekern import kernels
from tests.helpers.cases import Case, Router, Rows, router, rows, stream
from tests.helpers.ops import to

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CASE = Case(3000, 64, 6, 256, masked=True, empty=True)


class Layer(NamedTuple):
    """A layer's arguments and sums on the GPU."""

    router: Router
    rows: Rows
    residual: Tensor
    routing: kernels.RouterSums
    experts: kernels.ExpertSums

    def measure(self, backend: str) -> list[Tensor]:
        order, offsets = kernels.sort_by_expert(self.rows.topk_idx, CASE.E, backend=backend)
        kernels.router_stats(*self.router, self.routing, backend=backend)
        out = kernels.combine_and_measure(*self.rows, self.experts, residual=self.residual, backend=backend)
        return [order, offsets, out]


def layer() -> Layer:
    batch = rows(CASE, torch.bfloat16)
    return Layer(
        Router(*to("cuda", router(CASE))),  # type: ignore[arg-type]
        Rows(*to("cuda", batch)),  # type: ignore[arg-type]
        stream(batch).cuda(),
        kernels.router_sums(CASE.E, "cuda", gram=True),
        kernels.expert_sums(CASE.E, CASE.H, "cuda"),
    )


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Compiled, and its memory pool made, before anything is forbidden."""
    name = str(request.param)
    if not all(kernels.serves(name, op, "cuda") for op in ("router_stats", "combine_and_measure", "sort_by_expert")):
        pytest.skip(f"no {name} on this GPU")
    layer().measure(name)
    torch.cuda.synchronize()
    return name


@pytest.fixture
def no_wait() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_wait")
def test_nothing_waits_for_the_device(backend: str) -> None:
    a = layer()
    torch.cuda.set_sync_debug_mode("error")
    a.measure(backend)


def test_a_graph_gives_the_same_bits(backend: str) -> None:
    want, recorded = layer(), layer()
    outs = want.measure(backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = recorded.measure(backend)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip([*outs, *want.routing, *want.experts], [*found, *recorded.routing, *recorded.experts], strict=True):
        assert torch.equal(a, b)
    graph.replay()
    assert torch.equal(recorded.routing.count, 2 * want.routing.count)


def test_work_is_queued_on_the_current_stream(backend: str) -> None:
    want, late = layer(), layer()
    want.measure(backend)
    gates = late.rows.topk_weight.clone()
    late.rows.topk_weight.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the gates come only then
        late.rows.topk_weight.copy_(gates)
        late.measure(backend)
    torch.cuda.synchronize()
    assert torch.equal(late.experts.gated_norm_sum, want.experts.gated_norm_sum)

"""Routers, experts and domains of a layer, against sums of a few tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import log, log2, sqrt

import pytest
import torch

from moekern.report.diagnostics import (
    coverage_of,
    domains_of,
    preferences,
    router_of,
    routing_term,
    routing_variance,
)
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import add_token


def sums_of(*tokens: tuple[list[int], list[float]]) -> LayerStatistics:
    """Four experts whose outputs have norm 5; a token is its experts and their gates."""
    sums = LayerStatistics.zeros(4)
    for ids, gates in tokens:
        score = torch.full((4,), 0.25, dtype=torch.float64)
        add_token(sums, ids, gates, torch.tensor([[3.0, 4.0]] * len(ids)), score)
    return sums


def test_router_and_coverage() -> None:
    sums = sums_of(*[([0, 1], [0.5, 0.5])] * 3, ([0, 2], [0.5, 0.5]))
    found = router_of(sums)
    assert found["entropy"] == pytest.approx(1)  # even scores
    assert found["dead"] == 1
    assert found["max_over_mean"] == pytest.approx(4 / 2)
    spread = (((4 - 2) ** 2 + (3 - 2) ** 2 + (1 - 2) ** 2 + (0 - 2) ** 2) / 4) ** 0.5
    assert found["load_z"] == {"expert": 0, "z": pytest.approx(2 / spread)}
    assert found["norm_z"] is None  # all outputs are alike
    sums.norm_sum[2] *= 10
    assert router_of(sums)["norm_z"] == {"expert": 2, "z": pytest.approx(log(10) * (2 / 3) / (log(10) * 2**0.5 / 3))}
    told = coverage_of(sums)
    assert (told["experts"], told["idle"], told["thin"], told["least"], told["most"]) == (4, 1, 4, 0, 4)


def test_domains_count_alike_however_long_they_are() -> None:
    code = sums_of(*[([0, 1], [0.5, 0.5])] * 10)
    prose = sums_of(([1, 2], [0.75, 0.25]))
    found = domains_of({"code": code, "prose": prose})
    assert found is not None
    # shares of mass: code 1/2, 1/2, 0, 0; prose 0, 3/4, 1/4, 0
    assert found["owned"] == 2
    assert found["most"] == {"expert": 0, "domain": "code", "share": 1}
    assert found["served"] == pytest.approx({"code": 0.5, "prose": 1})
    assert found["experts"] == {"code": 1, "prose": 2}
    preferred = preferences({"code": code, "prose": prose})
    assert preferred["code"][:2].tolist() == pytest.approx([log2(0.5 / 0.25), 0])
    assert preferred["code"][2] == -torch.inf
    assert preferred["prose"][3].isnan()


def test_one_domain_has_nothing_to_be_compared_with() -> None:
    assert domains_of({"code": sums_of(([0, 1], [0.5, 0.5])), "empty": LayerStatistics.zeros(4)}) is None


@pytest.mark.parametrize("groups", [1, 2])
def test_logits_vary_within_clusters_and_between_them(groups: int) -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(50, 2, generator=draw, dtype=torch.float64)
    members = ([0, 1, 2], [3, 4, 5]) if groups == 2 else ([0, 2, 4], [1, 3, 5])  # whose logits are near each other
    logits = torch.randn(50, 6, generator=draw, dtype=torch.float64) / 8
    for cluster, column in zip(members, base.T, strict=True):
        logits[:, cluster] += column[:, None]
    sums = LayerStatistics.zeros(6)
    sums = replace(sums, logit_gram=logits.T @ logits)
    sums.logit_tokens.fill_(50)
    found = routing_variance(sums, groups)
    assert found is not None
    assert found["clusters"] == 2
    each = [logits[:, cluster] for cluster in members]
    within = sum(float(part.var(1, correction=0).mean()) for part in each) / 2
    between = float(torch.stack([part.mean(1) for part in each], 1).var(1, correction=0).mean())
    assert (found["within"], found["between"]) == pytest.approx((within, between))
    assert within + between == pytest.approx(float(logits.var(1, correction=0).mean()))
    assert routing_variance(LayerStatistics.zeros(6), groups) is None


def test_the_routing_term_falls_with_experts_and_with_nothing_else_that_pruning_changes() -> None:
    def bound(experts: int, k: int, m: int, width: int) -> float:
        natarajan = width * experts
        return sqrt((2 * k * natarajan * (1 + log(experts / k)) + natarajan * log(2 * m)) / (2 * m))

    for width in (16, 7168):
        ratio = bound(64, 8, 10_000, width) / bound(128, 8, 10_000, width)
        assert routing_term(64, 8, 10_000) / routing_term(128, 8, 10_000) == pytest.approx(ratio)
    terms = [routing_term(experts, 2, 100) for experts in (2, 4, 8)]
    assert all(few < many for few, many in pairwise(terms))

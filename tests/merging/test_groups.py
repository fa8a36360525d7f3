"""Which expert joins which, against the methods written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from moekern.errors import InputError
from moekern.merging.groups import METHODS, hc_smoe, merging_plan, ream
from moekern.plan.budgets import Budget
from moekern.plan.document import Plan
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import E, header, model_statistics


def measured(seed: int = 0, experts: int = E, hidden: int = 5) -> LayerStatistics:
    """Random sums with inner products of things that could be."""
    draw = torch.Generator().manual_seed(seed)
    s = LayerStatistics.zeros(experts, tiers=("replay",), hidden=hidden)
    logits, outputs = torch.randn(40, experts, generator=draw).double(), torch.randn(2, experts, hidden, generator=draw)
    count = torch.randint(1, 40, (experts,), generator=draw)
    return replace(
        s, tokens=torch.tensor([40]), logit_tokens=torch.tensor([40]), count=count, logit_gram=logits.T @ logits,
        gated_norm_sum=torch.rand(experts, generator=draw).double() * count, replay_tokens=torch.tensor([9]),
        output_sum=outputs[0].double(), scored_output_sum=outputs[1].double(),
    )  # fmt: skip


def plan(sums: LayerStatistics, method: str, keep: int, **options: object) -> Plan:
    E = sums.num_experts
    return merging_plan(Statistics(header(["a"], num_experts=E), {"0": {"a": sums}}), method, keep, **options)  # type: ignore[arg-type]


def home_of(made: Plan) -> dict[int, int]:
    """Expert -> the one that it joins."""
    layer = made.layers["0"]
    return {m: e for e, group in zip(layer.keep, layer.groups or (), strict=True) for m, _ in group}


@pytest.mark.parametrize("seed", range(3))
def test_m_smoe(seed: int) -> None:
    sums = measured(seed)
    made, gram, used = plan(sums, "m-smoe", 3), sums.logit_gram.numpy(), sums.count.numpy()
    keep = sorted(sorted(range(E), key=lambda e: (-used[e], e))[:3])
    assert made.layers["0"].keep == tuple(keep)
    cosine = gram / np.sqrt(np.outer(gram.diagonal(), gram.diagonal()))
    want = {e: e if e in keep else max(keep, key=lambda kept: cosine[e, kept]) for e in range(E)}
    assert home_of(made) == want
    for e, group in zip(keep, made.layers["0"].groups or (), strict=True):
        assert len(group) == 1 or dict(group) == {m: used[m] for m in range(E) if want[m] == e}
    assert made.provenance["merge"] == {"method": "m-smoe", "align": "weights", "paper": "arXiv:2310.01334"}


@pytest.mark.parametrize("seed", range(3))
def test_hc_smoe(seed: int) -> None:
    sums = measured(seed, experts=9)
    made, means = plan(sums, "hc-smoe", 4), (sums.output_sum / 9).numpy()
    labels = fcluster(linkage(means, "average"), 4, "maxclust")
    home = home_of(made)
    for label in set(labels):
        members = np.flatnonzero(labels == label).tolist()
        centre = means[members].mean(0)
        assert len({home[m] for m in members}) == 1
        apart = {m: np.linalg.norm(means[m] - centre) for m in members}
        assert apart[home[members[0]]] <= min(apart.values()) * (1 + 1e-9)  # two are as far from their mean


def test_a_cluster_that_is_idle_joins_the_nearest() -> None:
    sums = measured(0)
    sums.output_sum.copy_(torch.eye(E, 5))
    sums.output_sum[5] = 50.0  # a cluster of its own, whose expert no token has chosen
    sums.count[5] = 0
    home = hc_smoe(sums, (0, 1), 1)
    assert home[5] in (0, 1)
    assert plan(sums, "hc-smoe", 2).layers["0"].keep != (5,)
    assert 5 not in home_of(plan(sums, "hc-smoe", 2))


@pytest.mark.parametrize("seed", range(3))
def test_ream(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekern.merging.groups.CAPACITY", 3)
    sums = measured(seed, experts=8)
    sums.gated_norm_sum[6] = 0
    made = plan(sums, "ream", 3)
    salience = (sums.gated_norm_sum / sums.count).tolist()
    y, gram = sums.scored_output_sum.numpy(), sums.logit_gram.numpy()
    unit = gram / np.sqrt(np.outer(gram.diagonal(), gram.diagonal()))
    apart = np.sqrt(np.maximum(2 - 2 * unit, 0))
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in y] for a in y])
    likeness = ((cosine + 1) / 2 + 1 - apart / apart.max()) / 2
    order = sorted(range(8), key=lambda e: -salience[e])[:3]
    want = {e: e for e in order}
    for e in order:
        for other in sorted((m for m in range(8) if m not in want), key=lambda m: -likeness[e, m])[:2]:
            want[other] = e
    assert home_of(made) == want
    weights = {m: w for group in made.layers["0"].groups or () for m, w in group if len(group) > 1}
    least = min(0.5, min(s for s in salience if s > 0))
    assert all(weights[m] == pytest.approx(salience[m] or least) for m in weights)
    with pytest.raises(InputError, match="2 groups of 3 experts have no place for 8"):
        ream(sums, (0, 1), 1)


def test_layers_may_keep_different_numbers_where_that_is_allowed() -> None:
    statistics = model_statistics()
    made = merging_plan(statistics, "m-smoe", 0.5, budget=Budget("adaptive", allow_nonuniform=True))
    counts = {key: len(layer.keep) for key, layer in made.layers.items()}
    shares = {key: (c := statistics.layer(key).count.double()) / c.max() for key in made.layers}
    cut = torch.cat(list(shares.values())).sort(descending=True).values[sum(counts.values()) - 1]
    assert sum(counts.values()) == 9
    assert all(counts[key] == max(2, int((share >= cut).sum())) for key, share in shares.items())


def test_each_router_group_keeps_as_many() -> None:
    for method in METHODS:
        statistics = Statistics(header(["a"], num_experts=8, n_group=2, topk_group=1), {"0": {"a": measured(0, 8)}})
        keep = merging_plan(statistics, method, 4).layers["0"].keep
        assert sum(e < 4 for e in keep) == 2


def test_what_statistics_lack_is_named() -> None:
    sums = replace(measured(), output_sum=torch.zeros(0, 0).double(), scored_output_sum=torch.zeros(0, 0).double())
    for method in ("hc-smoe", "ream"):
        with pytest.raises(InputError, match="calibrate with --tier replay"):
            plan(sums, method, 3)
    with pytest.raises(InputError, match="--method hcsmoe: expected one of"):
        plan(measured(), "hcsmoe", 3)

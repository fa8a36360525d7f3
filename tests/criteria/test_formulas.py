"""Each criterion against its formula written out over the tokens themselves, slowly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moekern.criteria import CRITERIA, criterion_named, score_layer
from moekern.criteria.subsets import _uncovered, average_linkage
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import layer_statistics, with_tiers
from tests.helpers.tokens import Tokens, measured, tokens

EXPERTS = range(6)
Formula = Callable[[Tokens, int], float | Tensor]


def rows(raw: Tokens, e: int) -> Tensor:
    """[count, H] outputs of e on its tokens."""
    return torch.stack([raw.y[t, e] for t in raw.routed(e)])


def gates(raw: Tokens, e: int) -> Tensor:
    return torch.stack([raw.gates(t)[e] for t in raw.routed(e)])


def ids(raw: Tokens, e: int) -> set[int]:
    return {int(raw.token_ids[t]) for t in raw.routed(e)}


def mean_pair_cosine(a: Tensor, b: Tensor) -> Tensor:
    return cosine_similarity(a[:, None], b[None], dim=2).mean()


def turn(raw: Tokens, t: int) -> Tensor:
    h = raw.residual[t]
    return (1 - cosine_similarity(h, h + raw.output(t), dim=0)).clamp(min=0)


def lost(raw: Tokens, e: int) -> Tensor:
    return torch.stack([raw.output(t) - raw.output(t, (e,)) for t in range(len(raw.logits))])


def others(e: int) -> list[int]:
    return [q for q in EXPERTS if q != e]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return cosine_similarity(a.flatten(), b.flatten(), dim=0)


def apart(raw: Tokens, e: int) -> Tensor:
    """[count] of each token that chose e: its gate times how far its output is from the layer's."""
    return torch.stack([raw.gates(t)[e] * (raw.y[t, e] - raw.output(t)).norm() for t in raw.routed(e)])


def left_out(raw: Tokens, e: int) -> Tensor:
    """[count] of each token that chose e: the norm of what the output loses without it, gates summing to 1 again."""
    return torch.stack([raw.left_out(t, e).norm() for t in raw.routed(e)])


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def likeness_to_better(raw: Tokens, e: int, worth: list[float], alike: Callable[[int, int], Tensor]) -> float:
    """The largest likeness to an expert of more worth. That of the best is below all by the mean step between them."""

    def largest(p: int) -> float | None:
        return max((float(alike(p, q)) for q in others(p) if (worth[q], -q) > (worth[p], -p)), default=None)

    mine, known = largest(e), [found for p in EXPERTS if (found := largest(p)) is not None]
    return min(known) - (max(known) - min(known)) / (len(known) - 1) if mine is None else mine


def used(raw: Tokens) -> list[float]:
    return [len(raw.routed(e)) for e in EXPERTS]


def reap(raw: Tokens, e: int) -> Tensor:
    return (gates(raw, e) * rows(raw, e).norm(dim=1)).mean()


def scored(raw: Tokens, e: int) -> Tensor:
    """[H] mean output over all tokens, times the softmax of the logit."""
    return (raw.logits.softmax(1)[:, e, None] * raw.y[:, e]).mean(0)


def routers_alike(raw: Tokens) -> Tensor:
    profile = (raw.logits / raw.logits.norm(dim=0)).T
    apart = (profile[:, None] - profile).norm(dim=2)
    return 1 - apart / apart.max()


def stable_rank(matrix: Tensor) -> Tensor:
    return matrix.square().sum() / torch.linalg.matrix_norm(matrix, 2) ** 2


def shapley(raw: Tokens, e: int) -> float:
    chosen = [frozenset(raw.chosen(t)) for t in range(len(raw.logits))]
    sets = {a for a in chosen if e in a}
    value = {a: chosen.count(a) for a in sets}
    n = {a: sum(a - {e} <= b for b in chosen) for a in sets}
    alpha = min(value[a] / n[a] for a in sets)
    return sum(value[a] - alpha * n[a] for a in sets)


FORMULAS: dict[str, Formula] = {
    "ews": lambda raw, e: -sum(cosine(raw.weights[e], raw.weights[q]) for q in others(e)),
    "rwn": lambda raw, e: -raw.router[e].norm(),
    "wsr": lambda raw, e: -stable_rank(raw.weights[e]),
    "ewn": lambda raw, e: raw.weights[e].norm(),
    "aimer": lambda raw, e: -raw.weights[e].abs().mean() / raw.weights[e].square().mean().sqrt(),
    "usage": lambda raw, e: len(raw.routed(e)) / len(raw.logits),
    "evtc": lambda raw, e: len(ids(raw, e)),
    "eas": lambda raw, e: -sum(mean_pair_cosine(rows(raw, e), rows(raw, q)) for q in others(e)),
    "eae": lambda raw, e: rows(raw, e).std(0, correction=0).log().sum(),
    "eao": lambda raw, e: ((rows(raw, e) - rows(raw, e).mean()).abs() > 3 * rows(raw, e).std(correction=0)).sum(),
    "ean_dim": lambda raw, e: rows(raw, e).norm(dim=0).sum(),
    "gate_mass": lambda raw, e: gates(raw, e).sum(),
    "ean": lambda raw, e: rows(raw, e).norm(dim=1).sum(),
    "reap": reap,
    "man": lambda raw, e: rows(raw, e).norm(dim=1).mean(),
    "msan": lambda raw, e: rows(raw, e).norm(dim=1).square().mean(),
    "gated_norm": lambda raw, e: (gates(raw, e) * rows(raw, e).norm(dim=1)).sum(),
    "gated_square": lambda raw, e: (gates(raw, e) * rows(raw, e).norm(dim=1)).square().sum(),
    "reap_renormalised": reap,  # these gates sum to 1
    "reap_compat": lambda raw, e: torch.stack(
        [raw.logits[t].softmax(0)[e] * raw.y[t, e].norm() for t in raw.routed(e)]
    ).mean(),
    "hope": lambda raw, e: (gates(raw, e) * rows(raw, e).norm(dim=1)).square().mean(),
    "hope_all_tokens": lambda raw, e: (gates(raw, e) * rows(raw, e).norm(dim=1)).square().sum() / len(raw.logits),
    "easy_ep": lambda raw, e: sum(raw.gates(t)[e] * raw.y[t, e].norm() * turn(raw, t) for t in raw.routed(e)),
    "mone": lambda raw, e: rows(raw, e).var(0, correction=0).sqrt().norm() * gates(raw, e).sum(),
    "shape": shapley,
    "m_smoe": lambda raw, e: (
        -likeness_to_better(raw, e, used(raw), lambda p, q: (cosine(raw.logits[:, p], raw.logits[:, q]) + 1) / 2)
    ),
    "router_redundancy": lambda raw, e: -sum(cosine(raw.logits[:, e], raw.logits[:, q]) for q in others(e)),
    "hc_smoe": lambda raw, e: (
        -likeness_to_better(raw, e, used(raw), lambda p, q: -(raw.y[:, p].mean(0) - raw.y[:, q].mean(0)).norm())
    ),
    "hc_smoe_cosine": lambda raw, e: (
        -likeness_to_better(raw, e, used(raw), lambda p, q: cosine(raw.y[:, p].mean(0), raw.y[:, q].mean(0)))
    ),
    "ream": lambda raw, e: (
        -likeness_to_better(
            raw,
            e,
            [float(reap(raw, q)) for q in EXPERTS],
            lambda p, q: ((1 + cosine(scored(raw, p), scored(raw, q))) / 2 + routers_alike(raw)[p, q]) / 2,
        )
    ),
    "ream_tokens": lambda raw, e: (
        -likeness_to_better(
            raw,
            e,
            [float(reap(raw, q)) for q in EXPERTS],
            lambda p, q: (
                (cosine_similarity(raw.y[:, p], raw.y[:, q], dim=1).mean() + cosine(raw.logits[:, p], raw.logits[:, q]))
                / 2
            ),
        )
    ),
    "output_redundancy": lambda raw, e: (
        -sum(cosine_similarity(raw.y[:, e], raw.y[:, q], dim=1).mean() for q in others(e))
    ),
    "leave_one_out": lambda raw, e: lost(raw, e).square().sum(),
    "rcs": lambda raw, e: apart(raw, e).square().sum(),
    "rcs_sum": lambda raw, e: apart(raw, e).sum(),
    "rcs_mean": lambda raw, e: apart(raw, e).mean(),
    "rcs_rms": lambda raw, e: rms(apart(raw, e)),
    "rcs_loo": lambda raw, e: left_out(raw, e).square().sum(),
    "rcs_loo_sum": lambda raw, e: left_out(raw, e).sum(),
    "rcs_loo_mean": lambda raw, e: left_out(raw, e).mean(),
    "rcs_loo_rms": lambda raw, e: rms(left_out(raw, e)),
    "razor": lambda raw, e: rms(lost(raw, e).norm(dim=1)[raw.routed(e)]),
    "omp": lambda raw, e: (gates(raw, e)[:, None] * rows(raw, e)).square().sum(),  # of its choices see test_pursuit
}
# These are tested below, by what they choose or by the order they make; gradients where they are measured.
OTHERWISE = {"ecc", "ets", "ets_tokens", "naee", "stun", "leave_one_out_greedy", "diet", "random"} | {
    "hc_smoe_clusters", "hc_smoe_clusters_cosine"
}  # fmt: skip


def test_every_criterion_has_its_formula() -> None:
    gradients = {name for name, row in CRITERIA.items() if "gradient" in row.tiers}
    assert FORMULAS.keys() | OTHERWISE | gradients == CRITERIA.keys()


@pytest.fixture(scope="module", params=[0, 1])
def layer(request: pytest.FixtureRequest) -> tuple[Tokens, LayerStatistics]:
    raw = tokens(request.param)
    return raw, measured(raw)


@pytest.mark.parametrize("name", FORMULAS)
def test_scores_are_what_the_formula_says(layer: tuple[Tokens, LayerStatistics], name: str) -> None:
    raw, sums = layer
    want = torch.tensor([float(FORMULAS[name](raw, e)) for e in EXPERTS], dtype=torch.float64)
    # Float64 over at most 60 tokens x 5 dimensions; variances come from differences of sums, which cost some digits.
    torch.testing.assert_close(score_layer(criterion_named(name), sums, "0"), want, rtol=1e-9, atol=1e-11)


def literal_order(count: list[int], together: Callable[[int, int], int], end: Callable[..., Any] = max) -> list[int]:
    """Drop the less used of the pair with most (or least) in common, again and again; the survivor comes last."""
    left, order = list(EXPERTS), []
    while len(left) > 1:
        pair = end(combinations(left, 2), key=lambda p: together(*p))
        dropped = min(pair, key=lambda e: (count[e], -e))
        left.remove(dropped)
        order.append(dropped)
    return order + left


def test_pairs_are_parted_one_by_one(layer: tuple[Tokens, LayerStatistics]) -> None:
    sums = with_tiers(layer_statistics(3))
    raw, measured_sums = layer
    bits = [ids(raw, e) for e in EXPERTS]
    for form, end in (("{}", max), ("inverse({})", min)):
        got = score_layer(criterion_named(form.format("ets")), measured_sums, "0")
        want = literal_order(measured_sums.count.tolist(), lambda p, q: len(bits[p] & bits[q]), end)
        assert got.argsort().tolist() == want
        got = score_layer(criterion_named(form.format("ets_tokens")), measured_sums, "0")
        seen = [Counter(int(raw.token_ids[t]) for t in raw.routed(e)) for e in EXPERTS]
        want = literal_order(measured_sums.count.tolist(), lambda p, q: (seen[p] & seen[q]).total(), end)  # noqa: B023
        assert got.argsort().tolist() == want
        got = score_layer(criterion_named(form.format("ecc")), sums, "0")
        want = literal_order(sums.count.tolist(), lambda p, q: int(sums.coactivation[p, q]), end)
        assert got.argsort().tolist() == want


@pytest.mark.parametrize("kept", [2, 3, 5])
def test_naee_finds_the_set_with_the_least_loss(layer: tuple[Tokens, LayerStatistics], kept: int) -> None:
    raw, sums = layer

    def loss(keep: tuple[int, ...]) -> float:
        without = tuple(set(EXPERTS) - set(keep))
        whole = range(len(raw.logits))
        return float(sum((raw.output(t) - raw.output(t, without)).square().sum() for t in whole))

    best = min(combinations(EXPERTS, kept), key=loss)
    assert CRITERIA["naee"].function(sums, kept).keep == best
    inside = min((keep for keep in combinations(EXPERTS, kept) if 0 in keep), key=loss)
    assert CRITERIA["naee"].function(sums, kept, 1, (0,)).keep == inside


def test_naee_of_many_experts_is_the_best_of_the_quadratic_form() -> None:
    raw = tokens(5, T=30, E=12, K=2)
    s = LayerStatistics.zeros(12, 5, tiers=("replay",))
    s.count.fill_(1)
    deltas = torch.stack([lost(raw, e).flatten() for e in range(12)])
    s.deletion_gram.copy_(deltas @ deltas.T)
    keep = CRITERIA["naee"].function(s, 8).keep
    best = min(combinations(range(12), 4), key=lambda drop: float(deltas[list(drop)].sum(0).norm()))
    assert set(keep) == set(range(12)) - set(best)


def test_greedy_drops_what_adds_least() -> None:
    raw = tokens(6, T=30, E=12, K=2)
    s = LayerStatistics.zeros(12, 5, tiers=("replay",))
    s.count.fill_(1)
    deltas = torch.stack([lost(raw, e).flatten() for e in range(12)])
    s.deletion_gram.copy_(deltas @ deltas.T)
    dropped: list[int] = []
    for _ in range(5):
        left = [e for e in range(12) if e not in dropped]
        dropped.append(min(left, key=lambda e: float(deltas[[*dropped, e]].sum(0).norm())))
    assert set(CRITERIA["leave_one_out_greedy"].function(s, 7).keep) == set(range(12)) - set(dropped)


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_diet_is_the_best_median_of_few_experts(layer: tuple[Tokens, LayerStatistics], kept: int) -> None:
    raw, sums = layer
    signature = torch.stack([lost(raw, e).sum(0) for e in EXPERTS])
    distance = (1 - cosine_similarity(signature[:, None], signature[None], dim=2)).numpy()
    best = min(_uncovered(distance, list(keep)) for keep in combinations(EXPERTS, kept))
    keep = list(CRITERIA["diet"].function(sums, kept).keep)
    assert len(keep) == kept
    assert _uncovered(distance, keep) == pytest.approx(best, rel=0.05)  # swaps may end in another local optimum


@pytest.mark.parametrize("name", ["stun", "hc_smoe_clusters", "hc_smoe_clusters_cosine"])
def test_one_expert_of_each_of_three_clear_clusters_stays(name: str) -> None:
    s = LayerStatistics.zeros(6, 3, tiers=("replay", "weights"))
    s.count.copy_(torch.tensor([5, 9, 3, 4, 7, 8]))
    s.tokens.fill_(18)
    rows = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2, 2]] + 0.01 * torch.arange(6)[:, None]
    rows[3] *= 1.02
    s.replay_tokens.fill_(1)
    s.output_sum.copy_(rows)
    s.router_gram.copy_(rows @ rows.T)
    keep = CRITERIA[name].function(s, 3).keep
    assert [e // 2 for e in keep] == [0, 1, 2]
    if name == "hc_smoe_clusters_cosine":
        assert keep == (1, 3, 5)  # the more used ones
    assert 2 in CRITERIA[name].function(s, 3, 1, (2,)).keep
    assert set(CRITERIA[name].function(s, 4, 1, (2, 3)).keep) > {2, 3}


def test_clusters_are_joined_by_their_mean_distance() -> None:
    rows = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    distance = torch.cdist(rows, rows).numpy()
    want = [[e] for e in range(12)]
    while len(want) > 4:
        a, b = min(combinations(want, 2), key=lambda pair: distance[pair[0]][:, pair[1]].mean())
        want = sorted([sorted(a + b), *(c for c in want if c not in (a, b))])
        assert average_linkage(distance, list(range(12)), len(want)) == want
    equal = 1 - torch.eye(5, dtype=torch.float64).numpy()
    assert average_linkage(equal, list(range(5)), 3) == [[0, 1, 2], [3], [4]]


def test_mean_outputs_of_one_direction_are_parted_by_their_length() -> None:
    """Two clusters along one line, each of three: Euclidean distance sees them, and the middle one is the centre."""
    s = LayerStatistics.zeros(6, 2, tiers=("replay",))
    s.count.copy_(torch.tensor([9, 1, 2, 3, 8, 4]))
    s.tokens.fill_(9)
    s.replay_tokens.fill_(4)
    s.output_sum.copy_(4 * torch.tensor([[1.0, 0], [1.2, 0], [1.5, 0], [7.0, 0], [7.5, 0], [8.1, 0]]))
    assert CRITERIA["hc_smoe_clusters"].function(s, 2).keep == (1, 4)
    nearest = score_layer(CRITERIA["hc_smoe"], s, "0")
    torch.testing.assert_close(nearest[1:4], torch.tensor([0.2, 0.5, 0.5], dtype=torch.float64))


def test_experts_without_a_signature_neither_need_cover_nor_give_it() -> None:
    """Of seven, 0 is idle, 1 was not drawn into the sample; 2, 3 and 4 lose alike, 5 and 6 each in its own way."""
    s = LayerStatistics.zeros(7, 3, tiers=("replay",))
    s.count.copy_(torch.tensor([0, 1, 5, 5, 5, 5, 5]))
    lost = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0.1, 0], [1, 0, 0.1], [0, 1, 0], [0, 0, 1]])
    s.deletion_sum.copy_(lost)
    diet = CRITERIA["diet"].function
    assert diet(s, 3).keep == (2, 5, 6)
    assert set(diet(s, 5).keep) == {2, 3, 4, 5, 6}
    assert set(diet(s, 6).keep) == {1, 2, 3, 4, 5, 6}  # before the idle one
    assert diet(s, 3, 1, (0,)).keep[0] == 0
    scores = diet(s, 3).scores
    assert scores.argsort()[:2].tolist() == [0, 1]


def test_the_best_expert_does_not_stand_apart_by_a_mark() -> None:
    """Its distance from the next is that between the others, so it takes no spread from them."""
    s = measured(tokens(0))
    for name in ("m_smoe", "hc_smoe", "ream"):
        scores = score_layer(CRITERIA[name], s, "0").sort().values
        steps = scores.diff()
        torch.testing.assert_close(steps[-1], steps[:-1].mean())
    s.logit_gram.fill_(1.0)
    assert score_layer(CRITERIA["m_smoe"], s, "0").unique().tolist() == [-1.0, 0.0]


def test_outputs_that_never_vary_have_no_spread_however_many() -> None:
    value = torch.tensor([0.1, 0.7, -0.3], dtype=torch.float64)
    s = LayerStatistics.zeros(2, 3)
    for e, times in enumerate((1, 1000)):
        for _ in range(times):
            s.count[e] += 1
            s.value_sum[e] += value
            s.square_sum[e] += value**2
    scores = score_layer(criterion_named("eae"), s, "0")
    assert scores[0] == scores[1] < -1000


def test_where_no_pair_is_left_the_lower_number_of_equally_used_experts_stays() -> None:
    s = replace(LayerStatistics.zeros(4), count=torch.tensor([2, 2, 2, 2]), coactivation=2 * torch.eye(4).long())
    assert score_layer(criterion_named("ecc"), s, "0").tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("name", ["stun", "hc_smoe_clusters"])
def test_of_two_equally_central_experts_the_lower_number_stays(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(8):
        rows = torch.randn(2, 5, generator=draw, dtype=torch.float64)
        s = replace(
            LayerStatistics.zeros(2, tiers=("replay",), hidden=5),
            count=torch.tensor([3, 9]),
            replay_tokens=torch.tensor([1]),
            output_sum=rows,
            router_gram=rows @ rows.T,
        )
        assert criterion_named(name).function(s, 1).keep == (0,)

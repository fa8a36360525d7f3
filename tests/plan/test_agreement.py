"""Whether text was enough, held against plain numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moekern.criteria import CRITERIA
from moekern.plan.agreement import ALL, Agreement, agreement, doubt, mean_of, rounded, thin
from moekern.plan.make import make_plan
from moekern.statistics.file import Statistics
from moekern.statistics.layer import HALVED
from tests.helpers.measured import E, header, layer_statistics, with_halves

DOMAINS = ("prose", "code")


def _statistics(tokens: int = 40, **changes: int) -> Statistics:
    def drawn(seed: int) -> object:
        return layer_statistics(seed, tokens=tokens)

    layers = {
        str(i): {d: with_halves(drawn(10 * i + j), drawn(100 + 10 * i + j)) for j, d in enumerate(DOMAINS)}
        for i in range(3)
    }
    return Statistics(header(DOMAINS, tokens=dict.fromkeys(DOMAINS, 2 * tokens), **changes), layers)


def _top(scores: np.ndarray, kept: int, groups: int) -> set[int]:
    size = len(scores) // groups
    return {
        int(g * size + e)
        for g in range(groups)
        for e in np.argsort(-scores[g * size : (g + 1) * size], kind="stable")[: kept // groups]
    }


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("domain", [ALL, *DOMAINS])
def test_agreement_is_that_of_the_halves(domain: str, groups: int) -> None:
    router = {"n_group": groups, "topk_group": groups}
    statistics = _statistics(**router)
    found = agreement(statistics, "gated_norm", 4)
    for i in range(3):
        which = range(2) if domain == ALL else [DOMAINS.index(domain)]
        a, b = (sum(layer_statistics(n + 10 * i + j).gated_norm_sum for j in which).numpy() for n in (0, 100))
        x, y = _top(a, 4, groups), _top(b, 4, groups)
        layer = found[domain][str(i)]
        assert layer.kept == len(x & y) / len(x | y)
        assert layer.differ == len(x ^ y) / E
        ra, rb = (np.argsort(np.argsort(v)).astype(float) for v in (a, b))
        assert layer.rank == pytest.approx(np.corrcoef(ra, rb)[0, 1])


def test_undecided_experts_are_those_within_an_error_of_the_cut() -> None:
    statistics = _statistics()
    found = agreement(statistics, "gated_norm", 3)[ALL]
    for key, layer in found.items():
        s = statistics.layer(key)
        score, T = s.gated_norm_sum.numpy(), int(s.tokens)
        error = np.sqrt(s.gated_norm_square_sum.numpy() - score**2 / T)
        order = np.sort(score)[::-1]
        assert layer.undecided == np.mean(np.abs(score - (order[2] + order[3]) / 2) < error)
    assert all(layer.undecided == 0 for layer in agreement(statistics, "reap", E)[ALL].values())


def test_one_domain_stands_for_all() -> None:
    found = agreement(_statistics(), "reap", 0.5, domains=["code"])
    assert list(found) == [ALL]
    assert found[ALL] == agreement(_statistics(), "reap", 0.5)["code"]


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_a_criterion_is_judged_by_halves_or_not_known(name: str) -> None:
    """Never an error, and nothing but what its halves would choose."""
    found = agreement(_statistics(), name, 4)[ALL]["0"]
    by_halves = {"usage", "gate_mass", "ean", "reap", "man", "msan", "gated_norm", "gated_square"}
    assert (found.kept is not None) == (name in by_halves)


def test_files_without_halves_leave_errors() -> None:
    whole = _statistics()
    old = {
        key: {d: replace(s, **{f"half_{n}": getattr(s, f"half_{n}")[:0] for n in HALVED}) for d, s in parts.items()}
        for key, parts in whole.layers.items()
    }
    found = agreement(Statistics(whole.header, old), "reap", 4)[ALL]
    assert all(layer.kept is None and layer.rank is None for layer in found.values())
    assert {k: layer.undecided for k, layer in found.items()} == {
        k: layer.undecided for k, layer in agreement(whole, "reap", 4)[ALL].items()
    }


def test_the_warning_says_how_many_tokens_would_do() -> None:
    far = {"0": Agreement(0.5, 0.9, 0.2, 0.1), "1": Agreement(0.7, 0.9, 0.1, None)}
    assert mean_of(far) == Agreement(0.6, 0.9, pytest.approx(0.15), 0.1)
    said = thin(far, "reap", 1000)
    assert said is not None
    assert "of 1000 tokens, two halves of it disagree about 15% of the experts, and 10% have" in said
    assert "about 9k tokens" in said  # 0.15 is three times too much
    assert thin({"0": Agreement(0.98, 0.9, 0.05, 0.04)}, "reap", 1000) is None
    assert thin({"0": Agreement(None, None, None, None)}, "hope", 1000) is None


def test_numbers_are_told_to_two_digits() -> None:
    found = [rounded(n) for n in (0, 7, 96.4, 101, 4711, 99_900, 2_345_678, 4e9)]
    assert found == ["0", "7", "96", "100", "4.7k", "100k", "2.3M", "4G"]


def test_a_plan_of_little_text_is_doubted_and_one_of_much_is_not() -> None:
    little, much = _statistics(8), _statistics(400)
    plans = [make_plan(s, "gated_norm", 4) for s in (little, much)]
    assert "of 32 tokens" in (doubt(little, plans[0]) or "")
    assert doubt(much, plans[1]) is None
    assert doubt(little, make_plan(little, "random", 4)) is None
    apart = make_plan(little, "gated_norm", 4, domains=["code"])
    assert "of 16 tokens" in (doubt(little, apart) or "")


def test_more_text_leaves_fewer_experts_undecided() -> None:
    shares = [mean_of(agreement(_statistics(n), "gated_norm", 4)[ALL]).undecided or 0 for n in (8, 400)]
    assert shares[1] < shares[0]

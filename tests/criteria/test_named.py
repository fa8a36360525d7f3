"""What may stand after --criterion beside a name: hts(...), combinations and plug-ins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moekern.criteria import CRITERIA, criterion_named, score_layer
from moekern.criteria.combine import zscores
from moekern.errors import InputError
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import layer_statistics, with_tiers

MEMBERS = {
    "hts(0,0,0)": "usage", "hts(0,1,0)": "gate_mass", "hts(0,0,1)": "ean", "hts(1,1,1)": "reap", "hts(1,0,1)": "man",
    "hts(1,0,2)": "msan", "hts(0,1,1)": "gated_norm", "hts(0,2,2)": "gated_square", "hts(1,2,2)": "hope",
}  # fmt: skip


@pytest.mark.parametrize(("text", "name"), MEMBERS.items())
def test_named_members_are_members_of_the_family(text: str, name: str) -> None:
    s = layer_statistics(1)
    a, b = (score_layer(criterion_named(c), s, "0") for c in (text, name))
    assert torch.equal(a.argsort(), b.argsort())
    if name != "usage":
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)


def test_half_an_exponent_lies_between() -> None:
    s = layer_statistics(1)
    got = score_layer(criterion_named("hts(0.5, 1, 1)"), s, "0")
    torch.testing.assert_close(got, s.gated_norm_sum / s.count.double().sqrt(), rtol=1e-15, atol=0)


def test_sums_of_ranks_and_z_scores() -> None:
    s = layer_statistics(2)
    reap, usage = (score_layer(criterion_named(c), s, "0") for c in ("reap", "usage"))
    places = torch.tensor([float((x > reap).sum()) for x in reap], dtype=torch.float64)
    low = torch.tensor([(float((usage < u).sum()) + float((usage <= u).sum()) - 1) / 2 for u in usage])
    got = score_layer(criterion_named("rank(reap*2, usage)"), s, "0")
    torch.testing.assert_close(got, 2 * places + low.double(), rtol=0, atol=1e-12)
    z = [(x - x.mean()) / x.std(correction=0) for x in (reap, usage)]
    torch.testing.assert_close(score_layer(criterion_named("zscore(reap,usage*0.5)"), s, "0"), z[0] + z[1] / 2)
    nested = score_layer(criterion_named("rank(rank(reap), hts(1,1,1))"), s, "0")
    torch.testing.assert_close(nested, 2 * places, rtol=0, atol=1e-12)


def test_equal_scores_have_z_scores_of_zero() -> None:
    assert zscores(torch.full((3,), 0.1, dtype=torch.float64)).tolist() == [0, 0, 0]  # whose mean is not 0.1


def best(s: LayerStatistics, name: str, n: int) -> set[int]:
    return set(score_layer(criterion_named(name), s, "0").argsort(descending=True)[:n].tolist())


def test_a_union_holds_the_best_of_each_and_an_intersection_what_all_rank_high() -> None:
    s = with_tiers(layer_statistics(4, experts=12, tokens=300))
    keep = criterion_named("union(reap*2, rwn)").function(s, 6).keep
    assert len(keep) == 6
    assert best(s, "reap", 4) | best(s, "rwn", 2) <= set(keep)
    both = criterion_named("intersection(reap, rwn)").function(s, 4).keep
    n = next(n for n in range(13) if len(best(s, "reap", n) & best(s, "rwn", n)) >= 4)
    assert best(s, "reap", n - 1) & best(s, "rwn", n - 1) <= set(both) <= best(s, "reap", n) & best(s, "rwn", n)


def test_an_intersection_goes_by_the_worst_rank_and_only_then_by_the_sum() -> None:
    s = replace(
        LayerStatistics.zeros(12),
        count=torch.tensor([2, 12, 1, *range(3, 12)]),  # the first is behind by 10 and 9, the next by 0 and 10
        gate_sum=torch.tensor([3.0, 2, 1, *range(4, 13)]).double(),
    )
    pairs = zip(s.count.tolist(), s.gate_sum.tolist(), strict=True)
    behind = {e: (12 - c, 1.02 * (12 - g)) for e, (c, g) in enumerate(pairs)}
    order = sorted(behind, key=lambda e: (max(behind[e]), sum(behind[e])))
    for kept in range(1, 12):
        chosen = criterion_named("intersection(usage, gate_mass*1.02)").function(s, kept).keep
        assert chosen == tuple(sorted(order[:kept]))


@pytest.mark.parametrize("name", ["worst_domain", "round_robin"])
def test_a_domain_of_equal_scores_gets_no_more_than_its_turn(name: str) -> None:
    s = layer_statistics(0, experts=8, tokens=60)
    speaks = replace(s, gate_gradient_sum=-torch.arange(8.0).double())
    silent = replace(s, gate_gradient_sum=torch.full((8,), 0.5).double())  # gate_taylor: equal, below 0
    keep = criterion_named(f"{name}(gate_taylor)").function({"a": silent, "b": speaks}, 4).keep
    assert {6, 7} <= set(keep)


@pytest.mark.parametrize(
    "name", ["union(reap,usage)", "intersection(reap,usage)", "worst_domain(reap)", "round_robin(reap)"]
)
def test_groups_protection_and_counts_are_respected(name: str) -> None:
    criterion = criterion_named(name)
    s = layer_statistics(5, experts=12, tokens=300)
    source = {"a": s, "b": layer_statistics(6, experts=12, tokens=300)} if criterion.kind == "domains" else s
    worst = int(score_layer(criterion_named("reap"), s, "0").argmin())
    keep = criterion.function(source, 8, 4, (worst,)).keep
    assert worst in keep
    assert keep == tuple(sorted(set(keep)))
    assert [sum(e // 3 == g for e in keep) for g in range(4)] == [2, 2, 2, 2]
    assert criterion.function(source, 12).keep == tuple(range(12))


def two_domains() -> dict[str, LayerStatistics]:
    """Prose lives in experts 0 and 1, code in 2 and 3; 4 and 5 are in between, and prose is louder."""
    prose, code = LayerStatistics.zeros(6), LayerStatistics.zeros(6)
    for sums, mass in ((prose, [800.0, 700, 10, 10, 300, 200]), (code, [1.0, 1, 9, 8, 3, 2])):
        sums.count.fill_(1)
        sums.tokens.fill_(6)
        sums.gated_norm_sum.copy_(torch.tensor(mass))
    return {"prose": prose, "code": code}


@pytest.mark.parametrize(
    "name", ["zscore({}, usage)", "rank({}, usage)", "zscore({}, rwn)", "rank(rwn, {})", "zscore(zscore({}), usage)"]
)
@pytest.mark.parametrize("part", ["reap", "eae", "gate_taylor", "m_smoe"])
def test_idle_experts_change_nothing_between_the_others(name: str, part: str) -> None:
    """A layer with three more experts that no token chose: the same scores for the others, and those below."""
    criterion, used = criterion_named(name.format(part)), torch.arange(6)
    more = with_tiers(layer_statistics(2, experts=9, idle=(6, 7, 8)))
    for width in (6, 9):  # 6 to 8 are like nobody
        more.logit_gram[width - 3 :, : width - 3] = more.logit_gram[: width - 3, width - 3 :] = 0
    fewer = LayerStatistics(**{name: _first(value, 9, 6) for name, value in more.tensors().items()})
    got, want = score_layer(criterion, more, "0"), score_layer(criterion, fewer, "0")
    torch.testing.assert_close(got[used], want, rtol=1e-12, atol=1e-12)
    assert got[6:].max() < got[used].min()


def _first(value: torch.Tensor, E: int, n: int) -> torch.Tensor:
    for axis, size in enumerate(value.shape):
        if size == E:
            value = value.narrow(axis, 0, n)
    return value


def test_a_small_spread_is_not_lost_beside_an_idle_expert() -> None:
    s = layer_statistics(2, idle=(4,))
    for name in ("norm_sum", "gated_norm_sum"):
        getattr(s, name).mul_(1e-3)
    z = score_layer(criterion_named("zscore(reap)"), s, "0")[s.count > 0]
    torch.testing.assert_close(z.std(correction=0), torch.ones((), dtype=torch.float64))


SELECTORS = [name for name, row in CRITERIA.items() if row.kind == "selector"] + [
    "union(reap, rwn)", "intersection(rwn, usage)", "worst_domain(gate_taylor)", "round_robin(gate_taylor)",
    "union(ewn*5, usage)", "intersection(zscore(rwn, ewn), usage)",
]  # fmt: skip


@pytest.mark.parametrize("experts", [8, 16])
@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_drop_idle_experts_first(name: str, experts: int) -> None:
    """Within a group and whatever their numbers say; a protected one stays."""
    idle = (0, 1, experts - 1)
    s, criterion = with_tiers(layer_statistics(7, experts=experts, idle=idle, tokens=80), 3), criterion_named(name)
    source = {"a": s, "b": s} if criterion.kind == "domains" else s
    assert not set(idle) & set(criterion.function(source, experts - 4).keep)
    assert not set(idle) & set(criterion.function(source, experts // 2, 2).keep)
    kept = criterion.function(source, experts - 2).keep
    assert len(set(idle) & set(kept)) == 1
    assert set(idle) & set(criterion.function(source, experts // 2, 1, (1,)).keep) == {1}


def test_the_other_end_of_a_criterion() -> None:
    s = with_tiers(layer_statistics(7, idle=(2,)))
    used = s.count > 0
    for name in ("usage", "egn", "eas", "hts(0.5,1,1)", "zscore(reap, usage)"):
        plain, other = (score_layer(criterion_named(form.format(name)), s, "0") for form in ("{}", "inverse({})"))
        assert torch.equal(other[used], -plain[used])
        assert other.argmin() == plain.argmin() == 2
    weights = criterion_named("inverse(wsr)")
    assert weights.family == "weight"
    assert torch.equal(score_layer(weights, s, "0"), -score_layer(criterion_named("wsr"), s, "0"))
    assert best(s, "rank(inverse(usage), inverse(usage))", 2) == best(s, "inverse(usage)", 2)


def test_the_worst_domain_is_served_first() -> None:
    domains = two_domains()
    assert best(domains["prose"] + domains["code"], "gated_norm", 4) == {0, 1, 4, 5}
    for name in ("worst_domain(gated_norm)", "round_robin(gated_norm)"):
        assert criterion_named(name).function(domains, 4).keep == (0, 1, 2, 3)
    assert criterion_named("worst_domain(gated_norm)").function(domains, 1).keep == (0,)


def test_scores_are_shifted_up_and_never_down() -> None:
    """No expert is idle and the least score is far above 0: a place goes by the share of what it really is."""
    domains = {name: LayerStatistics.zeros(4) for name in "ab"}
    for sums, mass in zip(domains.values(), ([10.0, 11, 12, 19], [3.0, 40, 5, 4]), strict=True):
        sums.count.fill_(1)
        sums.gated_norm_sum.copy_(torch.tensor(mass))
    worst = criterion_named("worst_domain(gated_norm)").function
    assert worst(domains, 2).keep == (1, 3)
    for kept in (2, 3):
        scores = worst(domains, kept).scores
        torch.testing.assert_close(scores, torch.tensor([3 / 52, 11 / 52, 5 / 52, 4 / 52], dtype=torch.float64))
    domains["b"].gated_norm_sum.copy_(torch.tensor([30.0, 31, 32, 7]))
    shares = torch.stack([s.gated_norm_sum / s.gated_norm_sum.sum() for s in domains.values()])
    chosen: list[int] = []
    while len(chosen) < 3:
        row = shares[int(shares[:, chosen].sum(1).argmin())].clone()
        row[chosen] = -1
        chosen.append(int(row.argmax()))
        assert worst(domains, len(chosen)).keep == tuple(sorted(chosen))


def test_the_least_share_is_never_less_than_by_the_sum_of_domains() -> None:
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        domains = {name: LayerStatistics.zeros(10) for name in "abc"}
        for sums in domains.values():
            sums.count.fill_(1)
            sums.gated_norm_sum.copy_(torch.rand(10, generator=draw, dtype=torch.float64) ** 4)
        keep = criterion_named("worst_domain(gated_norm)").function(domains, 5).keep

        def least(kept: set[int] | tuple[int, ...], domains: dict[str, LayerStatistics] = domains) -> float:
            return min(float(s.gated_norm_sum[list(kept)].sum() / s.gated_norm_sum.sum()) for s in domains.values())

        total = domains["a"] + domains["b"] + domains["c"]
        assert least(keep) >= 0.9 * least(best(total, "gated_norm", 5))


PLUG_IN = '''
"""A criterion of one's own."""


def loudest(statistics):
    """Largest output entry."""
    return statistics.max_abs


def wrong(statistics):
    return statistics.max_abs[1:]
'''


def test_a_plug_in_names_the_tiers_it_needs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(s):\n    return s.value_sum.sum(1)\n\n\nscore.tiers = ('dimensions',)\n"
    )
    assert criterion_named(f"{tmp_path}/mine.py:score").tiers == ("dimensions",)
    assert set(criterion_named(f"rank(reap, evtc, {tmp_path}/mine.py:score)").tiers) == {"vocabulary", "dimensions"}


def test_a_plug_in_is_one_function_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(PLUG_IN)
    criterion = criterion_named(f"{tmp_path}/my.py:loudest")
    s = layer_statistics(0)
    assert torch.equal(score_layer(criterion, s, "0"), s.max_abs)
    assert criterion.meaning == "Largest output entry."
    assert score_layer(criterion_named(f"rank({tmp_path}/my.py:loudest, reap)"), s, "0").isfinite().all()
    with pytest.raises(InputError, match=r"expected a tensor of 6 finite scores, got \[5\]"):
        score_layer(criterion_named(f"{tmp_path}/my.py:wrong"), s, "0")
    (tmp_path / "broken.py").write_text("def f(:\n")
    for name in ("my.py:absent", "gone.py:loudest", "broken.py:f"):
        with pytest.raises(InputError, match=f"--criterion .*{name}: "):
            criterion_named(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hts(1,1)", "expected three numbers"),
        ("hts(1,3,1)", r"\(alpha, beta\) must be one of \(0,0\), \(1,0\)"),
        ("rank()", "expected criteria between the parentheses"),
        ("rank(reap*x)", "'x' is no weight"),
        ("rank(reap*-1)", "weights must be positive"),
        ("rank(reap*1e308, usage)", r"weights must be positive, from 1e-09 to 1e\+09"),
        ("inverse(reap*1e-320)", r"weights must be positive, from 1e-09 to 1e\+09"),
        ("hts(nan,1,1)", "b must be finite"),
        ("hts(1000,1,1)", "b must be finite, from -16 to 16"),
        ("hts(-1000,1,1)", "b must be finite, from -16 to 16"),
        ("inverse( inverse(ecc) )", "the inverse of an inverse is the criterion itself"),
        ("rank(" * 400 + "reap" + ")" * 400, "more than 64 combinations"),
        ("rank(best)", "--criterion best: unknown"),
        ("rank(random)", "random cannot be part of a combination"),
        ("union(worst_domain(reap), usage)", "cannot be part of a combination"),
        ("worst_domain(reap, usage)", "takes one criterion"),
        ("inverse(reap, usage)", "inverse takes one criterion"),
        ("inverse(hope)", "hope chooses a set as a whole, which has no other end"),
        ("inverse(union(reap, usage))", "chooses a set as a whole"),
        ("inverse(random)", "random cannot be part of a combination"),
        ("no.such.module:f", "No module named"),
        ("", "unknown"),
    ],
)
def test_what_cannot_be_understood_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        criterion_named(text)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("return s.count.double() * 1j", "expected a dense tensor of numbers, got torch.complex128"),
        ("return s.count.to('meta')", "expected a dense tensor of numbers, got torch.int64 torch.strided on meta"),
        ("return s.count.double().to_sparse()", "expected a dense tensor of numbers, got .* torch.sparse_coo"),
        ("return s.count > 0", "expected a dense tensor of numbers, got torch.bool"),
        ("return s.count[1:]", r"finite scores, got \[5\]"),
        ("return s.count[None]", r"finite scores, got \[1, 6\]"),
        ("return s.count.tolist()", "finite scores, got list"),
        ("return s.gate_sum / 0", "got one that is not finite"),
        ("return 1 / 0", "ZeroDivisionError in score, line 2: division by zero"),
        ("return s.counts", "AttributeError in score, line 2: .*no attribute 'counts'"),
        ("raise SystemExit(0)", "SystemExit in score, line 2: 0"),
    ],
)
def test_what_a_plug_in_may_not_give(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"def score(s):\n    {code}\n")
    own = criterion_named(f"{tmp_path / 'own.py'}:score")
    with pytest.raises(InputError, match=f"--criterion .*own.py:score: .*{message}"):
        own.function(layer_statistics(0))


def test_what_a_plug_in_may_give(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(s):\n    return s.count.float().requires_grad_() * 2\n")
    found = criterion_named(f"{tmp_path / 'own.py'}:score").function(layer_statistics(0))
    assert found.dtype == torch.float64
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import no_such_module", "ModuleNotFoundError: No module named"),
        ("1 / 0", "ZeroDivisionError"),
        ("def score(s", "SyntaxError"),
        ("score = 5", "score is no function"),
        ("def score(s): ...\nscore.tiers = 5", "its tiers are 5, expected some of dimensions"),
        ("def score(s): ...\nscore.tiers = ['no']", "its tiers are .'no'., expected some of dimensions"),
    ],
)
def test_a_plug_in_that_is_none(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(InputError, match=f"--criterion .*own.py:score: .*{message}"):
        criterion_named(f"{tmp_path / 'own.py'}:score")

"""Whether the text was enough: whether its two halves choose alike, and how many experts stand close to the cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10
from statistics import fmean

import torch
from torch import Tensor

from moekern.criteria import Criterion, criterion_named, score_layer
from moekern.criteria.combine import ranks
from moekern.criteria.errors import standard_errors
from moekern.errors import InputError
from moekern.plan.choose import choose_top
from moekern.plan.document import Plan
from moekern.plan.fits_model import whole_router
from moekern.router import Router, kept_count
from moekern.statistics.file import Statistics
from moekern.statistics.halves import Half, NotKept, halves_of
from moekern.statistics.header import router_of
from moekern.statistics.layer import HALVED, HALVES, LayerStatistics

ALL = "all"  # the domains together, also where one is named so
MANY = 0.05  # of the experts


@dataclass(frozen=True)
class Agreement:
    """One layer, or the mean of several, on one domain's text, or that of all. None: not known.

    `kept` is the Jaccard index of the sets that the two halves of the text keep, `rank` the rank correlation of their
    scores (Spearman), `differ` the share of experts that one half keeps and the other drops. `undecided` is the share
    whose score, on the whole text, is within its standard error of the cut.
    """

    kept: float | None
    rank: float | None
    differ: float | None
    undecided: float | None


def agreement(
    statistics: Statistics,
    criterion: str | Criterion,
    keep: float | int | Mapping[str, int],
    domains: Sequence[str] | None = None,
) -> dict[str, dict[str, Agreement]]:
    """Domain -> layer key -> how far its text decides what is kept; ALL stands for the domains together. See
    `agreement_of_all`."""
    chosen = criterion_named(criterion) if isinstance(criterion, str) else criterion
    whole = {ALL: agreement_of_all(statistics, chosen, keep, domains)}
    names = [name for name in statistics.domains if domains is None or name in domains]
    each = {name: agreement_of_all(statistics, chosen, keep, [name]) for name in names} if len(names) > 1 else {}
    return each | whole


def agreement_of_all(
    statistics: Statistics,
    criterion: str | Criterion,
    keep: float | int | Mapping[str, int],
    domains: Sequence[str] | None = None,
    *,
    replaced: bool = False,
) -> dict[str, Agreement]:
    """Layer key -> how far the text of the domains together decides what is kept.

    `keep` is a share or a count, as `make_plan` takes it, or each layer's count; `replaced` of a router that stays
    whole. Guards and protection play no part. Halves know what has a number an expert in the routed tier; of criteria
    that need more, and of older files, nothing is known. One layer is read at a time. Raises InputError as `make_plan`
    does.
    """
    chosen = criterion_named(criterion) if isinstance(criterion, str) else criterion
    router, found = router_of(statistics.header), dict[str, Agreement]()
    tiers = (*(tier for tier in chosen.tiers if tier == "weights"), HALVES)
    for key in statistics.layers:
        each = router.of(statistics.num_experts(key))
        each = whole_router(each) if replaced else each
        count = keep[key] if isinstance(keep, Mapping) else kept_count(keep, each)
        found[key] = _agreement(chosen, statistics.layer(key, domains, tiers), key, count, each)
    return found


def doubt(statistics: Statistics, plan: Plan) -> str | None:
    """The warning of `thin` about a plan that was made of these statistics."""
    made = plan.provenance
    chosen = criterion_named(made["criterion"])
    if _of_no_text(chosen):
        return None
    counts = {key: len(layer.keep) for key, layer in plan.layers.items()}
    found = agreement_of_all(statistics, chosen, counts, domains=made["domains"], replaced=plan.replace is not None)
    return thin(found, chosen.name, sum(statistics.header["tokens"][name] for name in made["domains"]))


def known_by_halves(criterion: str | Criterion) -> bool:
    """Whether halves of the text hold what a criterion looks at. Raises InputError for one that nobody knows."""
    chosen = criterion_named(criterion) if isinstance(criterion, str) else criterion
    blank = LayerStatistics.zeros(4, tiers=(HALVES, "weights"))
    for name in HALVED:
        getattr(blank, f"half_{name}").fill_(1)
    return not _of_no_text(chosen) and bool(_by_halves(chosen, blank, "0", 2, 1))


def mean_of(layers: Mapping[str, Agreement]) -> Agreement:
    """The mean over layers, of each number over those where it is known."""

    def mean(name: str) -> float | None:
        known = [value for layer in layers.values() if (value := getattr(layer, name)) is not None]
        return fmean(known) if known else None

    return Agreement(*map(mean, ("kept", "rank", "differ", "undecided")))


def thin(layers: Mapping[str, Agreement], criterion: str, tokens: int) -> str | None:
    """The warning that too little text decides what is kept, and how much would do; None where it was enough, or where
    that is not known. `tokens` were measured."""
    mean = mean_of(layers)
    shares = [share for share in (mean.differ, mean.undecided) if share is not None]
    if not shares or max(shares) <= MANY:
        return None
    reasons = []
    if mean.differ is not None:
        reasons.append(f"two halves of it disagree about {mean.differ:.0%} of the experts")
    if mean.undecided is not None:
        reasons.append(f"{mean.undecided:.0%} have a score within its standard error of the cut")
    enough = rounded(tokens * (max(shares) / MANY) ** 2)
    return (
        f"warning: little text decides what {criterion} keeps: of {tokens} tokens, {', and '.join(reasons)}; about "
        f"{enough} tokens would bring that to {MANY:.0%} (roughly: errors fall with the root of the number)"
    )


def rounded(count: float) -> str:
    """A number to two digits, as --tokens takes it: 47k, 2.3M."""
    size = 10 ** max(0, floor(log10(max(count, 1))) - 1)
    whole = round(count / size) * size
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if whole >= unit:
            return f"{whole / unit:g}{letter}"
    return f"{whole}"


def _of_no_text(criterion: Criterion) -> bool:
    return criterion.kind == "seeded" or criterion.family == "weight"


def _agreement(criterion: Criterion, sums: LayerStatistics, key: str, count: int, router: Router) -> Agreement:
    if _of_no_text(criterion):
        return Agreement(None, None, None, None)
    E, groups = router.num_experts, router.n_group
    undecided = _undecided(criterion, sums, key, count, groups)
    chosen = _by_halves(criterion, sums, key, count, groups)
    if not chosen:
        return Agreement(None, None, None, undecided)
    (a, first), (b, second) = chosen
    return Agreement(len(a & b) / len(a | b), rank_correlation(first, second), len(a ^ b) / E, undecided)


def _by_halves(
    criterion: Criterion, sums: LayerStatistics, key: str, count: int, groups: int
) -> list[tuple[frozenset[int], Tensor]]:
    """What each half keeps, and its scores; nothing where that is not known."""
    try:
        return [_chosen(criterion, half, key, count, groups) for half in halves_of(sums) or ()]
    except (NotKept, InputError):  # it looks at what is not kept by halves
        return []


def _chosen(criterion: Criterion, half: Half, key: str, count: int, groups: int) -> tuple[frozenset[int], Tensor]:
    """What one half keeps, and its scores [E]."""
    if criterion.kind == "domains":
        raise NotKept("domains")
    if criterion.kind == "score":
        scores = score_layer(criterion, half, key)
        return frozenset(choose_top(scores.tolist(), count, groups=groups)), scores
    selection = criterion.function(half, count, groups, ())
    return frozenset(selection.keep), selection.scores


def _undecided(criterion: Criterion, sums: LayerStatistics, key: str, count: int, groups: int) -> float | None:
    """The share of experts within their standard error of halfway between the last that is kept and the next."""
    errors = standard_errors(criterion, sums)
    if errors is None or not sums.tokens.any():
        return None
    if count == sums.num_experts:
        return 0.0
    scores = score_layer(criterion, sums, key).view(groups, -1).sort(dim=1, descending=True)
    quota = count // groups
    cut = scores.values[:, quota - 1 : quota + 1].mean(1, keepdim=True)
    near = (scores.values - cut).abs() < errors.view(groups, -1).gather(1, scores.indices)
    return float(near.double().mean())


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's, equal scores sharing their ranks; None where one side's are all equal."""
    pair = torch.stack([ranks(a), ranks(b)])
    value = float(torch.corrcoef(pair)[0, 1]) if (pair.amax(1) > pair.amin(1)).all() else float("nan")
    return value if isfinite(value) else None

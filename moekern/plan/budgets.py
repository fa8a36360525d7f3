"""How many experts each layer keeps: pure functions from numbers per expert to a count per layer.

Every budget is one rule: each layer starts from the fewest experts it may keep, and further experts, `step` at a time,
go where they gain most. What differs is the gain.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moekern.errors import InputError
from moekern.router import Router, check_keep, count_problem, kept_count

KINDS = ("uniform", "global", "adaptive", "waterfill", "relative")
RELATIVE_TIER = "stream"  # of statistics, which `relative` reads
NORMALISATIONS = ("none", "sum", "max", "mean", "zscore")
ADAPTIVE = ("usage", "entropy")

Values = Mapping[str, Sequence[float]]  # layer key -> one number an expert


@dataclass(frozen=True, slots=True)
class Budget:
    """What a person asks for.

    uniform: the same count in every layer. global: all experts of all layers ranked together by their scores, each
    layer's normalised by `normalise` (SEER-MoE, arXiv:2404.05089, ranks them as they are, "none"). adaptive: see
    `adaptive_usage` and `adaptive_entropy`, chosen by `by`. waterfill: the least dropped share of the scores. relative:
    as global, each layer's scores divided by the energy of the residual stream that enters it (mean ‖h‖² of a token),
    so that scores that are squares of what an expert adds say how much of the stream that is.
    `floor` is the least a layer keeps, a share or a count; counts are multiples of `multiple_of`.
    """

    kind: str = "uniform"
    floor: float | int | None = None
    normalise: str = "none"
    by: str = "usage"
    multiple_of: int = 1
    allow_nonuniform: bool = False

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--budget", self.kind, KINDS),
            ("--normalise", self.normalise, NORMALISATIONS),
            ("--adaptive-by", self.by, ADAPTIVE),
        ):
            if value not in known:
                raise InputError(f"{flag} {value}: expected one of {', '.join(known)}")
        if self.normalise != "none" and self.kind != "global":
            raise InputError(f"--normalise {self.normalise}: goes with --budget global, not with {self.kind}")
        if self.by != "usage" and self.kind != "adaptive":
            raise InputError(f"--adaptive-by {self.by}: goes with --budget adaptive, not with {self.kind}")
        if self.floor is not None:
            check_keep(self.floor, "--floor")
            if self.kind == "uniform":
                raise InputError(f"--floor {self.floor}: goes with the budgets other than uniform")
        if self.multiple_of < 1:
            raise InputError(f"--multiple-of {self.multiple_of}: expected a count from 1")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one layer may keep: lowest, lowest + step, and so on up to highest."""

    lowest: int
    highest: int
    step: int

    def steps(self) -> range:
        """The counts above the lowest."""
        return range(self.lowest + self.step, self.highest + 1, self.step)


def bounds_of(router: Router, *, floor: float | int = 1, multiple_of: int = 1, where: str = "plan") -> Bounds:
    """The counts from `floor` (a share or a count) on that the router can work with and that `multiple_of` divides.

    A multiple that is legal leaves all larger ones legal. Raises InputError when there is none.
    """
    step, experts = math.lcm(router.n_group, multiple_of), router.num_experts
    least = math.ceil(floor * experts - 1e-9) if isinstance(floor, float) else floor
    legal = [n for n in range(step, experts + 1, step) if n >= least and count_problem(n, router) is None]
    if not legal:
        raise InputError(
            f"{where}: none of its counts is a multiple of {step}, at least {max(least, router.top_k)} and at most its "
            f"{experts} experts; lower --floor or --multiple-of"
        )
    return Bounds(legal[0], legal[-1], step)


def uniform_count(keep: float | int, router: Router, multiple_of: int = 1) -> int:
    """kept_count, and from there down to a multiple of `multiple_of` that the router can work with."""
    count = kept_count(keep, router)
    allowed = bounds_of(router, multiple_of=multiple_of, where=f"--multiple-of {multiple_of}")
    if count < allowed.lowest:
        raise InputError(
            f"--keep {keep} is {count} experts; with --multiple-of {multiple_of} the least is {allowed.lowest}"
        )
    return min(allowed.highest, count - count % allowed.step)


def total_of(keep: float | int, sizes: Mapping[str, int]) -> int:
    """Experts to keep in all layers together: a share of all, rounded down, or a count times the layers."""
    check_keep(keep)
    if isinstance(keep, int):
        return keep * len(sizes)
    return math.floor(keep * sum(sizes.values()) + 1e-9)  # 1e-9 undoes the error of a decimal share


def fill(gains: Values, bounds: Mapping[str, Bounds], total: int) -> dict[str, int]:
    """Counts within `bounds`, `total` in all or as near below as steps allow, whose steps gain most.

    gains[layer][i] is what the layer's step i above its lowest count is worth; it may not rise with i, so that the best
    steps are the first of their layers and the choice is exact. Ties go to the earlier layer. All steps have one size.
    """
    spare = total - sum(b.lowest for b in bounds.values())
    if spare < 0:
        raise InputError(
            f"--keep: {total} experts in all, but the layers' lowest counts (top_k, groups, --floor, --multiple-of and "
            f"protected experts) come to {total - spare}; keep more or lower the floor"
        )
    counts = {key: b.lowest for key, b in bounds.items()}
    step = next(iter(bounds.values())).step
    ranked = sorted((-gain, n, i, key) for n, (key, row) in enumerate(gains.items()) for i, gain in enumerate(row))
    for _, _, _, key in ranked[: spare // step]:
        counts[key] += step
    return counts


def global_counts(
    scores: Values,
    bounds: Mapping[str, Bounds],
    total: int,
    *,
    normalise: str = "none",
    groups: int = 1,
    protected: Mapping[str, Collection[int]] = {},
    idle: Mapping[str, Collection[int]] = {},
) -> dict[str, int]:
    """The counts that keep the largest sum of normalised scores, when each layer keeps its best of each group.

    `protected` experts are kept whatever their score; `bounds` must leave room for them. `idle` ones are worth no more
    than the lowest of the others, and do not count where a layer's scores are normalised.
    """
    gains = {
        key: step_gains(normalised(row, normalise, key, idle.get(key, ())), bounds[key], groups, protected.get(key, ()))
        for key, row in scores.items()
    }
    return fill(gains, bounds, total)


def waterfill(
    saliency: Values,
    bounds: Mapping[str, Bounds],
    total: int,
    *,
    groups: int = 1,
    protected: Mapping[str, Collection[int]] = {},
    idle: Mapping[str, Collection[int]] = {},
) -> dict[str, int]:
    """The counts for which the dropped shares of the layers' saliency add up to the least.

    A share is of its layer's sum; what is below 0 counts as 0. A layer's dropped share falls by ever smaller steps as
    its count rises, so dropping the smallest shares first is exact. Raises InputError for a layer with scores below 0
    and none above, which has no shares.
    """
    for key, row in saliency.items():
        used = [value for e, value in enumerate(row) if e not in idle.get(key, ())]
        if max(used, default=0.0) <= 0 and min(used, default=0.0) < 0:
            raise InputError(
                f"--budget waterfill: layer {key} has no scores above 0, so no shares; use --budget global with "
                "--normalise zscore"
            )
    positive = {key: [max(value, 0.0) for value in row] for key, row in saliency.items()}
    return global_counts(positive, bounds, total, normalise="sum", groups=groups, protected=protected, idle=idle)


def adaptive_usage(
    counts: Values,
    bounds: Mapping[str, Bounds],
    total: int,
    *,
    groups: int = 1,
    protected: Mapping[str, Collection[int]] = {},
) -> dict[str, int]:
    """M-SMoE's rule (arXiv:2310.01334): usage divided by the layer's largest, one threshold for all layers.

    A layer that uses its experts evenly keeps many of them, one that leans on a few keeps few.
    """
    return global_counts(counts, bounds, total, normalise="max", groups=groups, protected=protected)


def adaptive_entropy(entropy: Mapping[str, float], bounds: Mapping[str, Bounds], total: int) -> dict[str, int]:
    """Counts in inverse proportion to exp(entropy), the number of experts that a token's router effectively weighs up.

    entropy: mean over tokens of the router's entropy, in nats. The experts of an undecided router stand in for one
    another, so such a layer is taken as redundant and keeps fewer. The rule is moekern's own, not a paper's. Steps go
    one by one to the layer with the most exp(-entropy) for each expert it would then hold (D'Hondt's apportionment).
    """
    gains = {key: [math.exp(-entropy[key]) / count for count in b.steps()] for key, b in bounds.items()}
    return fill(gains, bounds, total)


def step_gains(scores: Sequence[float], bounds: Bounds, groups: int, protected: Collection[int]) -> list[float]:
    """What each step above the lowest count adds: the next best scores of every group; never rising."""
    size, quota = len(scores) // groups, bounds.lowest // groups
    ranked = [
        sorted(range(g * size, (g + 1) * size), key=lambda e: (e not in protected, -scores[e], e))
        for g in range(groups)
    ]
    gains = []
    for count in bounds.steps():
        taken = [scores[e] for order in ranked for e in order[quota : count // groups]]
        gains.append(float(sum(taken)))
        quota = count // groups
    return gains


def normalised(scores: Sequence[float], how: str, where: str, idle: Collection[int] = ()) -> list[float]:
    """A layer's scores made comparable with other layers'; a layer of equal scores has z-scores of 0.

    Means, sums and spreads are those of the experts that are not `idle`; these stand at 0 or, where it is lower, at the
    lowest of the others; by z-score at that lowest. Raises InputError where scores below 0 have no share.
    """
    used = np.array([e not in idle for e in range(len(scores))])
    row = np.asarray(scores, dtype=np.float64)[used]
    if not len(row):
        return [0.0] * len(scores)
    scale, shift = 1.0, 0.0
    if how == "zscore":
        shift = float(row.mean())
        scale = float(row.std()) if row.max() > row.min() else 0.0  # the spread of equal scores may be rounding
    elif how != "none":
        if float(row.min()) < 0:
            raise InputError(f"--normalise {how}: layer {where} has scores below 0; use zscore or none")
        scale = float(row.max() if how == "max" else row.sum() if how == "sum" else row.mean())
    made = (row - shift) / scale if scale > 0 else np.zeros_like(row)
    lowest = float(made.min())
    whole = np.full(len(scores), lowest if how == "zscore" else min(lowest, 0.0))
    whole[used] = made
    return list(map(float, whole))

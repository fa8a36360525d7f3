"""From statistics and a criterion to a plan."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from moekern.criteria import Criterion, criterion_named, score_layer
from moekern.errors import InputError, check_type
from moekern.layer_keys import natural
from moekern.plan.budgets import (
    RELATIVE_TIER,
    Bounds,
    Budget,
    adaptive_entropy,
    adaptive_usage,
    bounds_of,
    global_counts,
    total_of,
    uniform_count,
    waterfill,
)
from moekern.plan.choose import check_protected, choose_top, tied
from moekern.plan.constants import replacing
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.fits_model import whole_router
from moekern.plan.guards import Guards, Marks, domain_masses, marks, with_floors
from moekern.plan.provenance import Provenance
from moekern.plan.targets import Served, Target, check_counts
from moekern.router import Router, count_problem
from moekern.statistics.file import Statistics
from moekern.statistics.header import router_of
from moekern.statistics.layer import LayerStatistics

SETS = ("selector", "domains")  # kinds of criteria that choose sets: scores of single experts do not rank them

Layers = Mapping[str, "Scored"]


def make_plan(
    statistics: Statistics,
    criterion: str | Criterion,
    keep: float | int,
    router: Router | None = None,
    *,
    seed: int = 0,
    domains: Sequence[str] | None = None,
    protect_super: bool = False,
    budget: Budget | None = None,
    guards: Guards | None = None,
    targets: Sequence[Target] = (),
    mtp: str | None = None,
    fit: Mapping[str, Any] | None = None,
    served: Served | None = None,
    replaced: str | None = None,
) -> Plan:
    """Choose the kept experts of every measured layer.

    `keep` is a share (float in (0, 1], of each layer rounded to the nearest multiple of n_group) or a count (int) for
    each layer; `budget` says how the layers share what is kept (None: each the same). `router` is that of the model;
    None takes the one of the statistics. `domains` counts only these (None: all). `protect_super` keeps experts
    with extreme outputs whatever their score; `guards` holds this and the other ways to name experts. `targets` are the
    engines that must run the result, and `served` is the model as they see it (None: as far as statistics tell). `mtp`
    is what prune does with MTP layers unless told otherwise; `fit` is what a count was derived from, for the record.
    `replaced` names the constants that dropped experts become: then each layer may keep any number of experts.

    Raises InputError for a budget the router or a target cannot work with, for layers that would keep different counts
    without `budget.allow_nonuniform`, for an unknown criterion, domain, layer or expert, for domains without tokens,
    for more protected experts than places, and for a floor that cannot be met.
    """
    check_type("statistics", statistics, Statistics)
    check_type("criterion", criterion, str, Criterion)
    check_type("budget", budget, Budget, NoneType)
    check_type("guards", guards, Guards, NoneType)
    chosen = criterion_named(criterion) if isinstance(criterion, str) else criterion
    router, asked = router or router_of(statistics.header), budget or Budget()
    seen = replace(
        served or Served(statistics.header["family"], statistics.header["score"], router), replaced=replaced is not None
    )
    router = router if replaced is None else whole_router(router)
    guard = guards or Guards()
    more = (RELATIVE_TIER,) if asked.kind == "relative" else ()
    if more and RELATIVE_TIER not in statistics.tiers:
        what = f"the statistics lack the tier {RELATIVE_TIER}; add it to calibrate (--tier {RELATIVE_TIER})"
        raise InputError(f"--budget relative: {what}")
    read = _Reading(statistics, domains, (*chosen.tiers, *more))
    marked = marks(statistics, replace(guard, protect_super=guard.protect_super or protect_super), domains)
    layers = {key: _scored(chosen, read.layer(key), key, seed) for key in sorted(statistics.layers, key=natural)}
    counts = _counts(asked, keep, router, layers, marked)
    if replaced is None:
        _check_uniform(counts, asked, keep)
    check_counts(f"--keep {keep}", counts, seen, targets)
    plans = {}
    for key, layer in layers.items():
        floors = domain_masses(statistics, key, guard.domain_floor)
        plans[key] = _plan_layer(chosen, read, layer, key, counts[key], router.n_group, marked, floors)
    provenance = Provenance(
        fingerprint=statistics.header["fingerprint"],
        statistics=statistics.sha256,
        tokens=statistics.header["tokens"],
        criterion=chosen.name,
        domains=statistics.domains if domains is None else domains,
        keep=keep,
        num_experts=router.num_experts,
        seed=seed,
        budget=asked,
        marked=marked.provenance,
        targets=targets,
        routers=statistics.header.get("routers", {}),
    ).document(counts)
    ties = {} if chosen.kind in SETS else ties_of(plans, router.n_group, marked)
    given = {"mtp": mtp, "fit": None if fit is None else dict(fit), "ties": ties or None}
    plan = Plan(plans, provenance | {name: value for name, value in given.items() if value is not None})
    return plan if replaced is None else replacing(plan, replaced, statistics)


def ties_of(plans: Mapping[str, LayerPlan], groups: int, marked: Marks | None = None) -> dict[str, int]:
    """Layer key -> the experts that tie where its choice ends, for the layers where any do; see `tied`."""
    found = {}
    for key, layer in plans.items():
        kept, dropped = (marked.kept[key], marked.drop_first[key]) if marked else ((), ())
        if layer.scores is not None:
            found[key] = tied(layer.scores, layer.keep, groups=groups, protected=kept, drop_first=dropped)
    return {key: experts for key, experts in found.items() if experts}


@dataclass(frozen=True)
class _Reading:
    """How the layers are read: one at a time, and no more of it than the criterion needs."""

    statistics: Statistics
    domains: Sequence[str] | None
    tiers: Sequence[str]

    def layer(self, key: str) -> LayerStatistics:
        return self.statistics.layer(key, self.domains, self.tiers)

    def parts(self, key: str) -> dict[str, LayerStatistics]:
        """The same by domain, in the order of their names: that of the runs that measured them decides nothing."""
        names = [n for n in sorted(self.statistics.layers[key]) if self.domains is None or n in self.domains]
        return {name: self.statistics.part(key, name, self.tiers) for name in names}


@dataclass(frozen=True)
class Scored:
    """What all layers together are asked for: a few numbers an expert."""

    scores: Tensor  # [E]
    count: Tensor  # [E]
    entropy: float | None  # of the router, a token's mean; None where its logits were not seen
    energy: float | None  # of the residual stream, a token's mean; None where it was not seen
    idle: Sequence[int]  # stand at a mark below all others, which would say too much across layers

    @property
    def num_experts(self) -> int:
        return len(self.count)


def _scored(criterion: Criterion, statistics: LayerStatistics, key: str, seed: int) -> Scored:
    if criterion.kind != "seeded" and criterion.family != "weight" and not statistics.count.any():
        raise InputError(f"layer {key}: no token was routed to any expert, so there is nothing to plan from")
    seen = int(statistics.logit_tokens)
    entropy = float(statistics.entropy_sum / statistics.logit_tokens) if seen else None
    scores, used = score_layer(criterion, statistics, key, seed), statistics.count > 0
    idle: list[int] = []
    if criterion.kind != "seeded" and criterion.family != "weight":
        idle = (~used & (scores < scores[used].min())).nonzero().flatten().tolist()
    energy = None
    if statistics.stream_square_sum.numel() and int(statistics.residual_tokens):
        energy = float(statistics.stream_square_sum / statistics.residual_tokens) or None
    return Scored(scores, statistics.count, entropy, energy, idle)


def _counts(budget: Budget, keep: float | int, router: Router, layers: Layers, marked: Marks) -> dict[str, int]:
    """Layer key -> experts it keeps."""
    if budget.kind == "uniform":
        return dict.fromkeys(layers, _common_count(keep, router, layers, budget.multiple_of))
    bounds = {
        key: _bounds(budget, router.of(layer.num_experts), key, marked.kept[key]) for key, layer in layers.items()
    }
    total = total_of(keep, {key: layer.num_experts for key, layer in layers.items()})
    if budget.kind == "adaptive" and budget.by == "entropy":
        return adaptive_entropy({key: _entropy(layer, key) for key, layer in layers.items()}, bounds, total)
    if budget.kind == "adaptive":
        usage = {key: _without(marked.drop_first[key], layer.count.double()) for key, layer in layers.items()}
        return adaptive_usage(usage, bounds, total, groups=router.n_group, protected=marked.kept)
    idle = {key: layer.idle for key, layer in layers.items()}
    values = {key: _without(marked.drop_first[key], layer.scores, idle[key]) for key, layer in layers.items()}
    if budget.kind == "relative":
        values = {key: [value / _energy(layers[key], key) for value in row] for key, row in values.items()}
    if budget.kind == "waterfill":
        return waterfill(values, bounds, total, groups=router.n_group, protected=marked.kept, idle=idle)
    return global_counts(
        values, bounds, total, normalise=budget.normalise, groups=router.n_group, protected=marked.kept, idle=idle
    )


def _bounds(budget: Budget, router: Router, key: str, protected: Collection[int]) -> Bounds:
    """A layer's lowest count leaves a place for each protected expert in its group."""
    size = router.num_experts // router.n_group
    held = max(sum(e // size == g for e in protected) for g in range(router.n_group)) * router.n_group
    floor = 1 if budget.floor is None else budget.floor
    least = max(held, bounds_of(router, floor=floor, multiple_of=budget.multiple_of, where=key).lowest)
    return bounds_of(router, floor=least, multiple_of=budget.multiple_of, where=f"layer {key}")


def _without(drop_first: Collection[int], values: Tensor, idle: Collection[int] = ()) -> list[float]:
    """Values in which experts that go first are worth no more than the least of those that are not idle."""
    row = values.tolist()
    least = min(value for e, value in enumerate(row) if e not in idle)
    return [least if e in drop_first else value for e, value in enumerate(row)]


def _entropy(layer: Scored, key: str) -> float:
    if layer.entropy is None:
        raise InputError(f"--adaptive-by entropy: layer {key}: the statistics hold no router logits; use usage")
    return layer.entropy


def _energy(layer: Scored, key: str) -> float:
    if layer.energy is None:
        raise InputError(f"--budget relative: layer {key}: no residual stream was seen before its experts; use global")
    return layer.energy


def _check_uniform(counts: Mapping[str, int], budget: Budget, keep: float | int) -> None:
    if len(set(counts.values())) > 1 and not budget.allow_nonuniform:
        raise InputError(
            f"--budget {budget.kind} --keep {keep}: layers would keep {min(counts.values())} to {max(counts.values())} "
            "experts; engines load one expert count for all layers, so use --budget uniform, --replace, whose result "
            "vLLM loads, or add --allow-nonuniform for one that moekern writes, verifies and evaluates"
        )


def _common_count(keep: float | int, router: Router, layers: Layers, multiple_of: int) -> int:
    sizes = {layer.num_experts: key for key, layer in layers.items()}
    if isinstance(keep, float) and len(sizes) > 1:
        raise InputError(
            f"--keep {keep}: layers have different numbers of experts ({', '.join(map(str, sorted(sizes)))}), and a "
            "share would keep different numbers; give a count"
        )
    kept = uniform_count(keep, router, multiple_of)
    for size, key in sizes.items():
        problem = count_problem(kept, router.of(size))
        if problem:
            raise InputError(f"--keep {keep}: layer {key}: {problem}")
    return kept


def _plan_layer(
    criterion: Criterion,
    read: _Reading,
    layer: Scored,
    key: str,
    kept: int,
    groups: int,
    marked: Marks,
    floors: Mapping[str, tuple[float, Sequence[float]]],
) -> LayerPlan:
    protected, drop_first = marked.kept[key], marked.drop_first[key]
    where = f"layer {key}"
    check_protected(layer.num_experts, kept, groups, protected, f"{_sources(marked)}: {where}")

    given: Any = None  # what a selector looks at
    if criterion.kind == "selector":
        given = _as_idle(read.layer(key), drop_first, criterion)
    elif criterion.kind == "domains":
        given = {name: _as_idle(part, drop_first, criterion) for name, part in read.parts(key).items()}

    def choose(held: Collection[int]) -> LayerPlan:
        if given is not None:
            selection = criterion.function(given, kept, groups, held)
            return LayerPlan(selection.keep, tuple(selection.scores.tolist()))
        row = tuple(layer.scores.tolist())
        return LayerPlan(choose_top(row, kept, groups=groups, protected=held, drop_first=drop_first, where=where), row)

    if floors:
        size = layer.num_experts // groups
        protected = with_floors(
            lambda held: choose(held).keep, floors, protected, drop_first, kept // groups, size, where
        )
    return choose(protected)


def _as_idle(statistics: LayerStatistics, experts: Collection[int], criterion: Criterion) -> LayerStatistics:
    """The same statistics with these experts as the only idle ones, which selectors drop first.

    Experts that really are idle count one token without any output: they are free to drop, but after these. To criteria
    that look at weights alone, for whom no tokens leave experts idle, there are none.
    """
    if not experts:
        return statistics
    count = statistics.count.clamp(min=1)
    count[sorted(experts)] = 0
    tokens = torch.zeros_like(statistics.tokens) if criterion.family == "weight" else statistics.tokens
    return replace(statistics, count=count, tokens=tokens)


def _sources(marked: Marks) -> str:
    flags = [
        f"--{name.replace('_', '-')}" for name in ("protect_super", "keep_always", "guard") if name in marked.provenance
    ]
    return ", ".join(flags) or "plan"

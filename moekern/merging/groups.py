"""Which expert is merged into which: M-SMoE, HC-SMoE and REAM, from statistics alone.

Each has a criterion that chooses the experts that stay, a likeness by which the others join them, and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moekern.criteria.needs import cosines, distances, need
from moekern.criteria.pairs import mean_output_gram, ream_likeness
from moekern.criteria.subsets import average_linkage
from moekern.errors import InputError, nearest_name
from moekern.plan.budgets import Budget
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.groups import ALIGN, MERGE, Group
from moekern.plan.make import make_plan
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics

CAPACITY = 16  # of a group of REAM, C


@dataclass(frozen=True)
class Method:
    """criterion: chooses the experts that stay. members: of a layer, those that stay by rising number and how many
    groups the router has -> for each expert the one that it joins (itself, where it stays). weights: [E], in which
    experts are averaged. tiers: that these need beside the routed one."""

    criterion: str
    members: Callable[[LayerStatistics, Sequence[int], int], list[int]]
    weights: Callable[[LayerStatistics], Tensor]
    tiers: tuple[str, ...]
    paper: str


def merging_plan(
    statistics: Statistics,
    method: str,
    keep: float | int,
    *,
    align: str = ALIGN[0],
    budget: Budget | None = None,
    domains: Sequence[str] | None = None,
) -> Plan:
    """The plan of a merge: which experts stay, and which are merged into them with which weights. An expert of weight 0
    is dropped. Raises InputError as `make_plan` does, and where the statistics lack a tier that the method needs."""
    if method not in METHODS:
        near = nearest_name(method, list(METHODS))
        raise InputError(f"--method {method}: expected one of {', '.join(METHODS)}{near}")
    if align not in ALIGN:
        raise InputError(f"--align {align}: expected one of {', '.join(ALIGN)}")
    chosen = METHODS[method]
    plan = make_plan(statistics, chosen.criterion, keep, budget=budget, domains=domains)
    router_groups = int(statistics.header["n_group"])
    layers = {}
    for key, layer in plan.layers.items():
        sums = statistics.layer(key, domains, chosen.tiers)
        layers[key] = replace(layer, groups=_groups(layer, sums, chosen, router_groups))
    return Plan(layers, {**plan.provenance, MERGE: {"method": method, "align": align, "paper": chosen.paper}})


def _groups(layer: LayerPlan, sums: LayerStatistics, method: Method, router_groups: int) -> tuple[Group, ...] | None:
    home, weights = method.members(sums, layer.keep, router_groups), method.weights(sums).tolist()
    found = []
    for e in layer.keep:
        group = [(member, float(weights[member])) for member, kept in enumerate(home) if kept == e]
        group = [(member, weight) for member, weight in group if member == e or weight > 0]
        found.append(tuple(group) if len(group) > 1 else ((e, 1.0),))
    return tuple(found) if any(len(group) > 1 for group in found) else None


def check_count(method: str, kept: int, experts: int) -> None:
    """Raise InputError where the groups of so many experts that stay have no place for all of a layer's."""
    if method == "ream" and kept * CAPACITY < experts:
        raise InputError(f"--keep: ream: {kept} groups of {CAPACITY} experts have no place for {experts}; keep more")


def most_alike(likeness: Tensor, keep: Sequence[int]) -> list[int]:
    """Each expert joins the one of those that stay that it is most like; of equal ones the lowest number."""
    nearest = likeness[:, list(keep)].argmax(1).tolist()
    return [e if e in keep else keep[nearest[e]] for e in range(len(likeness))]


def m_smoe(sums: LayerStatistics, keep: Sequence[int], router_groups: int) -> list[int]:
    """The expert whose router logits are most alike, by (cos + 1) / 2 over all tokens (arXiv:2310.01334)."""
    need(sums, "m-smoe", "logit_gram")
    return most_alike((cosines(sums.logit_gram) + 1) / 2, keep)


def hc_smoe(sums: LayerStatistics, keep: Sequence[int], router_groups: int) -> list[int]:
    """The expert that stays of its cluster of mean outputs, by average linkage of Euclidean distances
    (arXiv:2410.08589). Where a cluster keeps none, since all of it is idle, or several, the nearest."""
    apart = distances(mean_output_gram(sums, "hc-smoe"))
    size, quota = sums.num_experts // router_groups, len(keep) // router_groups
    home = most_alike(-apart, keep)
    for first in range(0, sums.num_experts, size):
        for members in average_linkage(apart.cpu().numpy(), list(range(first, first + size)), quota):
            own = [e for e in members if e in keep]
            for e in members if own else ():
                home[e] = e if e in own else min(own, key=lambda kept: (float(apart[e, kept]), kept))
    return home


def ream(sums: LayerStatistics, keep: Sequence[int], router_groups: int) -> list[int]:
    """From the most salient expert that stays on, each takes the nearest that are left, up to a group of 16
    (arXiv:2604.04356). Raises InputError where so many groups have no place for all."""
    need(sums, "ream", "scored_output_sum", "logit_gram")
    check_count("ream", len(keep), sums.num_experts)
    likeness, salience = ream_likeness(sums), _reap(sums)
    home = [e if e in keep else -1 for e in range(sums.num_experts)]
    for e in sorted(keep, key=lambda e: (-float(salience[e]), e)):
        left = [other for other in range(sums.num_experts) if home[other] < 0]
        left.sort(key=lambda other: (-float(likeness[e, other]), other))
        for other in left[: CAPACITY - 1]:
            home[other] = e
    return home


def _usage(sums: LayerStatistics) -> Tensor:
    return sums.count.double()


def _reap(sums: LayerStatistics) -> Tensor:
    return sums.gated_norm_sum / sums.count.clamp(min=1)


def _salience(sums: LayerStatistics) -> Tensor:
    """REAP; of experts that have none the least of the others, 0.5 at the most, so that they are merged too."""
    found = _reap(sums)
    least = found[found > 0].min().clamp(max=0.5) if bool((found > 0).any()) else torch.ones(())
    return torch.where(found > 0, found, least)


METHODS = {
    "m-smoe": Method("usage", m_smoe, _usage, (), "arXiv:2310.01334"),
    "hc-smoe": Method("hc_smoe_clusters", hc_smoe, _usage, ("replay",), "arXiv:2410.08589"),
    "ream": Method("reap", ream, _salience, ("replay",), "arXiv:2604.04356"),
}

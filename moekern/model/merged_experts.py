"""Experts merged into one: weighted means of their weights, channels put in one order first.

An expert of which gate, up and down are permuted alike along their channels computes the same. So before a member is
averaged with the expert that stays, its channels are put in the order in which they are most like that one's, gate and
up together (weight matching, as M-SMoE does to experts without gates, arXiv:2310.01334).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekern.errors import InputError
from moekern.model.narrow_layers import expert_parameters
from moekern.model.projections import Views, views

Parts = Mapping[str, Tensor]  # one expert, by fields of Views: gate, up [I, H], down [H, I], biases [I], [I], [H]
Group = Sequence[tuple[int, float]]  # members and their weights
Combination = tuple[Sequence[float], float]  # a coefficient of each expert's router row; what is added to the bias
AXIS = {"down": 1, "down_bias": None}  # of the channels; 0 of the others


@dataclass(frozen=True)
class Merging:
    """What is merged in a layer: a group for each kept expert by rising number. align: channels are put in order. rows:
    of kept experts whose router row is another than their own."""

    groups: Sequence[Group]
    align: bool
    rows: Mapping[int, Combination] = field(default_factory=dict)


def matched(reference: Parts, other: Parts) -> Tensor:
    """For each channel of `reference` the one of `other` that takes its place, int64 [I].

    Of all permutations the one with the largest sum of inner products of matched rows of gate, rows of up and columns
    of down. Products are float64, and rounded to float32 before they are compared: how they were added up decides
    nothing. Where weights are not finite no channel is moved: whoever uses them tells.
    """
    from scipy.optimize import linear_sum_assignment

    likeness = torch.zeros((), dtype=torch.float64)
    for name in ("gate", "up", "down"):
        if name in reference:
            one, two = (part[name].double() for part in (reference, other))
            likeness = likeness.to(one.device) + (one.mT @ two if name == "down" else one @ two.mT)
    compared = likeness.float().cpu()
    if not bool(compared.isfinite().all()):
        return torch.arange(len(compared))
    return torch.from_numpy(linear_sum_assignment(compared.numpy(), maximize=True)[1])


def merged_expert(expert: Parts, members: Iterable[tuple[Parts, float]], *, align: bool) -> dict[str, Tensor]:
    """`expert` plus, for each member, its share times what it differs by: the mean, whose shares add up to 1 with that
    of `expert`; in float32, or float64 of such. Members may be made one at a time. An equal member changes nothing."""
    own = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in expert.items()}
    total = {name: value.clone() for name, value in own.items()}
    for parts, share in members:
        order = matched(own, parts) if align else None
        for name, value in total.items():
            axis, given = AXIS.get(name, 0), parts[name].to(value.dtype)
            if order is not None and axis is not None:
                given = given.index_select(axis, order.to(given.device))
            value += (given - own[name]) * share
    return total


def shares(expert: int, group: Group) -> list[tuple[int, float]]:
    """The other members of an expert's group that count, each with its weight over the sum of all."""
    whole = sum(weight for _, weight in group)
    return [(member, weight / whole) for member, weight in group if member != expert and weight > 0]


def combined_rows(whole: Tensor, cut: Tensor, keep: Sequence[int], rows: Mapping[int, Combination]) -> Tensor:
    """A router's matrix, or its bias, with the experts `keep` left: `cut`, in which each expert of `rows` has the
    combination of the rows of `whole`, added up in float64 in the order that is given, and then the constant (bias)."""
    made = cut.clone()
    for e, (of, constant) in rows.items():
        total = torch.zeros_like(whole[0], dtype=torch.float64)
        for member, coefficient in enumerate(of):
            total += whole[member].double() * coefficient
        made[keep.index(e)] = (total + constant if whole.ndim == 1 else total).to(cut.dtype)
    return made


def parts_of(of: Views, expert: int) -> dict[str, Tensor]:
    """Views of one expert."""
    return {name: value[expert] for name, value in vars(of).items() if value is not None}


def views_to_merge(layer: nn.Module, key: str) -> Views:
    """The weights of a layer's experts. Raises InputError where they are not all at hand."""
    found = expert_parameters(layer)
    if found is None:
        raise InputError(f"layer {key}: its experts are not held together, so that none are merged in memory")
    own = views(found[0])
    if own.down.is_meta:
        what = "its experts run in groups, so that none are merged in memory"
        raise InputError(f"layer {key}: {what}; give more (--memory, --gpu-memory)", kind="memory")
    return own


def merge_live(layer: nn.Module, before: Views, merging: Merging, keep: Sequence[int], key: str) -> None:
    """Let a layer that has the experts `keep` left hold what is merged of those that it had before."""
    after: Any = views_to_merge(layer, key)
    for rank, (expert, group) in enumerate(zip(keep, merging.groups, strict=True)):
        others = shares(expert, group)
        if others:
            members = ((parts_of(before, member), share) for member, share in others)
            made = merged_expert(parts_of(before, expert), members, align=merging.align)
            for name, value in made.items():
                getattr(after, name)[rank].copy_(value)

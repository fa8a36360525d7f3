"""Which experts are merged into which: for each kept expert of a layer its members, itself among them, and weights."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moekern.architectures.channels import PLAIN
from moekern.checkpoint.strict_json import short
from moekern.errors import InputError
from moekern.plan.formats import weight_format

if TYPE_CHECKING:
    from moekern.architectures import Layout
    from moekern.checkpoint.folder import Checkpoint
    from moekern.plan.document import LayerPlan, Plan

Group = tuple[tuple[int, float], ...]  # members by rising number, with weights of any scale
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")  # an expert's, as a key of JSON
EXAMPLE = '{"3": {"3": 2, "5": 1}}: into expert 3, which stays, 5 is merged, with half its weight'
MERGE = "merge"  # provenance: how a plan's groups were made, and "align"
ALIGN = ("weights", "none")
VERSION = 1  # of the arithmetic: raise it when the same groups give other bytes


def parsed_groups(found: Any, keep: Sequence[int], where: str) -> tuple[Group, ...] | None:
    """The groups of the experts `keep`, in their order, from JSON; those that it does not name stay as they are. None
    where no expert is merged into another. Raises InputError, which begins with `where`, for anything odd."""
    if not isinstance(found, dict) or not all(isinstance(group, dict) for group in found.values()):
        raise InputError(f"{where}: groups: expected an object such as {EXAMPLE}; got {short(found)}")
    named = {_number(e, where): group for e, group in found.items()}
    for e in named:
        if e not in keep:
            raise InputError(f"{where}: groups: expert {e} has members, and does not stay")
    groups = tuple(
        tuple(sorted((_number(member, where), weight) for member, weight in named.get(e, {str(e): 1.0}).items()))
        for e in keep
    )
    check_groups(groups, keep, where)
    return tuple(_floats(group) for group in groups) if any(len(group) > 1 for group in groups) else None


def check_groups(groups: Sequence[Group], keep: Sequence[int], where: str, experts: int | None = None) -> None:
    """Raise InputError unless these are groups of the experts `keep`, of a layer of so many (None: not known)."""
    if list(keep) != sorted(keep):
        raise InputError(f"{where}: groups: the experts that stay are not in rising order")
    if len(groups) != len(keep):
        raise InputError(f"{where}: groups of {len(groups)} experts, and {len(keep)} are kept")
    kept, home = set(keep), dict[int, int]()
    for e, group in zip(keep, groups, strict=True):
        for member, weight in group:
            what = f"{where}: groups: expert {e}: "
            if experts is not None and not 0 <= member < experts:
                raise InputError(f"{what}member {member} is out of range; the layer has experts 0 to {experts - 1}")
            if member != e and member in kept:
                raise InputError(f"{what}member {member} stays itself, and cannot be merged into another")
            if member in home:
                raise InputError(f"{what}member {member} is in the group of expert {home[member]} too")
            if type(weight) not in (int, float) or not 0 <= weight <= sys.float_info.max:
                raise InputError(f"{what}weight of {member}: expected a number from 0 on, got {short(weight)}")
            home[member] = e
        if home.get(e) != e:
            raise InputError(
                f"{where}: groups: expert {e} is not among its own members; name it, with weight 0 at least"
            )
        if not 0 < sum(float(weight) for _, weight in group) <= sys.float_info.max:
            raise InputError(f"{where}: groups: expert {e}: the weights of its members add up to no number above 0")


def groups_document(groups: Sequence[Group] | None, keep: Sequence[int]) -> dict[str, Any]:
    """The key "groups" of a layer's JSON, of those that have other members than the expert itself; {} of none."""
    given = {e: dict(group) for e, group in zip(keep, groups or (), strict=False) if len(group) > 1}
    named = {str(e): {str(member): weight for member, weight in group.items()} for e, group in given.items()}
    return {"groups": named} if named else {}


def check_plain(checkpoint: Checkpoint, layout: Layout, plan: Plan) -> None:
    """`check_mergeable` of the layers that have groups."""
    check_mergeable(checkpoint, layout, [key for key, given in plan.layers.items() if given.groups is not None])


def check_mergeable(checkpoint: Checkpoint, layout: Layout, keys: Iterable[str]) -> None:
    """Raise InputError, naming a tensor, for a layer whose experts are no plain matrices of gate, up and down and their
    biases, and for one in which a table says which experts a token takes: it would name merged ones."""
    for key in keys:
        layer = layout.layers[key]
        known = {tensor.name for tensor in layer.refitted(all_parts=True)}
        for tensor in layer.of_role("expert"):
            entry = checkpoint.tensors[tensor.name]
            where = f"{checkpoint.folder}: layer {key}: {tensor.name}"
            if layer.width is None or entry.dtype not in PLAIN:
                format = weight_format(checkpoint.config, [tensor.name]) or entry.dtype
                what = f"stored as {format}, and only plain numbers are merged"
                raise InputError(f"{where}: {what}; merge an unquantised twin of the model, and quantise the result")
            if tensor.name not in known or tensor.axis or tensor.trailing:
                raise InputError(f"{where}: it is not known how such tensors of experts are merged")
        if any(layer.of_role("table")):
            what = "a table of ids chooses its experts, so that none are merged; leave its groups out of the plan"
            raise InputError(f"{checkpoint.folder}: layer {key}: {what}")


def aligned(provenance: Mapping[str, Any]) -> bool:
    """Whether members' channels are put in the order of the expert that stays; they are where a plan says nothing.
    Raises InputError for another word than those of ALIGN."""
    told = provenance.get(MERGE, {})
    align = told.get("align", ALIGN[0]) if isinstance(told, dict) else told
    if align not in ALIGN:
        raise InputError(f"plan: provenance.merge.align is {short(align)}; expected one of {', '.join(ALIGN)}")
    return bool(align == ALIGN[0])


def merge_recipe(plan: Plan, fingerprint: str) -> str:
    """sha256 of all that decides the bytes of merged experts."""
    layers = {key: (layer.keep, layer.groups) for key, layer in plan.layers.items() if layer.groups is not None}
    told = plan.provenance.get(MERGE)
    rows = [told["router"]] if isinstance(told, dict) and told.get("router") is not None else []
    decides = [MERGE, VERSION, fingerprint, aligned(plan.provenance), sorted(layers.items()), *rows]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def is_merged(plan: Plan, fingerprint: str | None = None) -> bool:
    """Whether what the plan says was computed is what its groups make of this model, and not a refit of that. None: of
    the one that it says it was made of, which may be a twin of the one that it was planned on."""
    told = plan.provenance.get("refit")
    if not plan.merges or not isinstance(told, dict):
        return False
    of = fingerprint or told.get("fingerprint") or plan.provenance.get("fingerprint")
    return bool(told.get("recipe") == merge_recipe(plan, str(of)))


def model_digest(plan: Plan) -> str:
    """sha256 hex of what decides which model a plan makes, whatever its scores and where it came from: what stays, what
    stands for the others, how experts are merged, and by which recipe they were refitted."""
    told, layers = plan.provenance, {key: replace(layer, scores=None) for key, layer in plan.layers.items()}
    decides: dict[str, Any] = {}
    if plan.merges:
        merge = told.get(MERGE)
        decides[MERGE] = [aligned(told), merge.get("router") if isinstance(merge, dict) else None]
    if "refit" in told and not is_merged(plan):
        decides["refit"] = told["refit"].get("recipe") if isinstance(told["refit"], dict) else None
    return replace(plan, layers=layers, provenance=decides).digest


def merged_groups(layer: LayerPlan) -> dict[int, tuple[int, ...]]:
    """Each expert of a layer that others are merged into, and its group: itself, and the members that count, of a
    weight above 0."""
    groups = zip(layer.keep, layer.groups or (), strict=False)
    found = {e: tuple(member for member, weight in group if member == e or weight > 0) for e, group in groups}
    return {e: members for e, members in found.items() if len(members) > 1}


def merged_into(layer: LayerPlan) -> int:
    """How many experts of a layer are merged into others."""
    return sum(len(members) - 1 for members in merged_groups(layer).values())


def _floats(group: Sequence[tuple[int, float]]) -> Group:
    return tuple((member, float(weight)) for member, weight in group) if len(group) > 1 else ((group[0][0], 1.0),)


def _number(text: str, where: str) -> int:
    if not NUMBER.fullmatch(text):
        raise InputError(f"{where}: groups: expected expert numbers, got {short(text)}")
    return int(text)

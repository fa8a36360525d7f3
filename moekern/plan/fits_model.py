"""Whether a plan can be carried out on a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from moekern.architectures.layout import Layout
from moekern.architectures.twins import router_numbers, same_routers
from moekern.architectures.widths import narrow_problem, width_problem
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.strict_json import short
from moekern.errors import InputError, check_type
from moekern.plan.document import NONUNIFORM, LayerPlan, Plan, check_ids, ids_of, some_of
from moekern.plan.groups import check_groups
from moekern.plan.router_rows import check_rows
from moekern.router import Router, count_problem, nearest_counts

TWIN = "made on a twin of this model: the same layers, experts and routers, stored otherwise"


class Layer(Protocol):
    """One MoE layer, as far as a plan cares."""

    @property
    def num_experts(self) -> int: ...


class Model(Protocol):
    """What check_plan asks of a Layout."""

    @property
    def router(self) -> Router: ...
    @property
    def layers(self) -> Mapping[str, Layer]: ...
    @property
    def mtp(self) -> Mapping[str, Layer]: ...


def check_plan(
    plan: Plan, layout: Model, model: Checkpoint | str, source: str = "plan", *, replaced: bool = False
) -> str | None:
    """Raise InputError unless `plan` can be executed on the model of `layout`, a checkpoint or its fingerprint.

    A twin of the plan's model, the same layers, experts and routers in another format, is as good as the model itself;
    the line that is returned then says so. Refused: another model's plan; an unknown or missing layer; a number out of
    range or twice; scores that are not one an expert; a count the router cannot work with; groups that keep different
    numbers of experts, and layers that do unless the plan's provenance allows it; channels that experts do not have, or
    not as many of each, and of models whose experts lose none. Of a plan that replaces dropped experts the router stays
    whole, and so groups and layers may keep any number from 1; such plans are refused unless the caller makes something
    of them (`replaced`). Raises TypeError for anything but a plan.
    """
    check_type("plan", plan, Plan)
    if plan.replace is not None:
        _check_replacing(plan, source, allowed=replaced)
    note = _check_model(plan, layout, model, source)
    known = {**layout.layers, **layout.mtp}
    for key in plan.layers:
        if key not in known:
            raise InputError(f"{source}: layer {key!r} is not a MoE layer of this model; it has {some_of(known)}")
    missing = [key for key in layout.layers if key not in plan.layers]
    if missing:
        raise InputError(
            f"{source}: layer {some_of(missing)} is missing; every MoE layer needs its list of kept experts"
        )
    if any(layer.channels is not None for layer in plan.layers.values()):
        _check_channels(plan, layout, model, source)
    for key, layer in plan.layers.items():
        router = layout.router.of(known[key].num_experts)
        _check_layer(layer, router if plan.replace is None else whole_router(router), f"{source}: layer {key}")
        if layer.groups is not None and key not in layout.layers:
            raise InputError(f"{source}: layer {key}: experts of MTP layers are not merged; leave its groups out")
    check_rows(plan, {key: layer.num_experts for key, layer in known.items()})
    if plan.provenance.get(NONUNIFORM) is True or plan.replace is not None:
        return note
    first, kept = next((key, len(layer.keep)) for key, layer in plan.layers.items())
    for key, layer in plan.layers.items():
        if len(layer.keep) != kept:
            raise InputError(
                f"{source}: layer {first} keeps {kept} experts and layer {key} keeps {len(layer.keep)}; engines load "
                "one expert count for all layers, so keep the same number everywhere, or plan with --allow-nonuniform "
                f"(in a plan of your own: provenance.{NONUNIFORM}: true)"
            )
    return note


def whole_router(router: Router) -> Router:
    """What a router that stays whole asks of the experts that are left in a layer: that one is."""
    return Router(router.num_experts, 1)


def _check_replacing(plan: Plan, source: str, *, allowed: bool) -> None:
    """Raise InputError for a plan that replaces dropped experts where nothing is made of that, or beside what does not
    go with it."""
    if not allowed:
        what = "replaces dropped experts by constants; prune, verify and evaluate take such plans"
        raise InputError(f'{source}: {what}; here give one without "replace"')
    if any(layer.channels is not None for layer in plan.layers.values()):
        raise InputError(f"{source}: replaces dropped experts, and says which channels of others stay; do one of both")
    if plan.merges:
        raise InputError(f"{source}: replaces dropped experts, and merges them into those that stay; do one of both")
    if plan.provenance.get("refit") is not None:
        raise InputError(f"{source}: replaces dropped experts, and was refitted for experts that are gone; plan anew")


def _check_channels(plan: Plan, layout: Model, model: Checkpoint | str, source: str) -> None:
    """Raise InputError for a model whose experts lose no channels, and for channels that they do not have."""
    problem = narrow_problem(model, layout) if isinstance(model, Checkpoint) and isinstance(layout, Layout) else None
    if problem:
        raise InputError(f"{source}: says which channels of experts stay: {problem}; take a plan of whole experts")
    width = layout.width if isinstance(layout, Layout) else None
    if plan.width is not None and isinstance(layout, Layout) and (problem := width_problem(layout, plan.width)):
        raise InputError(f"{source}: {plan.width} channels of experts stay: {problem}")
    for key, layer in plan.layers.items():
        where = f"{source}: layer {key}"
        if layer.channels is None:
            raise InputError(f"{where}: says nothing of channels, and other layers lose some")
        if len(layer.channels) != len(layer.keep):
            raise InputError(f"{where}: channels of {len(layer.channels)} experts, and {len(layer.keep)} are kept")
        found = [
            ids_of(text, f"{where}: channels of expert {short(e)}")
            for e, text in zip(layer.keep, layer.channels, strict=True)
        ]
        if {len(ids) for ids in found} != {plan.width}:
            what = f"experts that keep other than the {plan.width} channels of the plan's first one"
            raise InputError(f"{where}: {what}; all must have as many")
        highest = max(int(ids[-1]) for ids in found)
        if width is not None and highest >= width:
            raise InputError(f"{where}: channel {highest} is out of range; experts have 0 to {width - 1}")


def _check_model(plan: Plan, layout: Model, model: Checkpoint | str, source: str) -> str | None:
    """A line where the plan was made on a twin. Raises InputError where it was made on another model."""
    made_for = plan.provenance.get("fingerprint")
    if made_for is None:
        return None
    fingerprint = model if isinstance(model, str) else model.fingerprint
    if made_for == fingerprint:
        return None
    prints = f"fingerprint {str(made_for)[:12]}, this checkpoint has {fingerprint[:12]}"
    if isinstance(model, Checkpoint) and isinstance(layout, Layout):
        theirs = plan.provenance.get("routers")
        if theirs and same_routers(theirs, router_numbers(model, layout)):
            return f"{source}: {TWIN}"
    raise InputError(
        f"{source}: made for another model ({prints}), and not for a twin of this one, which has the same routers; "
        "plan again from its own statistics, or, for a plan that knows no routers, remove provenance.fingerprint"
    )


def _check_layer(layer: LayerPlan, router: Router, where: str) -> None:
    experts = router.num_experts
    check_ids(layer.keep, where)
    for e in layer.keep:
        if e >= experts:
            raise InputError(f"{where}: expert {short(e)} is out of range; the layer has experts 0 to {experts - 1}")
    if layer.scores is not None and len(layer.scores) != experts:
        raise InputError(f"{where}: {len(layer.scores)} scores for {experts} experts; give one for each, or none")
    if layer.groups is not None:
        check_groups(layer.groups, layer.keep, where, experts)
        if layer.channels is not None:
            raise InputError(f"{where}: merges experts, and says which channels of experts stay; leave one of the two")
    problem = count_problem(len(layer.keep), router)
    if problem:
        raise InputError(
            f"{where}: keeps {len(layer.keep)} experts: {problem}; {nearest_counts(len(layer.keep), router)}"
        )
    size = experts // router.n_group
    per_group = [sum(e // size == group for e in layer.keep) for group in range(router.n_group)]
    if len(set(per_group)) > 1:
        raise InputError(f"{where}: groups of {size} experts keep {per_group}; every group must keep the same number")

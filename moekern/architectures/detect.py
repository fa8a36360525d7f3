"""The layout of a checkpoint, found from its keys; model_type only names the family among those that fit."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from moekern.architectures import config_keys as keys
from moekern.architectures import widths
from moekern.architectures.collect import collect_layers
from moekern.architectures.fit import Fit, Place, find_places, fit
from moekern.architectures.layout import Layout, MoeLayer
from moekern.architectures.patterns import MOE_HINT, MTP, SCHEMES
from moekern.architectures.substitution import refuse_replaced
from moekern.architectures.table import FAMILIES, Family, family_named
from moekern.checkpoint.folder import CONFIG, PLAN_FILE, Checkpoint
from moekern.checkpoint.strict_json import read_json, shown
from moekern.errors import InputError
from moekern.router import Router

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


def find_layout(checkpoint: Checkpoint) -> Layout:
    """The first row of the table that explains every key of the checkpoint's experts and routers.

    Raises InputError if the checkpoint has no experts, if no row explains it (with the keys in question), if the family
    cannot be pruned, if tensors and config disagree about the expert count, and if its dropped experts are constants
    (`substitution.as_whole` makes a checkpoint of such a one that has a layout).
    """
    refuse_replaced(checkpoint)
    places = find_places(checkpoint.tensors)
    fitted = choose(checkpoint, places)
    family, config, source = fitted.family, checkpoint.config, str(checkpoint.folder / CONFIG)
    if family.refused:
        raise InputError(f"{checkpoint.folder}: {family.name} models cannot be pruned: {family.refused}")
    stacks = {found.place.stack for found in fitted.found if found.role == "expert" and not found.place.mtp}
    if len(stacks) > 1 and not family.stacks:
        raise InputError(f"{checkpoint.folder}: experts in several stacks: {', '.join(sorted(stacks))}")

    check_config(family, config, source)
    counted, num_layers = next(keys.values(config, keys.LAYER_KEYS, family.holder), ((), None))
    found = collect_layers(checkpoint, fitted, num_layers, trailing_rows(family, config))
    layers = by_key(checkpoint, [layer for layer in found if not layer.mtp])
    num_experts = largest_count(checkpoint, layers)
    count_paths = keys.check_counts(config, source, num_experts, {layer.num_experts for layer in layers.values()})
    if num_layers is not None and not family.stacks:
        check_depth(places, stacks, num_layers, declared_mtp(config), f"{source}: {'.'.join(counted)}")
    prefixes = mtp_prefixes(family, places, stacks, num_layers)
    shared_paths, shared_times = widths.shared_times(family, config)
    router = find_router(family, config, source, num_experts)
    layout = Layout(
        family=replace(family, score=score(family, config)),
        layers=layers,
        mtp=by_key(checkpoint, [layer for layer in found if layer.mtp]),
        mtp_prefixes=prefixes,
        router=router,
        count_paths=count_paths,
        mtp_paths=tuple(path for path, _ in keys.values(config, keys.MTP_KEYS)),
        top_k_paths=tuple(dict.fromkeys(path for path, k in top_ks(family, config) if k == router.top_k)),
        shared_paths=shared_paths,
        shared_times=shared_times,
        notes=tuple(mtp_missing(config, prefixes)),
    )
    return widths.with_widths(checkpoint, layout)


def choose(checkpoint: Checkpoint, places: Sequence[Place]) -> Fit:
    """The best of the rows that fit. Raises InputError if there is none."""
    names = keys.model_types(checkpoint.config)
    counts = {path[-1] for path, _ in keys.values(checkpoint.config, keys.COUNT_KEYS)}
    fits = [fit(family, places) for family in FAMILIES]

    def rank(fitted: Fit) -> tuple[int, ...]:
        family, roles = fitted.family, {found.role for found in fitted.found}
        known = [i for i, name in enumerate(names) if name in (family.name, *family.also)]
        own = {(scheme.head, name) for scheme in SCHEMES[family.experts] for name in scheme.projections}
        return (
            min(known, default=len(names)),
            not any((found.head, found.projection) in own for found in fitted.found),
            bool(family.bias and "bias" not in roles) + bool(family.table and "table" not in roles),
            not counts & set(family.count.split("|")),
        )

    complete = [fitted for fitted in fits if fitted.complete]
    if complete:
        return min(complete, key=rank)
    if not any(MOE_HINT.search(place.shape) for place in places):
        raise InputError(f"{checkpoint.folder}: not a Mixture-of-Experts checkpoint: no tensor belongs to an expert")
    nearest = min(fits, key=lambda fitted: (rank(fitted)[0], len(fitted.unknown), *rank(fitted)))
    unknown = [name for place in nearest.unknown for name in place.names]
    if not unknown:
        raise InputError(f"{checkpoint.folder}: no router for its experts: expected {nearest.family.router}")
    what = ", ".join(unknown[:3])
    raise InputError(
        f"{checkpoint.folder}: no known family has these keys: {what} ({len(unknown)} keys not understood)"
    )


def check_config(family: Family, config: dict[str, Any], source: str) -> None:
    """Raise InputError, naming the key, for numbers, sections and words that cannot be what they stand for."""
    own = {name for text in (family.count, family.top_k, family.groups) for name in text.split("|")}
    fixed = (*keys.COUNT_KEYS, *keys.TOP_K_KEYS, *keys.LAYER_KEYS, *keys.MTP_KEYS, *keys.GROUP_KEYS, keys.TOPK_GROUP)
    keys.check_sections(config, source)
    keys.check_numbers(config, source, {*own, *fixed})
    for path, section in keys.sections(config, family.holder):
        value = section.get(family.score_key) if family.score_key else None
        if value is not None and value not in (*SCORES, True, False):
            where = ".".join((*path, family.score_key))
            raise InputError(f"{source}: {where} is {shown(value)}, expected one of {', '.join(SCORES)}")


def declared_mtp(config: dict[str, Any]) -> int:
    """How many layers beyond the last one the config says that there are."""
    return max((value for _, value in keys.values(config, keys.MTP_KEYS)), default=0)


def mtp_missing(config: dict[str, Any], prefixes: Sequence[str]) -> Iterable[str]:
    """A line where the config counts more MTP layers than the tensors hold. Those under one name cannot be counted."""
    path, count = max(keys.mtp_counts(config), key=lambda item: item[1], default=((), 0))
    held = len(prefixes) if all(prefix.split(".")[-2].isdecimal() for prefix in prefixes) else count
    if held < count:
        yield f"{CONFIG}: {'.'.join(path)} is {count}, but the files hold {held or 'no'} MTP layers"


def check_depth(places: Iterable[Place], stacks: Iterable[str], num_layers: int, mtp: int, where: str) -> None:
    """Raise InputError unless the tensors hold the layers that the config counts, and no ordinary ones beyond them.

    A layer beyond the last predicts further tokens: the config counts it, or it has a tensor that no other layer has.
    """
    shapes: dict[int, set[str]] = {}
    for place in places:
        if place.stack in stacks and not place.mtp:
            for layer in place.layers:
                shapes.setdefault(layer, set()).add(place.shape)
    usual = {shape for layer, has in shapes.items() if layer < num_layers for shape in has}
    ordinary = [layer for layer, has in sorted(shapes.items()) if layer >= num_layers + mtp and has <= usual]
    if num_layers - 1 not in shapes or ordinary:
        last = max(shapes)
        raise InputError(
            f"{where} is {num_layers}, but the tensors hold {last + 1} layers, the last of them {min(stacks)}.{last}"
        )


def by_key(checkpoint: Checkpoint, layers: Iterable[MoeLayer]) -> dict[str, MoeLayer]:
    found: dict[str, MoeLayer] = {}
    for layer in layers:
        other = found.setdefault(layer.key, layer)
        if other is not layer:
            raise InputError(f"{checkpoint.folder}: {other.prefix} and {layer.prefix} are both layer {layer.key}")
    return found


def largest_count(checkpoint: Checkpoint, layers: dict[str, MoeLayer]) -> int:
    """The expert count of the fullest layer. Raises InputError where layers differ, unless the checkpoint was pruned
    so."""
    if not layers:
        raise InputError(f"{checkpoint.folder}: only its multi-token-prediction layers have experts")
    first, *others = layers.values()
    counts = {key: layer.num_experts for key, layer in layers.items()}
    for layer in others:
        if layer.num_experts != first.num_experts and counts != planned_counts(checkpoint):
            what = f"{first.prefix} has {first.num_experts} experts, {layer.prefix} has {layer.num_experts}"
            raise InputError(f"{checkpoint.folder}: expert counts differ between layers: {what}")
    return max(counts.values())


def planned_counts(checkpoint: Checkpoint) -> dict[str, int]:
    """Experts that each layer keeps by the plan that the checkpoint was pruned with; empty where there is none."""
    path = checkpoint.folder / PLAN_FILE
    plan = read_json(path).get("plan") if path.is_file() else None
    layers = plan.get("layers") if isinstance(plan, dict) else None
    found = layers.items() if isinstance(layers, dict) else ()
    kept = {key: layer.get("keep") for key, layer in found if isinstance(layer, dict)}
    return {key: len(keep) for key, keep in kept.items() if isinstance(keep, list)}


def trailing_rows(family: Family, config: dict[str, Any]) -> int:
    if isinstance(family.trailing, int):
        return family.trailing
    return max(0, keys.first(config, (family.trailing,), family.holder) or 0)


def find_router(family: Family, config: dict[str, Any], source: str, num_experts: int) -> Router:
    """What the config says about routing. Raises InputError, naming `source`, where it cannot be."""
    n_group, topk_group = groups(family, config, source, num_experts)
    group_top = family.group_top or (1 if n_group == 1 else 2)
    return Router(num_experts, top_k(family, config, source, num_experts), n_group, topk_group, group_top)


def top_k(family: Family, config: dict[str, Any], source: str, num_experts: int) -> int:
    if family.top_k.isdigit():
        return int(family.top_k)
    value = next((k for _, k in top_ks(family, config)), None)
    if value is None:
        raise InputError(f"{source}: no key gives the experts a token chooses; add {family.top_k.split('|')[0]}")
    if not 1 <= value <= num_experts:
        raise InputError(f"{source}: a token chooses {value} experts, but the tensors hold {num_experts}")
    return value


def top_ks(family: Family, config: dict[str, Any]) -> Iterator[tuple[keys.Path, int]]:
    """Where the config says how many experts a token chooses, and how many; the first counts."""
    if family.top_k.isdigit():
        return iter(())
    return keys.values(config, (*family.top_k.split("|"), *keys.TOP_K_KEYS), family.holder)


def groups(family: Family, config: dict[str, Any], source: str, num_experts: int) -> tuple[int, int]:
    """n_group and topk_group; (1, 1) where routing has no groups.

    Those of config.json count for a model_type that the table does not have, whatever family its tensors fit.
    """
    named = any(family_named(name) for name in keys.model_types(config))
    if named and not family.group_top:
        return 1, 1
    if family.group_if is not None:
        key, wanted = family.group_if
        if not any(section.get(key) == wanted for _, section in keys.sections(config, family.holder)):
            return 1, 1
    n_group = keys.first(config, (family.groups, *keys.GROUP_KEYS), family.holder) or 1
    topk_group = keys.first(config, (keys.TOPK_GROUP,), family.holder) or 1
    if n_group < 1 or num_experts % n_group or not 1 <= topk_group <= n_group:
        what = f"{num_experts} experts in {n_group} groups of which {topk_group} are chosen"
        raise InputError(f"{source}: {what} is not possible")
    return (n_group, topk_group) if n_group > 1 else (1, 1)


def score(family: Family, config: dict[str, Any]) -> str:
    """The family's score function, or the one that its config names."""
    for _, section in keys.sections(config, family.holder):
        value = section.get(family.score_key)
        if value in SCORES:
            return str(value)
        if isinstance(value, bool):
            return "softmax" if value else "sigmoid"
    return family.score


def mtp_prefixes(
    family: Family, places: Iterable[Place], stacks: Iterable[str], num_layers: int | None
) -> tuple[str, ...]:
    """Beginnings of the keys of multi-token-prediction blocks, with or without experts."""
    found: set[str] = set()
    for place in places:
        match = MTP.search(place.shape)
        if match and "#" not in place.shape[: match.start()]:
            found.add(place.shape[: match.end()] + ".")
        elif place.stack in stacks and num_layers is not None and not family.stacks:
            found |= {f"{place.stack}.{n}." for n in place.layers if n >= num_layers}
    return tuple(sorted(found))

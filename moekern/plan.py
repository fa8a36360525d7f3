"""Which experts stay: budgets, the plan document and its checks."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moekern import files
from moekern.errors import InputError
from moekern.layer_keys import natural
from moekern.router import Limits, Router, count_problem, nearest_counts

FORMAT = "moekern.plan/1"
TIE = "lowest expert number"
NONUNIFORM = "allow_nonuniform"  # provenance: layers may keep different numbers of experts, although no engine loads it


class Layer(Protocol):
    """One MoE layer, as far as a plan cares."""

    @property
    def num_experts(self) -> int: ...


class Model(Router, Protocol):
    """What check_plan asks of a Layout."""

    @property
    def layers(self) -> Mapping[str, Layer]: ...
    @property
    def mtp(self) -> Mapping[str, Layer]: ...


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer: original numbers of the kept experts, rising; the scores of all E experts, when known."""

    keep: tuple[int, ...]
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """Which experts stay in each layer, and where that came from. The same plan gives the same bytes."""

    layers: Mapping[str, LayerPlan]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 hex of to_json()."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Sorted keys (numbers by value), indent 1, a list of numbers or strings on one line, newline at the end."""
        layers = {
            key: {"keep": list(layer.keep)} | ({} if layer.scores is None else {"scores": list(layer.scores)})
            for key, layer in self.layers.items()
        }
        return _pretty({"format": FORMAT, "layers": layers, "provenance": dict(self.provenance)}, 0) + "\n"

    def save(self, path: str | Path) -> None:
        """Write to_json() to a temporary file beside `path`, then rename."""
        files.write_bytes(path, self.to_json().encode())

    @staticmethod
    def from_json(text: str, source: str = "plan") -> Plan:
        """Read a plan, made by moekern or by hand. Raises InputError, naming `source` and layer, for anything odd."""
        return _parse(text, source)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file. Raises InputError as from_json does."""
        try:
            text = Path(path).read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a readable plan ({error})") from error
        return _parse(text, str(path))


def choose_top(
    scores: Sequence[float],
    kept: int,
    *,
    groups: int = 1,
    protected: Collection[int] = (),
    last: Collection[int] = (),
    where: str = "plan",
) -> tuple[int, ...]:
    """The `kept` experts with the highest scores, as many from each group; ties go to the lowest number.

    Protected experts come first whatever their score, and those in `last` after all others. Raises InputError when a
    group has more of them than places.
    """
    check_protected(len(scores), kept, groups, protected, where)
    quota, size = kept // groups, len(scores) // groups
    chosen: list[int] = []
    for start in range(0, len(scores), size):
        ranked = sorted(range(start, start + size), key=lambda e: (e not in protected, e in last, -scores[e], e))
        chosen += ranked[:quota]
    return tuple(sorted(chosen))


def check_protected(experts: int, kept: int, groups: int, protected: Collection[int], where: str) -> None:
    """Raise InputError when a group has more protected experts than places."""
    quota, size = kept // groups, experts // groups
    for group in range(groups):
        held = sorted(e for e in protected if e // size == group)
        if len(held) > quota:
            place = f"group {group} keeps" if groups > 1 else "it keeps"
            raise InputError(f"{where}: {len(held)} protected experts {held}, but {place} {quota}; keep more")


def super_experts(max_abs: Mapping[str, Sequence[float]]) -> dict[str, tuple[int, ...]]:
    """Experts with extreme outputs, by layer; layers without one are absent (arXiv:2507.23279, rule of REAP's code).

    `max_abs` holds each layer's max |y| [E], in layer order. Super: above both the 99.5th percentile over all layers'
    experts and a tenth of the largest, in the first 75 % of the layers.
    """
    values = np.concatenate([np.asarray(v, dtype=np.float64) for v in max_abs.values()])
    threshold = max(float(np.percentile(values, 99.5)), float(values.max()) / 10)
    early = list(max_abs)[: int(0.75 * len(max_abs))]
    found = {key: tuple(e for e, value in enumerate(max_abs[key]) if value > threshold) for key in early}
    return {key: experts for key, experts in found.items() if experts}


def check_plan(plan: Plan, layout: Model, fingerprint: str, source: str = "plan") -> None:
    """Raise InputError unless `plan` can be executed on the model that `layout` and `fingerprint` describe.

    Refused: another model's plan; an unknown or missing layer; a number out of range or twice; scores that are not one
    an expert; a count the router cannot work with; groups that keep different numbers of experts, and layers that do
    unless the plan's provenance allows it.
    """
    made_for = plan.provenance.get("fingerprint")
    if made_for is not None and made_for != fingerprint:
        raise InputError(
            f"{source}: made for another model (fingerprint {str(made_for)[:12]}, this checkpoint has "
            f"{fingerprint[:12]}); plan again from its own statistics, or, for a twin, remove provenance.fingerprint"
        )
    known = {**layout.layers, **layout.mtp}
    for key in plan.layers:
        if key not in known:
            raise InputError(f"{source}: layer {key!r} is not a MoE layer of this model; it has {_some(known)}")
    missing = [key for key in layout.layers if key not in plan.layers]
    if missing:
        raise InputError(f"{source}: layer {_some(missing)} is missing; every MoE layer needs its list of kept experts")
    for key, layer in plan.layers.items():
        _check_layer(layer, known[key].num_experts, layout, f"{source}: layer {key}")
    if plan.provenance.get(NONUNIFORM) is True:
        return
    first, kept = next((key, len(layer.keep)) for key, layer in plan.layers.items())
    for key, layer in plan.layers.items():
        if len(layer.keep) != kept:
            raise InputError(
                f"{source}: layer {first} keeps {kept} experts and layer {key} keeps {len(layer.keep)}; engines load "
                "one expert count for all layers, so keep the same number everywhere, or plan with --allow-nonuniform "
                f"(in a plan of your own: provenance.{NONUNIFORM}: true)"
            )


def _check_layer(layer: LayerPlan, experts: int, router: Router, where: str) -> None:
    check_ids(layer.keep, where)
    for e in layer.keep:
        if e >= experts:
            raise InputError(f"{where}: expert {_short(e)} is out of range; the layer has experts 0 to {experts - 1}")
    if layer.scores is not None and len(layer.scores) != experts:
        raise InputError(f"{where}: {len(layer.scores)} scores for {experts} experts; give one for each, or none")
    limits = Limits(experts, router.top_k, router.n_group, router.topk_group, router.group_top)
    problem = count_problem(len(layer.keep), limits)
    if problem:
        raise InputError(
            f"{where}: keeps {len(layer.keep)} experts: {problem}; {nearest_counts(len(layer.keep), limits)}"
        )
    size = experts // router.n_group
    per_group = [sum(e // size == group for e in layer.keep) for group in range(router.n_group)]
    if len(set(per_group)) > 1:
        raise InputError(f"{where}: groups of {size} experts keep {per_group}; every group must keep the same number")


def check_ids(keep: Sequence[Any], where: str) -> None:
    """Raise InputError unless `keep` is a list of distinct expert numbers."""
    for e in keep:
        if type(e) is not int or e < 0:
            raise InputError(f"{where}: expected expert numbers, got {_short(e)}")
    if len(set(keep)) < len(keep):
        twice = next(e for e in keep if list(keep).count(e) > 1)
        raise InputError(f"{where}: expert {_short(twice)} is listed twice")


def _some(names: Collection[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _parse(text: str, source: str) -> Plan:
    try:
        document = json.loads(text, object_pairs_hook=_distinct, parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not a plan: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else document
        raise InputError(f'{source}: expected an object with "format": "{FORMAT}", got {_short(found)}')
    _known_keys(document, ("format", "layers", "provenance"), source)
    layers, provenance = document.get("layers"), document.get("provenance", {})
    if not isinstance(layers, dict) or not layers:
        raise InputError(f"{source}: layers: expected an object of layers, got {_short(layers)}")
    if not isinstance(provenance, dict):
        raise InputError(f"{source}: provenance: expected an object, got {_short(provenance)}")
    ordered = sorted(layers, key=natural)
    return Plan({key: _parse_layer(layers[key], f"{source}: layer {_short(key)}") for key in ordered}, provenance)


def _parse_layer(layer: Any, where: str) -> LayerPlan:
    if not isinstance(layer, dict) or not isinstance(layer.get("keep"), list) or not layer["keep"]:
        raise InputError(f'{where}: expected an object with "keep": [expert numbers], got {_short(layer)}')
    _known_keys(layer, ("keep", "scores"), where)
    check_ids(layer["keep"], where)
    scores = layer.get("scores")
    if scores is None:
        return LayerPlan(tuple(sorted(layer["keep"])))
    if not isinstance(scores, list) or not all(_is_score(score) for score in scores):
        raise InputError(f"{where}: scores: expected a list of finite numbers, got {_short(scores)}")
    return LayerPlan(tuple(sorted(layer["keep"])), tuple(float(score) for score in scores))


def _is_score(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _known_keys(document: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in document:
        if key not in known:
            raise InputError(f"{where}: unknown key {_short(key)}; known are {', '.join(known)}")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {_short(next(k for k in keys if keys.count(k) > 1))} appears twice in one object")
    return document


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{_short(text)} is not a finite number")
    return value


def _pretty(value: Any, depth: int) -> str:
    """JSON with sorted keys, one space a level, and lists without lists or objects in them on one line."""
    pad, end = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, Mapping) and value:
        items = [f"{json.dumps(str(k))}: {_pretty(value[k], depth + 1)}" for k in sorted(value, key=natural)]
        return "{" + ",".join(pad + item for item in items) + end + "}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        return "[" + ",".join(pad + _pretty(item, depth + 1) for item in value) + end + "]"
    return json.dumps(value, allow_nan=False)

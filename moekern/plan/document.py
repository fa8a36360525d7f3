"""Which experts stay: budgets, the plan document and its checks."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moekern import files
from moekern.checkpoint.strict_json import check_depth, read_file, short, unique
from moekern.errors import InputError
from moekern.layer_keys import natural
from moekern.plan.channels import WIDTH_CAP, channel_count, channel_ids, channel_text
from moekern.plan.groups import Group, groups_document, parsed_groups
from moekern.plan.replacement import Replacement, replacement_of
from moekern.rows import Row, html_table, write_csv

FORMAT = "moekern.plan/1"
# of a plan that says which channels of an expert stay, which experts are merged, or what stands for dropped ones
NARROW = "moekern.plan/2"
FORMATS = (FORMAT, NARROW)
SIZE_CAP = 32 << 20  # bytes of a plan's text, where those of the largest models take 1 MB
LAYER_CAP, KEY_CAP = 10_000, 256  # layers of a plan, and characters of a layer's key
Mtp = Literal["prune", "drop", "keep"]  # what becomes of MTP layers; provenance: "mtp"
MTP_MODES: tuple[Mtp, ...] = ("prune", "drop", "keep")
NONUNIFORM = "allow_nonuniform"  # provenance: layers may keep different numbers of experts, although no engine loads it


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer: original numbers of the kept experts, rising; the scores of all E experts, when known; and where
    experts lose channels (rows of gate and up, columns of down), those that stay, for each kept expert as
    `channels.channel_text`; and where experts are merged, for each kept one its members."""

    keep: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    channels: tuple[str, ...] | None = None
    groups: tuple[Group, ...] | None = None


@dataclass(frozen=True, repr=False)
class Plan:
    """Which experts stay in each layer, and where that came from. The same plan gives the same bytes.

    replace: what stands in the place of the others, where the router stays whole and goes on choosing them."""

    layers: Mapping[str, LayerPlan]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    replace: Replacement | None = None

    def __repr__(self) -> str:
        counts = sorted({len(layer.keep) for layer in self.layers.values()}) or [0]
        kept = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        of = f" of {self.provenance['num_experts']}" if "num_experts" in self.provenance else ""
        by = f", {self.provenance['criterion']}" if "criterion" in self.provenance else ""
        instead = "" if self.replace is None else f", the others {self.replace.constants}"
        return f"Plan({kept}{of} experts in each of {len(self.layers)} layers{instead}{by}, {self.digest[:12]})"

    @property
    def width(self) -> int | None:
        """The channels that every kept expert has left; None where experts stay whole. Raises InputError for channels
        of the first one that are no `channels.channel_text`."""
        key, first = next(iter(self.layers.items()), ("", LayerPlan(())))
        if not first.channels:
            return None
        return len(ids_of(first.channels[0], f"plan: layer {short(key)}: channels of expert {short(first.keep[0])}"))

    @property
    def merges(self) -> bool:
        """Whether experts are merged into those that stay."""
        return any(layer.groups is not None for layer in self.layers.values())

    def _repr_html_(self) -> str:
        return html_table(repr(self), [
            {"layer": key, "kept": len(layer.keep), "experts": " ".join(map(str, layer.keep))}
            for key, layer in self.layers.items()
        ])  # fmt: skip

    def to_rows(self) -> list[Row]:
        """A row an expert: layer, expert, whether it is kept, its score. Of a layer without scores, those that stay."""
        rows: list[Row] = []
        for key, layer in self.layers.items():
            kept = set(layer.keep)
            for e in layer.keep if layer.scores is None else range(len(layer.scores)):
                score = None if layer.scores is None else layer.scores[e]
                rows.append({"layer": key, "expert": e, "kept": e in kept, "score": score})
        return rows

    def to_csv(self, path: str | Path) -> None:
        """Write the same rows to a file."""
        write_csv(self.to_rows(), path)

    @property
    def digest(self) -> str:
        """sha256 hex of to_json()."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Sorted keys (numbers by value), indent 1, a list of numbers or strings on one line, newline at the end."""
        layers = {
            key: {"keep": list(layer.keep)}
            | ({} if layer.scores is None else {"scores": list(layer.scores)})
            | ({} if layer.channels is None else {"channels": list(layer.channels)})
            | groups_document(layer.groups, layer.keep)
            for key, layer in self.layers.items()
        }
        form = FORMAT if self.width is None and not self.merges and self.replace is None else NARROW
        document = {"format": form, "layers": layers, "provenance": dict(self.provenance)}
        if self.replace is not None:
            document["replace"] = self.replace.document()
        return pretty(document) + "\n"

    def save(self, path: str | Path, *, new: bool = False) -> bool:
        """Write to_json() to a temporary file beside `path`, then rename; with `new`, where nothing is, or this very
        plan: then False."""
        return files.write_bytes(path, self.to_json().encode(), new=new)

    @staticmethod
    def from_json(text: str, source: str = "plan") -> Plan:
        """Read a plan, made by moekern or by hand. Raises InputError, naming `source` and layer, for anything odd."""
        return plan_of(parsed(text, source), source)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file. Raises InputError as from_json does."""
        return Plan.from_json(plan_text(path), str(path))


def plan_text(path: str | Path) -> str:
    """The text of a plan file. Raises InputError for a file that is none: a pipe, too long, not UTF-8."""
    try:
        return read_file(Path(path), SIZE_CAP).decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not a readable plan (no UTF-8 text); name a file that `moekern plan` wrote"
        ) from error
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: not a readable plan ({reason})") from error


def planned_mtp(plan: Plan) -> Mtp:
    """What a plan says about MTP layers; where it says nothing "prune", and "keep" where dropped experts are replaced,
    of whose MTP layers nothing is known. Raises InputError for another word."""
    said = plan.provenance.get("mtp", "prune" if plan.replace is None else "keep")
    for mode in MTP_MODES:
        if said == mode:
            return mode
    raise InputError(f"plan: provenance.mtp is {short(said)}; expected one of {', '.join(MTP_MODES)}")


def check_ids(keep: Sequence[Any], where: str) -> None:
    """Raise InputError unless `keep` is a list of distinct expert numbers."""
    seen: set[int] = set()
    for e in keep:
        if type(e) is not int or e < 0:
            raise InputError(f"{where}: expected expert numbers, got {short(e)}")
        if e in seen:
            raise InputError(f"{where}: expert {short(e)} is listed twice")
        seen.add(e)


def some_of(names: Collection[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def parsed(text: str, source: str) -> Any:
    """The JSON of a plan, of moekern's or of another tool's. Raises InputError for duplicate keys, deep nesting, and
    numbers that are not finite."""
    try:
        document = json.loads(text, object_pairs_hook=unique, parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not a plan: {error}") from None
    check_depth(document, source)
    return document


def plan_of(document: Any, source: str) -> Plan:
    """The plan that JSON holds. Raises InputError, naming `source` and layer, for anything odd."""
    form = document.get("format") if isinstance(document, dict) else document
    if not isinstance(document, dict) or form not in FORMATS:
        known = " or ".join(f'"{each}"' for each in FORMATS)
        raise InputError(f'{source}: expected an object with "format": {known}, got {short(form)}')
    keys = ("format", "layers", "provenance")
    _known_keys(document, (*keys, "replace") if form == NARROW else keys, source)
    layers, provenance = document.get("layers"), document.get("provenance", {})
    replace = replacement_of(document["replace"], f"{source}: replace") if "replace" in document else None
    if not isinstance(layers, dict) or not layers:
        raise InputError(f"{source}: layers: expected an object of layers, got {short(layers)}")
    if not isinstance(provenance, dict):
        raise InputError(f"{source}: provenance: expected an object, got {short(provenance)}")
    check_layers(layers, source)
    merged = form == NARROW and any(isinstance(layer, dict) and "groups" in layer for layer in layers.values())
    own = ("groups",) if merged else ("channels",) if form == NARROW and replace is None else ()
    plan = Plan({
        key: _parse_layer(layers[key], f"{source}: layer {short(key)}", own) for key in sorted(layers, key=natural)
    }, provenance, replace)  # fmt: skip
    if merged and replace is not None:
        raise InputError(f"{source}: replace: experts that are merged leave no others to replace; leave one out")
    _check_widths(plan, source)
    return plan


def check_layers(layers: Collection[str], source: str) -> None:
    """Raise InputError for more layers, or longer names of them, than any model has."""
    longest = max(layers, key=len)
    if len(longest) > KEY_CAP:
        raise InputError(f"{source}: layer {short(longest)}: a name of {len(longest)} characters; at most {KEY_CAP}")
    if len(layers) > LAYER_CAP:
        raise InputError(f"{source}: {len(layers)} layers, more than the limit of {LAYER_CAP}")


def _parse_layer(layer: Any, where: str, own: Sequence[str]) -> LayerPlan:
    """own: the keys beside those of every layer: of channels, which all must have, or of groups, which may be left
    out. A plan has one of the two."""
    if not isinstance(layer, dict) or not isinstance(layer.get("keep"), list) or not layer["keep"]:
        raise InputError(f'{where}: expected an object with "keep": [expert numbers], got {short(layer)}')
    _known_keys(layer, ("keep", "scores", *own), where)
    keep, scores, channels = layer["keep"], layer.get("scores"), layer.get("channels")
    narrow = "channels" in own
    check_ids(keep, where)
    if scores is not None and not (isinstance(scores, list) and all(_is_score(score) for score in scores)):
        raise InputError(f"{where}: scores: expected a list of finite numbers, got {short(scores)}")
    if not narrow:
        channels = []
    elif not isinstance(channels, list) or len(channels) != len(keep):
        raise InputError(f"{where}: channels: expected a list with one entry for each of the {len(keep)} kept experts")
    order = sorted(range(len(keep)), key=keep.__getitem__)
    texts = [_parse_channels(channels[i], f"{where}: channels of expert {keep[i]}") for i in (order if narrow else ())]
    kept = tuple(keep[i] for i in order)
    return LayerPlan(
        kept,
        None if scores is None else tuple(float(score) for score in scores),
        tuple(texts) if narrow else None,
        parsed_groups(layer["groups"], kept, where) if "groups" in layer else None,
    )


def _parse_channels(channels: Any, where: str) -> str:
    """The text of channels, which a person may give as a list of numbers."""
    if isinstance(channels, list) and all(type(c) is int and 0 <= c < WIDTH_CAP for c in channels):
        if len(set(channels)) < len(channels):
            raise InputError(f"{where}: one is listed twice")
        channels = channel_text(np.array(channels, np.int64), max(channels, default=0) + 1) or None
    ids = ids_of(channels, where)
    return channel_text(ids, int(ids[-1]) + 1)


def ids_of(channels: Any, where: str) -> np.ndarray:
    """The channels that a text names, int64 and rising. Raises InputError, which begins with `where`, for what is no
    text of channels, or of none."""
    try:
        if not isinstance(channels, str) or not len(ids := channel_ids(channels)):
            raise ValueError("expected numbers of channels, or a text with a hexadecimal digit for each four of them")
    except ValueError as error:
        raise InputError(f"{where}: {error}, got {short(channels)}") from None
    return ids


def _check_widths(plan: Plan, source: str) -> None:
    """Raise InputError unless all experts of all layers have as many channels: config.json holds one number."""
    for key, layer in plan.layers.items():
        for e, text in zip(layer.keep, layer.channels, strict=True) if layer.channels else ():
            if channel_count(text) != plan.width:
                found = f"{channel_count(text)} channels, and the first one of the plan {plan.width}"
                raise InputError(f"{source}: layer {short(key)}: expert {e} has {found}; all must have as many")


def _is_score(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _known_keys(document: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in document:
        if key not in known:
            raise InputError(f"{where}: unknown key {short(key)}; known are {', '.join(known)}")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{short(text)} is not a finite number")
    return value


def pretty(value: Any, depth: int = 0) -> str:
    """JSON with sorted keys, one space a level, and lists without lists or objects in them on one line."""
    pad, end = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, Mapping) and value:
        items = [f"{json.dumps(str(k))}: {pretty(value[k], depth + 1)}" for k in sorted(value, key=natural)]
        return "{" + ",".join(pad + item for item in items) + end + "}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        return "[" + ",".join(pad + pretty(item, depth + 1) for item in value) + end + "]"
    return json.dumps(value, allow_nan=False)

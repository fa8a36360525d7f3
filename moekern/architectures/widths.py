"""The numbers that hold how wide experts are, and whether experts can lose channels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from moekern.architectures import config_keys as keys
from moekern.architectures.channels import PLAIN
from moekern.architectures.config_keys import Path
from moekern.architectures.layout import Layout, MoeLayer, SharedTensor
from moekern.architectures.patterns import SIDE
from moekern.architectures.quantisation import quantisation_of
from moekern.architectures.table import Family, family_named
from moekern.checkpoint.folder import Checkpoint

GENERAL = ("intermediate_size", "ffn_hidden_size")  # keys that size other MLPs too, where there are any
MLP = r"(?:gate_proj|up_proj|down_proj|gate_up_proj|w[123])"
SHARED = re.compile(r"\.shared_(?:experts?|mlp)\.(?P<name>[\w.]+)$")
OUTER = re.compile(r"(?:gate_proj|up_proj|linear_gate|w1|w3)\.(?:weight|bias)")  # rows are channels
INNER = re.compile(r"(?:down_proj|w2)\.weight")  # columns are
DENSE = re.compile(rf"\.(?:mlp|feed_forward|ffn|residual_mlp)\.{MLP}\.weight(?:_packed)?$")


def with_widths(checkpoint: Checkpoint, layout: Layout) -> Layout:
    """The layout with the config keys of the width and, where the shared expert follows it, that one's tensors."""
    if layout.family.shared:
        layers, mtp = (_with_shared(checkpoint, layers) for layers in (layout.layers, layout.mtp))
        names = [tensor.name for layer in (*layers.values(), *mtp.values()) for tensor in layer.shared]
        coded = any(checkpoint.tensors[name].dtype not in PLAIN for name in names)
        layout = replace(layout, layers=layers, mtp=mtp, shared_coded=coded)
    return replace(layout, width_paths=width_paths(layout.family, checkpoint.config, layout.width))


def _with_shared(checkpoint: Checkpoint, layers: Mapping[str, MoeLayer]) -> dict[str, MoeLayer]:
    """The layers with the tensors of their shared experts: [n I, H] of gate and up, [H, n I] of down, and others."""
    owner = {layer.prefix: key for key, layer in layers.items()}
    found: dict[str, list[SharedTensor]] = {}
    for name in checkpoint.tensors:
        match = SHARED.search(name)
        parts = name[: match.start()].split(".") if match else []
        key = next((owner[p] for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in owner), None)
        if match and key is not None:
            outer, inner = OUTER.fullmatch(match["name"]), INNER.fullmatch(match["name"])
            found.setdefault(key, []).append(SharedTensor(name, 0 if outer else 1 if inner else None))
    return {key: replace(layer, shared=tuple(found.get(key, ()))) for key, layer in layers.items()}


def width_paths(family: Family, config: Mapping[str, Any], width: int | None) -> tuple[Path, ...]:
    """Config keys that hold the width; none where the first of the family's keys holds another number."""
    found = list(keys.values(config, tuple(family.width.split("|")), family.holder)) if family.width else []
    return tuple(path for path, value in found if value == width) if found and found[0][1] == width else ()


def shared_times(family: Family, config: Mapping[str, Any]) -> tuple[tuple[Path, ...], int]:
    """Config keys that hold how many times as wide the shared expert is, and that number; 0 where there are none."""
    named = tuple(family.shared.split("|")) if family.shared not in ("", "1") else ()
    found = list(keys.values(config, named, family.holder))
    same = bool(found) and len({value for _, value in found}) == 1
    return (tuple(path for path, _ in found), found[0][1]) if same else ((), 0)


def narrow_numbers(layout: Layout, width: int) -> dict[Path, int]:
    """Config path -> the number that stands there when experts have `width` channels. Shared experts that are a whole
    number of times as wide become no narrower than they are."""
    numbers = dict.fromkeys(layout.width_paths, width)
    if layout.shared_times and layout.width is not None:
        numbers |= dict.fromkeys(layout.shared_paths, -(-layout.shared_times * layout.width // width))
    return numbers


def widths_held(layout: Layout) -> list[int]:
    """The widths that experts of the layout can be stored with, rising, its own the last: quantised ones have whole
    blocks, and shared ones that are quantised and follow are as wide as they were."""
    assert layout.width is not None
    step = layout.step or 1
    return [*(m for m in range(step, layout.width, step) if _holds(layout, m)), layout.width]


def _holds(layout: Layout, width: int) -> bool:
    whole = layout.shared_times * (layout.width or 0) if layout.shared_coded else 0
    return width % (layout.step or 1) == 0 and whole % width == 0


def width_problem(layout: Layout, width: int) -> str | None:
    """Why experts cannot be stored with so many channels, in one line; None where they can, or have no more."""
    if layout.width is None or width >= layout.width or _holds(layout, width):
        return None
    held = widths_held(layout)
    below, above = max((m for m in held if m < width), default=None), min(m for m in held if m > width)
    near = str(above) if below is None else f"{below} or {above}"
    if width % (layout.step or 1):
        what = f"their format stores whole blocks of {layout.step} channels"
    else:
        times = f"{layout.shared_times} x {layout.width}"
        what = f"shared experts, which are quantised and stay {times} wide, are no multiple of {width}"
    return f"{what}; nearest width: {near}"


def mtp_problem(layout: Layout) -> str | None:
    """Why the experts of MTP layers, which no text runs through, cannot lose channels; None where they can."""
    key = next((key for key, layer in layout.mtp.items() if layer.step), None)
    return None if key is None else f"layer {key} (MTP) has quantised experts, whose channels are not cut"


def narrow_problem(checkpoint: Checkpoint, layout: Layout) -> str | None:
    """Why experts of this checkpoint cannot lose channels, in one line; None where they can."""
    family, config, width = layout.family, checkpoint.config, layout.width
    layers = [*layout.layers.values(), *layout.mtp.values()]
    if not any(family_named(name) for name in keys.model_types(config)):
        return (
            f"no family of the table is called {', '.join(keys.model_types(config)) or 'so'}: what reads the width of "
            "its experts is not known"
        )
    if not family.width:
        return f"which key of config.json holds the width of {family.name} experts alone is not known"
    if (quantised := quantisation_of(config)) and not layout.step:
        method = str(quantised.get("quant_method", "")) or "a quantiser's format"
        return f"its weights are quantised ({method:.40}), in a format that experts are not narrowed in"
    for layer in layers:
        if layer.width is None:
            return f"{layer.prefix}: its experts are not stored as plain matrices of gate, up and down"
    if width is None:
        return f"experts of different layers have {', '.join(sorted({str(layer.width) for layer in layers}))} channels"
    if not layout.width_paths:
        return f"no key of config.json holds the width of the experts, {width}: expected {family.width}"
    return _shared_problem(checkpoint, layout, width) or _dense_problem(checkpoint, layout, width)


def _shared_problem(checkpoint: Checkpoint, layout: Layout, width: int) -> str | None:
    """The same as far as shared experts are concerned, whose width follows that of the others."""
    for layer in (*layout.layers.values(), *layout.mtp.values()):
        if not layer.shared or not layout.family.shared:
            continue
        if layout.family.shared == "1":
            return f"{layer.prefix}: its shared expert has the width of the others by the same key of config.json"
        if not layout.shared_paths:
            return f"no key of config.json says how many times as wide shared experts are: {layout.family.shared}"
        for tensor in layer.shared:
            entry = checkpoint.tensors[tensor.name]
            odd = entry.dtype not in PLAIN or (tensor.axis is None and not tensor.name.endswith(".bias"))
            if odd and not layout.shared_coded:
                return f"{tensor.name}: a tensor of a shared expert that is none of its plain matrices"
            if tensor.axis is not None and entry.shape[tensor.axis :][:1] != (width * layout.shared_times,):
                return f"{tensor.name}: shape {list(entry.shape)}, expected {layout.shared_times} x {width} channels"
    return None


def _dense_problem(checkpoint: Checkpoint, layout: Layout, width: int) -> str | None:
    """The same as far as other MLPs are concerned, where the key may be theirs too."""
    general = [path for path in layout.width_paths if path[-1] in GENERAL]
    if not general:
        return None
    for name in _dense(checkpoint):
        if not {width, 2 * width}.isdisjoint(checkpoint.tensors[name].shape):
            return f"{name}: MLPs without experts have their width by {'.'.join(general[0])} too"
    return None


def _dense(checkpoint: Checkpoint) -> Iterator[str]:
    return (name for name in checkpoint.tensors if DENSE.search(name) and not SIDE.search(name))

"""The channels of experts, found from names and shapes, and whether experts can lose some."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from moekern.architectures import config_keys as keys
from moekern.architectures.config_keys import Path
from moekern.architectures.layout import ExpertTensor, Form, Layout, MoeLayer, Projection, SharedTensor
from moekern.architectures.patterns import SIDE, Scheme
from moekern.architectures.quantisation import quantisation_of
from moekern.architectures.table import Family, family_named
from moekern.checkpoint.folder import Checkpoint

PLAIN = ("F64", "F32", "BF16", "F16")
GENERAL = ("intermediate_size", "ffn_hidden_size")  # keys that size other MLPs too, where there are any
MLP = r"(?:gate_proj|up_proj|down_proj|gate_up_proj|w[123])"
SHARED = re.compile(r"\.shared_(?:experts?|mlp)\.(?P<name>[\w.]+)$")
OUTER = re.compile(r"(?:gate_proj|up_proj|linear_gate|w1|w3)\.(?:weight|bias)")  # rows are channels
INNER = re.compile(r"(?:down_proj|w2)\.weight")  # columns are
DENSE = re.compile(rf"\.(?:mlp|feed_forward|ffn|residual_mlp)\.{MLP}\.weight$")
PROJECTIONS: dict[str, Projection] = {name: name for name in get_args(Projection)}

Named = Iterable[tuple[ExpertTensor, str]]  # a tensor, and the name of its projection


def fused_axis(shape: Sequence[int], others: Sequence[Sequence[int]]) -> int | None:
    """The axis along which a projection of `shape` holds gate and up, as the one other, down, tells; None if it does
    not: [2I, H] beside [H, I], or [H, 2I] beside [I, H]."""
    if len(others) != 1:
        return None
    (a, b), (c, d) = shape, others[0]
    return 0 if (a, b) == (2 * d, c) else 1 if (a, b) == (d, 2 * c) else None


def with_channels(
    checkpoint: Checkpoint, family: Family, scheme: Scheme, num_experts: int, named: Named
) -> tuple[list[ExpertTensor], int | None]:
    """A block's expert tensors with projections and channels, and the width. Where they are not the matrices, with or
    without biases, that the scheme stands for, the width is None and no tensor has channels."""
    given = [(replace(tensor, projection=PROJECTIONS[scheme.parts[name]]), name) for tensor, name in named]
    unknown = [tensor for tensor, _ in given], None
    matrices: dict[str, set[tuple[int, ...]]] = {}
    for tensor, name in given:
        entry, ending = checkpoint.tensors[tensor.name], _ending(tensor.name, name)
        if entry.dtype not in PLAIN or ending not in ("", "weight", "bias"):
            return unknown
        if ending != "bias":
            matrices.setdefault(tensor.projection, set()).add(_of_one(entry.shape, scheme, num_experts))
    if matrices.keys() != set(scheme.parts.values()) or any(len(shapes) > 1 for shapes in matrices.values()):
        return unknown
    sides = _sides({projection: shapes.pop() for projection, shapes in matrices.items()}, scheme)
    if sides is None:
        return unknown
    axes, width = sides
    shift = 0 if scheme.indexed or scheme.rows else 1  # the experts of a stack are its first axis
    out = []
    for tensor, name in given:
        fused = tensor.projection == "gate_up"
        alternates = bool(family.alternating) and name.startswith(family.alternating)
        form: Form = ("alternating" if alternates else "halves") if fused else "plain"
        axis: int | None = axes[tensor.projection] + shift
        if _ending(tensor.name, name) == "bias":
            axis = None if tensor.projection == "down" else shift
            want = (2 * width if fused else width,)
            if axis is not None and _of_one(checkpoint.tensors[tensor.name].shape, scheme, num_experts) != want:
                return unknown
        out.append(replace(tensor, channel_axis=axis, channel_form=form))
    return out, width


def _ending(name: str, projection: str) -> str:
    """What follows the projection's name in a tensor's: "" or "weight" of the matrix itself."""
    return name.rpartition(projection)[2].lstrip("._")


def _of_one(shape: tuple[int, ...], scheme: Scheme, num_experts: int) -> tuple[int, ...]:
    """The shape of one expert's part of a tensor."""
    if scheme.indexed:
        return shape
    return (shape[0] // num_experts, *shape[1:]) if scheme.rows else shape[1:]


def _sides(shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[dict[str, int], int] | None:
    """Projection -> the axis of one expert's matrix that is its channels; and their number."""
    if any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        return None
    down = shapes["down"]
    if scheme.rows:
        return (dict.fromkeys(shapes, 0), down[0]) if set(shapes.values()) == {down} else None
    if "gate_up" in shapes:
        axis = fused_axis(shapes["gate_up"], [down])
        return None if axis is None else ({"gate_up": axis, "down": 1 - axis}, down[1 - axis])
    outer = {shape for projection, shape in shapes.items() if projection != "down"}
    return ({"gate": 0, "up": 0, "down": 1}, down[1]) if outer == {down[::-1]} else None


def with_widths(checkpoint: Checkpoint, layout: Layout) -> Layout:
    """The layout with the config keys of the width and, where the shared expert follows it, that one's tensors."""
    if layout.family.shared:
        layers, mtp = (_with_shared(checkpoint, layers) for layers in (layout.layers, layout.mtp))
        layout = replace(layout, layers=layers, mtp=mtp)
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
    if quantised := quantisation_of(config):
        method = str(quantised.get("quant_method", "")) or "a quantiser's format"
        return f"its weights are quantised ({method:.40}), and channels are cut of plain ones only"
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
            if entry.dtype not in PLAIN or (tensor.axis is None and not tensor.name.endswith(".bias")):
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

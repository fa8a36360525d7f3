"""The layers of a checkpoint that a family fits, each checked for missing experts and shapes that disagree."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from moekern.architectures.channels import with_channels
from moekern.architectures.fit import Fit, Found
from moekern.architectures.layout import ExpertTensor, MoeLayer
from moekern.architectures.patterns import Scheme
from moekern.architectures.table import Family
from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError

Keys = list[tuple[str, Found]]


@dataclass
class Layer:
    """The keys of one layer, gathered."""

    stack: str
    number: int
    prefix: str
    mtp: bool
    keys: Keys = field(default_factory=list)

    def of_role(self, role: str) -> Keys:
        return [(name, found) for name, found in self.keys if found.role == role]


def collect_layers(checkpoint: Checkpoint, fitted: Fit, num_layers: int | None, trailing: int) -> list[MoeLayer]:
    """All layers with experts, in order.

    Layers of the main stack numbered num_layers or above predict further tokens (MTP). Raises InputError, naming the
    file or folder and the tensor, for a missing expert or projection and for shapes that give another expert count.
    """
    family = fitted.family
    gathered: dict[tuple[str, int], Layer] = {}
    for found in fitted.found:
        place = found.place
        for name in place.names:
            parts = name.split(".", place.layer_part + 1)
            number = int(parts[place.layer_part])
            if (place.stack, number) not in gathered:
                mtp = place.mtp or (not family.stacks and num_layers is not None and number >= num_layers)
                prefix = ".".join(parts[: place.layer_part + 1])
                gathered[place.stack, number] = Layer(place.stack, number, prefix, mtp)
            gathered[place.stack, number].keys.append((name, found))
    ordered = sorted(gathered.values(), key=lambda layer: (layer.mtp, stack_order(family, layer.stack), layer.number))
    return [finish(checkpoint, family, layer, trailing) for layer in ordered]


def stack_order(family: Family, stack: str) -> int:
    parts = stack.split(".")
    return next((i for i, name in enumerate(family.stacks) if name in parts), len(family.stacks))


def layer_key(family: Family, layer: Layer) -> str:
    """The layer's number; with the stack's name before it where numbers repeat."""
    if family.stacks and not layer.mtp:
        return f"{family.stacks[stack_order(family, layer.stack)]}.{layer.number}"
    named = layer.mtp and any(part.startswith("mtp") for part in layer.stack.split("."))
    return f"mtp.{layer.number}" if named else str(layer.number)


def finish(checkpoint: Checkpoint, family: Family, layer: Layer, trailing: int) -> MoeLayer:
    blocks: dict[str, Keys] = {}
    for name, found in layer.of_role("expert"):
        blocks.setdefault(found.block, []).append((name, found))
    routers = [name for name, _ in layer.of_role("router") if name.endswith("weight")]
    if len(routers) != len(blocks) or not blocks:
        what = f"{len(blocks)} blocks of experts, but {len(routers)} routers ({family.router})"
        what += f" for {layer.keys[0][0]}" if not routers else ""
        raise InputError(f"{checkpoint.folder}: {layer.prefix}: {what}")

    num_experts = checkpoint.tensors[routers[0]].shape[:1]
    rows = (num_experts[0] if num_experts else 0) - trailing
    if rows < 1 and trailing:
        what = f"its router has {rows + trailing} rows, and by config.json {trailing} of them are of no expert"
        raise InputError(f"{checkpoint.folder}: {layer.prefix}: {what}")
    tensors: list[ExpertTensor] = []
    widths: list[tuple[int, int]] = []
    for keys in blocks.values():
        scheme = find_scheme(checkpoint, family, layer.prefix, keys)
        own = indexed(checkpoint, keys, rows, trailing) if scheme.indexed else stacked(checkpoint, keys, rows, scheme)
        projections = {name: place.projection for name, place in keys}
        named = ((tensor, projections[tensor.name]) for tensor in own)
        experts, width, step = with_channels(checkpoint, family, scheme, rows, named)
        tensors += experts
        widths += [] if width is None else [(width, step)]
    for role in ("router", "bias", "table"):
        tensors += steering(checkpoint, layer.of_role(role), rows, trailing)
    one, step = widths[0] if len(set(widths)) == 1 else (None, 0)  # JetMoE's attention experts are no MLPs: none
    return MoeLayer(layer_key(family, layer), layer.prefix, rows, layer.mtp, tuple(tensors), one, step=step)


def find_scheme(checkpoint: Checkpoint, family: Family, prefix: str, keys: Keys) -> Scheme:
    heads = {found.head for _, found in keys}
    projections = {found.projection for _, found in keys}
    if len(heads) > 1:
        raise InputError(
            f"{checkpoint.folder}: {prefix}: experts are stored in {len(heads)} ways: {', '.join(sorted(heads))}"
        )
    known = [scheme for scheme in family.schemes if scheme.head in heads]
    for scheme in known:
        if scheme.projections == projections:
            return scheme
    expected = " or ".join("/".join(sorted(scheme.projections)) for scheme in known)
    found = "/".join(sorted(projections))
    raise InputError(f"{checkpoint.folder}: {prefix}: experts have {found}, expected {expected}")


def indexed(checkpoint: Checkpoint, keys: Keys, num_experts: int, trailing: int) -> Iterable[ExpertTensor]:
    """One tensor an expert. Every expert below num_experts must have every projection.

    No other may be there, but for placeholders of the router's trailing rows.
    """
    experts: dict[str, set[int]] = {}
    templates: dict[str, str] = {}  # held once, not once an expert
    tensors = []
    for name, found in keys:
        parts = name.split(".")
        word, _, digits = parts[found.expert_part].rpartition("_")
        parts[found.expert_part] = f"{word}_{{}}" if word else "{}"
        expert, template = int(digits), ".".join(parts)
        experts.setdefault(found.projection, set()).add(expert)
        tensors.append(ExpertTensor(name, "drop", "expert", expert, templates.setdefault(template, template)))
    for projection, have in experts.items():
        wrong = set(range(num_experts)) ^ (have - set(range(num_experts, num_experts + trailing)))
        if wrong:
            expert = min(wrong)
            template = next(
                t.template for (_, found), t in zip(keys, tensors, strict=True) if found.projection == projection
            )
            what = "is missing" if expert not in have else "has no row in the router"
            name = template.replace("{}", str(expert))
            raise InputError(f"{checkpoint.folder}: {name} {what}; the router has {num_experts} experts")
    return tensors


def stacked(checkpoint: Checkpoint, keys: Keys, num_experts: int, scheme: Scheme) -> Iterable[ExpertTensor]:
    """Tensors with all experts on axis 0. A companion with a single value holds for all experts and is left alone."""
    for name, found in keys:
        shape = checkpoint.tensors[name].shape
        if is_single(shape) and not name.endswith((found.projection, "weight")):
            continue
        rows = shape[0] // num_experts if scheme.rows and shape and num_experts > 0 else 1
        check_rows(checkpoint, name, 0, rows * num_experts)
        yield ExpertTensor(name, "slice", "expert", None, name, rows=rows)


def steering(checkpoint: Checkpoint, keys: Keys, num_experts: int, trailing: int) -> Iterable[ExpertTensor]:
    """Router matrices [E + trailing, ...], vectors with [E] or [E + trailing] on their last axis, and tables of ids."""
    for name, found in keys:
        shape = checkpoint.tensors[name].shape
        if found.role == "table":
            yield ExpertTensor(name, "remap", "table", None, name)
        elif found.role == "router":
            if is_single(shape) and not name.endswith("weight"):
                continue
            check_rows(checkpoint, name, 0, num_experts + trailing)
            yield ExpertTensor(name, "slice", "router", None, name, trailing=trailing)
        else:
            axis = max(0, len(shape) - 1)
            extra = trailing if shape and shape[axis] != num_experts else 0
            check_rows(checkpoint, name, axis, num_experts + extra)
            yield ExpertTensor(name, "slice", "bias", None, name, axis=axis, trailing=extra)


def is_single(shape: tuple[int, ...]) -> bool:
    return all(n == 1 for n in shape)


def check_rows(checkpoint: Checkpoint, name: str, axis: int, expected: int) -> None:
    entry = checkpoint.tensors[name]
    if len(entry.shape) <= axis or entry.shape[axis] != expected or expected <= 0:
        path = checkpoint.folder / entry.shard
        raise InputError(
            f"{path}: {name}: shape {list(entry.shape)}, expected {expected} rows of experts on axis {axis}"
        )

"""What the stages of an estimate are made of: figures and how they are known, what is asked, what headers say."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moekern.architectures import Layout
from moekern.architectures.channels import PLAIN
from moekern.architectures.config_keys import SIZE_CAP, check_sizes, first
from moekern.checkpoint.folder import CONFIG, Checkpoint
from moekern.data.batches import CHUNK_TOKENS
from moekern.errors import InputError
from moekern.estimation.probe import Known, Shapes
from moekern.model.compute import Compute
from moekern.model.sizes import Size, size_of, sizes_of


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a figure, and how it is known."""

    name: str
    value: float
    known: Known


@dataclass(frozen=True)
class Figure:
    """Seconds or bytes: the sum of its parts."""

    parts: tuple[Part, ...]

    @property
    def value(self) -> float:
        return sum(part.value for part in self.parts)

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return {"value": self.value, "parts": [asdict(part) for part in self.parts]}


@dataclass(frozen=True)
class Stage:
    """What one command takes. bound: what most of its time goes to."""

    name: str
    seconds: Figure
    memory: Figure
    gpu_memory: Figure | None
    disk: Figure
    bound: str
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        found = {name: getattr(self, name) for name in ("seconds", "memory", "gpu_memory", "disk")}
        figures = {name: None if figure is None else figure.document() for name, figure in found.items()}
        return {**figures, "bound": self.bound, "notes": list(self.notes)}


@dataclass(frozen=True)
class Asked:
    """What is to be done with the model."""

    tokens: int
    sequence: int = 2048
    domains: int = 1
    tiers: Collection[str] = ()
    keep: float | int = 0.5
    plans: int = 1

    def __post_init__(self) -> None:
        for flag, value in (
            ("--tokens", self.tokens), ("--sequence-length", self.sequence), ("--domains", self.domains),
        ):  # fmt: skip
            if value < 1:
                raise InputError(f"{flag} {value}: expected 1 or more")
        if self.plans < 0:
            raise InputError(f"--plans {self.plans}: expected 0 or more")


@dataclass(frozen=True)
class Layer:
    """Of one decoder layer, from headers alone."""

    size: Size
    experts: int  # E, 0 in a layer without
    routed: int  # weights of all E experts
    copied: bool  # these lie one by one, in plain numbers: they are copied to where they stay, without a conversion


@dataclass(frozen=True)
class Counted:
    """What headers and config say of a model."""

    layers: Sequence[Layer]
    skeleton: Size
    shapes: Shapes
    vocabulary: int  # V

    @property
    def upto(self) -> int:
        """How many layers calibration runs: none behind the last one with experts."""
        return max(i for i, layer in enumerate(self.layers) if layer.experts) + 1

    @property
    def itemsize(self) -> int:
        return self.shapes.dtype.itemsize


def counted(checkpoint: Checkpoint, layout: Layout, compute: Compute, asked: Asked) -> Counted:
    """What the stages are made of. `compute` has its type settled.

    Sizes that the probe computes with are those of tensors, or are held against them. Raises InputError for a size in
    config.json that no model has.
    """
    check_sizes(checkpoint.config, str(checkpoint.folder / CONFIG))
    sizes, dtype = sizes_of(checkpoint, layout), compute.torch_dtype
    assert dtype is not None
    by_place = {int(layer.prefix.rpartition(".")[2]): layer for layer in layout.layers.values()}
    layers = []
    for i, size in sizes.layers.items():
        moe = by_place.get(i)
        experts = () if moe is None else tuple(moe.of_role("expert"))
        entries = {tensor.name: checkpoint.tensors[tensor.name] for tensor in experts}
        inside = sum((size_of(entry) for entry in entries.values()), Size())
        plain = all(entry.dtype in PLAIN for entry in entries.values())
        copied = plain and all(tensor.action != "slice" for tensor in experts)
        layers.append(Layer(size, 0 if moe is None else moe.num_experts, inside.weights, copied))

    def number(*names: str) -> int | None:
        return first(checkpoint.config, names, layout.family.holder)

    routers = [tensor for layer in layout.layers.values() for tensor in layer.of_role("router")]
    hidden = number("hidden_size", "d_model", "n_embd") or 0
    if not any(hidden in entry.shape for entry in checkpoint.tensors.values()):
        hidden = max(math.prod(checkpoint.tensors[tensor.name].shape[1:]) for tensor in routers)
    if not 1 <= hidden <= SIZE_CAP:
        raise InputError(f"{checkpoint.folder}: {routers[0].name}: {hidden} is no width of hidden states")
    heads = min(number("num_attention_heads", "n_heads", "n_head") or 1, hidden)
    routed = max(layers, key=lambda layer: layer.routed)
    inner = max(1, routed.routed // max(1, routed.experts) // (3 * hidden))
    latent = (number("qk_nope_head_dim") or 0) + (number("qk_rope_head_dim") or 0)
    head_size = min(number("head_dim", "attention_head_dim") or latent or hidden // heads, 16 * hidden // heads)
    chunk = max(1, CHUNK_TOKENS // asked.sequence) * asked.sequence
    shapes = Shapes(
        min(chunk, asked.tokens), min(asked.sequence, asked.tokens), hidden, inner, routed.experts,
        layout.router.top_k, heads, head_size, dtype, compute.place,
    )  # fmt: skip
    return Counted(layers, sizes.skeleton, shapes, number("vocab_size") or 0)

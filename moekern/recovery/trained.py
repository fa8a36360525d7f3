"""What trains: float32 values with their gradients and AdamW's moments, put into layers that are filled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moekern.checkpoint.writing import write_tensors
from moekern.model.journal import undamaged
from moekern.model.layerwise import LayerwiseModel
from moekern.model.paged import paged_zeros
from moekern.model.requantised import as_stored
from moekern.recovery.factors import SPARSE, Factored, Rows
from moekern.recovery.selection import Chosen
from moekern.recovery.settings import Training

KINDS = ("value", "gradient", "mean", "square")  # 16 bytes a number that trains
IMPORTANCE = "importance"  # of the rows of what becomes sparse
VALUES = ("value", IMPORTANCE)  # what makes the model
WRITTEN = (*VALUES, "mean", "square")
MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq"}  # as torch's AdamW calls them


def bytes_trained(some: Sequence[Chosen]) -> int:
    """What values, gradients and moments take."""
    return 4 * len(KINDS) * sum(prod(shape) for one in some for _, _, shape in one.values())


@dataclass
class Trained:
    """`folder`: for numbers that memory has no room for; None: it has."""

    layerwise: LayerwiseModel
    some: Sequence[Chosen]
    training: Training
    folder: Path | None = None
    numbers: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # kind and name -> float32, on the CPU
    begun: set[str] = field(default_factory=set)  # names of parameters whose values are there
    bases: dict[str, Tensor] = field(default_factory=dict)  # as the checkpoint has them, of forms that need that, now
    touched: set[str] = field(default_factory=set)  # names of parameters that some gradient has reached
    steps: int = 0
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # name of a value -> its rows that are no zeros, now
    rows: Rows | None = None  # of what becomes sparse

    def __post_init__(self) -> None:
        for one in self.some:
            for part, name, shape in one.values():
                for kind in KINDS:
                    self.numbers[kind, name] = self._zeros(f"{kind}-{len(self.numbers)}", shape)
                if isinstance(one.form, Factored) and part == SPARSE:
                    self.numbers[IMPORTANCE, name] = torch.zeros(shape[:-1])
        names = [name for kind, name in self.numbers if kind == IMPORTANCE]
        if names:
            values, own = ({name: self.numbers[kind, name] for name in names} for kind in ("value", IMPORTANCE))
            self.rows = Rows(values, own, self.training.kept_rows)

    def _zeros(self, name: str, shape: Sequence[int]) -> Tensor:
        if self.folder is None:
            return torch.zeros(*shape)
        return paged_zeros(self.folder / name, shape, "what trains")

    def of_layer(self, layer: int | None) -> list[Chosen]:
        return [one for one in self.some if one.layer == layer]

    def parameters(self, layer: int | None) -> list[Tensor]:
        """Of a layer that is filled: leaves that require gradients."""
        return [self.layerwise.model.get_parameter(one.name) for one in self.of_layer(layer)]

    def put_in(self, layer: int | None) -> None:
        """A layer was filled: its parameters become what their values make."""
        for one in self.of_layer(layer):
            parameter = self.layerwise.model.get_parameter(one.name)
            base = parameter.data
            if one.name not in self.begun:
                begun = one.form.begun(base, self._seed(one.name))
                for part, name, _ in one.values():
                    self.numbers["value", name].copy_(begun[part])
                self.begun.add(one.name)
            if one.form.based:
                self.bases[one.name] = base
            parameter.data = one.form.made(base, self._values(one)).to(base.device, base.dtype)
            parameter.requires_grad_()

    def take_out(self, layer: int | None) -> None:
        """What their values are made with is put back; the others are made anew the next time anyway."""
        for one in self.of_layer(layer):
            parameter = self.layerwise.model.get_parameter(one.name)
            parameter.requires_grad_(False)
            if one.form.based:
                parameter.data = self.bases.pop(one.name)

    def made(self, layer: int | None) -> dict[str, Tensor]:
        """What the parameters of a layer that is filled become, float32 on the CPU, by name."""
        bases = {one.name: self.layerwise.model.get_parameter(one.name).detach() for one in self.of_layer(layer)}
        return {o.name: o.form.made(bases[o.name].cpu(), self._values(o)) for o in self.of_layer(layer)}

    def sparse(self, layer: int | None) -> dict[str, Tensor]:
        """The same of those that are factored, without their products: what an adapter of these is put on."""
        some = [(one, one.form) for one in self.of_layer(layer)]
        return {one.name: form.rest(self._values(one)) for one, form in some if isinstance(form, Factored)}

    def add(self, layer: int | None, gradients: Sequence[Tensor | None]) -> None:
        """Gradients by the layer's `parameters`, summed over some text."""
        for one, G in zip(self.of_layer(layer), gradients, strict=True):
            if G is None:
                continue
            self.touched.add(one.name)
            found = one.form.gradients(self.bases.get(one.name, G), self._values(one), G.float())
            for part, name, _ in one.values():
                self.numbers["gradient", name] += found[part].to("cpu", torch.float32)

    def stepped(self, rate: float) -> float:
        """One step of AdamW (arXiv:1711.05101) by the gradients, which become 0. Returns their norm before it is
        clipped; where that is not finite no value changes."""
        names = self.names
        if self.rows is not None:
            self.rows.seen({name: self.numbers["gradient", name] for name in self.rows.sparse})
        values = []
        for name in names:
            value = self.numbers["value", name]
            value.grad = self.numbers["gradient", name]
            values.append(value)
        norm = float(torch.nn.utils.clip_grad_norm_(values, self.training.clip, foreach=False))
        if not math.isfinite(norm):
            return norm
        optimiser = torch.optim.AdamW(
            values, lr=rate, betas=self.training.betas, weight_decay=self.training.decay, foreach=False
        )
        for name, value in zip(names, values, strict=True):
            moments = {torchs: self.numbers[own, name] for own, torchs in MOMENTS.items()}
            optimiser.state[value] = {"step": torch.tensor(float(self.steps)), **moments}
        optimiser.step()
        for name, value in zip(names, values, strict=True):
            value.grad = None
            self.numbers["gradient", name].zero_()
        self.steps += 1
        return norm

    @property
    def names(self) -> list[str]:
        """Of all values."""
        return [name for one in self.some for _, name, _ in one.values()]

    @contextmanager
    def as_sparse_as_in_the_end(self) -> Iterator[None]:
        """Let what becomes sparse have the rows alone that would stay if these were its last values."""
        self.masks = {} if self.rows is None else self.rows.staying()
        try:
            yield
        finally:
            self.masks = {}

    def _values(self, one: Chosen) -> dict[str, Tensor]:
        return {part: self._value(name) for part, name, _ in one.values()}

    def _value(self, name: str) -> Tensor:
        value, stays = self.numbers["value", name], self.masks.get(name)
        return value if stays is None else value * stays[..., None]

    def _seed(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.training.seed} {name}".encode()).digest()[:6], "big")

    def save(self, path: Path, said: Mapping[str, Any], kinds: Sequence[str] = WRITTEN) -> None:
        """Write values and moments, with what is `said` of them, whole or not at all."""
        own = ((f"{kind}/{name}", value) for (kind, name), value in self.numbers.items() if kind in kinds)
        tensors = {name: as_stored(value) for name, value in own}
        write_tensors(path, tensors, {"said": json.dumps(said)})

    def load(self, path: Path, kinds: Sequence[str] = WRITTEN) -> dict[str, Any]:
        """What `save` wrote; what was said. Raises InputError for a file that something has spoilt."""
        with undamaged(path), safe_open(path, framework="pt") as file:
            for (kind, name), value in self.numbers.items():
                if kind in kinds:
                    value.copy_(file.get_tensor(f"{kind}/{name}"))
        self.begun = {one.name for one in self.some}
        return self.said_in(path)

    @staticmethod
    def said_in(path: Path) -> dict[str, Any]:
        """What was said of what `save` wrote."""
        with undamaged(path), safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()["said"]))

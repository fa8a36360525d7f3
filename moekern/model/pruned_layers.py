"""Drop experts from a decoder layer in memory, so that it computes exactly what the pruned checkpoint's layer computes.

The layer is rebuilt from the configuration with fewer experts, and gets the old layer's tensors. Where the two shapes
differ, the tensor is cut there: this finds the expert axis of every family's stacked experts, routers and biases, and
counts and group sizes are what the model's own code makes of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moekern.architectures import Layout, MoeLayer
from moekern.architectures.id_tables import replace_experts
from moekern.model.expert_lists import LIST, blocks_with_lists
from moekern.model.memory import drop
from moekern.model.transformers_api import Loader, layers_with

KEPT_ATTRIBUTES = ("hook", "forward")  # parts of the names of a module's own state that is not the layer's


@dataclass(frozen=True)
class LivePruner:
    """Prunes decoder layers of one model in memory; experts go by their original numbers, also the second time."""

    loader: Loader
    layout: Layout
    smaller: dict[int, nn.ModuleList] = field(default_factory=dict)  # experts -> decoder layers on the meta device
    held: dict[str, tuple[int, ...]] = field(default_factory=dict)  # layer key -> the experts it has now
    tables: dict[str, Tensor] = field(default_factory=dict)  # name -> the table of expert ids before the first cut

    def prune(self, key: str, keep: Sequence[int]) -> None:
        """Keep these experts, a subset of those that decoder layer `key` holds, whose weights must be loaded."""
        layer = self.layout.layers[key]
        before = self.held.get(key, tuple(range(layer.num_experts)))
        after = tuple(sorted(keep))
        if after == before:
            return
        if not after or not set(after) <= set(before):
            raise ValueError(f"[prune] keep: expected some of layer {key}'s experts {before}, got {after}")
        if len(after) not in self.smaller:
            self.smaller[len(after)] = layers_with(self.loader, self.layout, len(after))
        place = self.loader.moe_places(self.layout)[key]
        name, layers = self.loader.decoder_layers()
        tables = self._tables(layer, f"{name}.{place}.", layers[place], after)
        prune_live(layers[place], self.smaller[len(after)][place], before, after, tables)
        self.held[key] = after

    @contextmanager
    def pruned(self, key: str, keep: Sequence[int]) -> Iterator[None]:
        """As `prune` of a whole layer while the context is open; then the layer is what it was, bit for bit."""
        if key in self.held:
            raise ValueError(f"[pruned] key: expected a whole layer, layer {key} has lost experts already")
        module = self.loader.decoder_layers()[1][self.loader.moe_places(self.layout)[key]]
        before = dict(vars(module))
        try:
            self.prune(key, keep)
            yield
        finally:
            if self.held.pop(key, None) is not None:
                vars(module).clear()
                vars(module).update(before)
                place = self.loader.moe_places(self.layout)[key]
                drop(self.smaller[len(keep)][place])  # it shares tensors with the layer

    def _tables(self, layer: MoeLayer, prefix: str, module: nn.Module, keep: Sequence[int]) -> dict[str, Tensor]:
        """Name within the module -> its table of expert ids for the kept experts, made from the original one."""
        found = {}
        for tensor in layer.of_role("table"):
            name = (self.loader.model_key(tensor.name) or "").removeprefix(prefix)
            values = dict((*module.named_parameters(), *module.named_buffers()))
            if name in values:
                old = self.tables.setdefault(prefix + name, values[name].detach().cpu())
                found[name] = torch.from_numpy(replace_experts(old.numpy(), keep, layer.num_experts)).to(values[name])
        return found


def prune_live(
    module: nn.Module, smaller: nn.Module, before: Sequence[int], after: Sequence[int], tables: dict[str, Tensor]
) -> None:
    """Turn a loaded decoder layer with the experts `before` into `smaller`, one with `after`.

    `smaller` is of the same class, built with len(after) experts, its parameters on the meta device. The module itself
    stays, so that whoever holds it (a forward pass that waits at its door) goes on with fewer experts. `tables` holds
    the new values of tensors that are made of expert ids.
    """
    rank = {expert: i for i, expert in enumerate(before)}
    places = torch.tensor([rank[expert] for expert in after])
    parts = dict(module.named_modules())
    lists = [f"{name}.{LIST}.".lstrip(".") for name, _ in blocks_with_lists(smaller)]
    for path, part in smaller.named_modules():
        old: Any = parts[_before(path, lists, places)]
        for kind in (part._parameters, part._buffers):
            for name, value in list(kind.items()):
                source = getattr(old, name)
                if value is None or source is None:
                    continue
                full = f"{path}.{name}".lstrip(".")
                new = tables[full] if full in tables else _cut(source.detach(), value.shape, places, len(before))
                is_parameter = isinstance(value, nn.Parameter)
                # matmul may take another road, and round otherwise, for what requires a gradient
                kind[name] = nn.Parameter(new, requires_grad=source.requires_grad) if is_parameter else new
    for name, state in vars(smaller).items():
        if not any(word in name for word in KEPT_ATTRIBUTES):
            module.__dict__[name] = state


def _before(path: str, lists: Sequence[str], places: Tensor) -> str:
    """What was the name of a module of the smaller layer: in a list of experts, the number that its expert had."""
    for start in lists:
        if path.startswith(start):
            number, dot, rest = path.removeprefix(start).partition(".")
            return f"{start}{int(places[int(number)])}{dot}{rest}"
    return path


def _cut(value: Tensor, shape: torch.Size, places: Tensor, experts: int) -> Tensor:
    """`value` with the rows of the experts at `places` of `experts`, along each axis whose size is not that of `shape`.

    An expert's rows follow one another; rows past the last expert's stay.
    """
    for axis, (old, new) in enumerate(zip(value.shape, shape, strict=True)):
        if old == new:
            continue
        rows, rest = divmod(old - new, experts - len(places))
        assert not rest, (value.shape, shape, experts)
        assert old >= experts * rows, (value.shape, shape, experts)
        picked = (places[:, None] * rows + torch.arange(rows)).flatten()
        picked = torch.cat([picked, torch.arange(experts * rows, old)]).to(value.device)
        value = value.index_select(axis, picked)
    return value

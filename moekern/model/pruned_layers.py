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
from moekern.architectures.widths import narrow_numbers
from moekern.errors import InputError
from moekern.model.expert_lists import LIST, blocks_with_lists
from moekern.model.memory import drop
from moekern.model.merged_experts import Merging, combined_rows, merge_live, views_to_merge
from moekern.model.narrow_layers import check_channels, check_cuttable, check_same, narrow_live
from moekern.model.transformers_api import Loader, layers_with

Size = tuple[int, int | None]  # experts, and their channels where some were cut
KEPT_ATTRIBUTES = ("hook", "forward")  # parts of the names of a module's own state that is not the layer's


@dataclass(frozen=True)
class LivePruner:
    """Prunes decoder layers of one model in memory; experts go by their original numbers, also the second time."""

    loader: Loader
    layout: Layout
    smaller: dict[Size, nn.ModuleList] = field(default_factory=dict)  # decoder layers on the meta device
    held: dict[str, tuple[int, ...]] = field(default_factory=dict)  # layer key -> the experts it has now
    widths: dict[str, int] = field(default_factory=dict)  # layer key -> the channels of these, where some were cut
    tables: dict[str, Tensor] = field(default_factory=dict)  # name -> the table of expert ids before the first cut

    def prune(
        self, key: str, keep: Sequence[int], channels: Tensor | None = None, merging: Merging | None = None
    ) -> None:
        """Keep these experts, a subset of those that decoder layer `key` holds, whose weights must be loaded; with
        `channels`, int64 [n, M], only these channels of each, in the order of their numbers, where they have all; with
        `merging`, of a layer that has all experts, others merged into them.

        Raises InputError where channels cannot be cut, or experts not merged.
        """
        layer = self.layout.layers[key]
        before = self.held.get(key, tuple(range(layer.num_experts)))
        after = tuple(sorted(keep))
        if not after or not set(after) <= set(before):
            raise ValueError(f"[prune] keep: expected some of layer {key}'s experts {before}, got {after}")
        module = self._module(key)
        if channels is not None:
            self._check_channels(key, module, channels, len(after))
        whole = None if merging is None else views_to_merge(module, key)
        routers = self._routers(key, module) if merging is not None and merging.rows else {}
        if after != before:
            place = self.loader.moe_places(self.layout)[key]
            tables = self._tables(layer, self._prefix(place), module, after)
            smaller = self._smaller(len(after), self.widths.get(key))[place]
            prune_live(module, smaller, before, after, tables)
            self.held[key] = after
        if merging is not None and whole is not None:
            merge_live(module, whole, merging, after, key)
            for name, value in routers.items():
                path, _, leaf = name.rpartition(".")
                part = module.get_submodule(path)
                made = combined_rows(value, part.get_parameter(leaf).detach(), after, merging.rows)
                part._parameters[leaf] = nn.Parameter(made, requires_grad=value.requires_grad)
        if channels is not None:
            self._narrow(key, module, len(after), channels)

    @contextmanager
    def pruned(
        self, key: str, keep: Sequence[int], channels: Tensor | None = None, merging: Merging | None = None
    ) -> Iterator[None]:
        """As `prune` of a whole layer while the context is open; then the layer is what it was, bit for bit."""
        if key in self.held or key in self.widths:
            raise ValueError(f"[pruned] key: expected a whole layer, layer {key} was pruned already")
        module = self._module(key)
        before = dict(vars(module))
        try:
            self.prune(key, keep, channels, merging)
            yield
        finally:
            held, width = self.held.pop(key, None), self.widths.pop(key, None)
            if held is not None or width is not None:
                now = {name: state for name, state in vars(module).items() if _is_kept(name)}
                vars(module).clear()
                vars(module).update({name: state for name, state in before.items() if not _is_kept(name)} | now)
                count = self.layout.layers[key].num_experts if held is None else len(held)
                self._drop(key, count, width)  # it shares tensors with the layer

    def _module(self, key: str) -> nn.Module:
        return self.loader.decoder_layers()[1][self.loader.moe_places(self.layout)[key]]

    def _prefix(self, place: int) -> str:
        return f"{self.loader.decoder_layers()[0]}.{place}."

    def _smaller(self, count: int, width: int | None) -> nn.ModuleList:
        if (count, width) not in self.smaller:
            numbers = dict.fromkeys(self.layout.count_paths, count)
            numbers |= {} if width is None else narrow_numbers(self.layout, width)
            built = layers_with(self.loader, numbers)
            if width is not None:
                self._check_others(built)
            self.smaller[count, width] = built
        return self.smaller[count, width]

    def _check_others(self, smaller: nn.ModuleList) -> None:
        """Raise InputError where narrower experts make layers without experts narrower too."""
        with_experts = set(self.loader.moe_places(self.layout).values())
        for i, (whole, other) in enumerate(zip(self.loader.decoder_layers()[1], smaller, strict=True)):
            parameters = dict(whole.named_parameters()) if i not in with_experts else {}
            for name, value in other.named_parameters() if parameters else ():
                check_same(parameters[name], value, f"{self._prefix(i)}{name}")

    def _drop(self, key: str, count: int, width: int | None) -> None:
        if (count, width) in self.smaller:
            drop(self.smaller[count, width][self.loader.moe_places(self.layout)[key]])

    def _check_channels(self, key: str, module: nn.Module, channels: Tensor, count: int) -> None:
        if key in self.widths:
            raise ValueError(f"[prune] channels: expected a layer with all of them, layer {key} has lost some already")
        width = check_cuttable(module, key).down.shape[2]
        if channels.ndim != 2 or len(channels) != count or not channels.shape[1]:
            what = f"expected [{count}, M] numbers for layer {key}"
            raise ValueError(f"[prune] channels: {what}, got {list(channels.shape)}")
        check_channels(channels, width, key)

    def _narrow(self, key: str, module: nn.Module, count: int, picked: Tensor) -> None:
        """Cut channels of a layer that has the experts to be kept already."""
        place, layer = self.loader.moe_places(self.layout)[key], self.layout.layers[key]
        smaller, start = self._smaller(count, picked.shape[1])[place], self._prefix(place)
        shared = {
            (self.loader.model_key(tensor.name) or "").removeprefix(start): tensor.axis
            for tensor in layer.shared
            if tensor.axis is not None
        }
        narrow_live(module, smaller, picked, key, shared)
        take_over(module, smaller)
        self._drop(key, count, None)
        self.widths[key] = picked.shape[1]

    def _routers(self, key: str, module: nn.Module) -> dict[str, Tensor]:
        """Name within the module -> matrix and bias of a layer's router, of which rows are combined."""
        prefix = self._prefix(self.loader.moe_places(self.layout)[key])
        there, found = dict(module.named_parameters()), dict[str, Tensor]()
        for tensor in filter(None, self.layout.router_tensors(key)):
            place = (self.loader.model_key(tensor.name) or "").removeprefix(prefix)
            if place not in there or len(there[place]) != self.layout.layers[key].num_experts + tensor.trailing:
                raise InputError(f"layer {key}: {tensor.name} is not held by rows, so that none are combined in memory")
            found[place] = there[place]
        return found

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
    take_over(module, smaller)


def take_over(module: nn.Module, smaller: nn.Module) -> None:
    """Let a decoder layer have all that another one of its class has; the module itself stays."""
    for name, state in vars(smaller).items():
        if not _is_kept(name):
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


def _is_kept(name: str) -> bool:
    """Whether an attribute of a module is its own, whatever layer it is: hooks, and a forward that watches it."""
    return any(word in name for word in KEPT_ATTRIBUTES)

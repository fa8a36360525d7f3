"""Experts of decoder layers, filled a group at a time: of a layer that is larger than the budget, or to convert less
at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from moekern.architectures import Layout, MoeLayer
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import TensorEntry
from moekern.errors import InputError
from moekern.files import sized
from moekern.model.budget import Budget
from moekern.model.dequantised import is_coded
from moekern.model.expert_lists import expert_modules
from moekern.model.experts import experts_of
from moekern.model.memory import room_for, twin
from moekern.model.reader import DTYPES
from moekern.model.sizes import Size, size_of
from moekern.model.transformers_api import Loader, layers_with

WORK = 8  # of a budget, one part in so many is for what computing takes
KERNELS = 1 << 27  # bytes, and so many at least, if no more than half: libraries keep code for each shape of product
HALF = 0.5  # of what is left beside what lies outside of layers: the rest is for hidden states
SLACK = 1 << 14  # bytes of a buffer between tensors
PIECE = 1 << 27  # bytes of weights that are converted together: what conversion needs beside its result

Maker = Callable[[Mapping[str, Tensor]], nn.Module]  # makes a layer of tensors that were read


@dataclass(frozen=True)
class Takes:
    """Bytes that are resident while a model is run, and what the budget leaves."""

    budget: Budget
    outside: int  # of the decoder layers: embeddings, norm, head
    weights: int  # of the layer that computes, and what is being converted for it
    buffer: int  # of the reader, on the host
    groups: int = 1  # in which the experts of the largest layer are run
    ahead: int = 0  # of what computes next, which is filled meanwhile

    @property
    def room(self) -> int:
        """Bytes of the host's memory for hidden states."""
        return max(0, less_work(self.budget.host) - self.buffer - (self.on_device if self.budget.gpu is None else 0))

    @property
    def on_device(self) -> int:
        return self.outside + self.weights + self.ahead

    def within(self, share: float = 1) -> bool:
        """Whether this fits, into such a share of what is there beside what lies outside of layers."""
        host, gpu = less_work(self.budget.host), self.budget.gpu
        if gpu is None:
            return self.weights + self.ahead + self.buffer <= share * (host - self.outside)
        return self.weights + self.ahead <= share * (less_work(gpu) - self.outside) and self.buffer <= share * host

    @property
    def described(self) -> str:
        """For people."""
        groups = f"; experts run in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.needs}, {sized(self.room)} are left for hidden states{groups}"

    @property
    def needs(self) -> str:
        """What is resident, in words."""
        ahead = f", {sized(self.ahead)} for the next one, filled meanwhile" if self.ahead else ""
        layer = f"{sized(self.weights)} for the largest of them{ahead}"
        return f"{sized(self.outside)} outside of layers, {layer}, {sized(self.buffer)} for reading"

    def refusal(self, why: str) -> InputError:
        """The error for a model that does not fit, and why it cannot be made to."""
        what = f"not enough memory: {self.needs}, of {self.budget.described}"
        return InputError(f"{what}: {why}; give more (--memory, --gpu-memory)", kind="memory")


@dataclass
class ExpertGroups:
    """Fills the experts of decoder layers in groups of consecutive numbers.

    A group is filled into the layer of a model that is built with so many experts, which shares everything else.
    """

    checkpoint: Checkpoint
    layout: Layout
    loader: Loader
    layers: nn.ModuleList
    layers_name: str
    keys: Mapping[int, str]  # decoder layer -> plan key, for the layers with experts
    targets: Mapping[str, str]  # the checkpoint's name of a tensor -> the model's; "" where it has none
    device: torch.device
    cuts: dict[int, tuple[range, ...]] = field(default_factory=dict)  # of layers that are too large: their groups
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)  # (layer, group) -> number in the reader
    piece: int | None = None  # bytes of a layer's experts that are converted together; None: all
    smaller: dict[int, nn.ModuleList] = field(default_factory=dict)  # experts -> decoder layers on the meta device
    obstacles: dict[int, str | None] = field(default_factory=dict)  # layer -> see `obstacle`
    divided: dict[int, frozenset[str]] = field(default_factory=dict)  # layer -> see `parameters`
    sizes: dict[int, Size] = field(default_factory=dict)  # layer -> see `size`
    copied: dict[int, bool] = field(default_factory=dict)  # layer -> see `_copied`

    def of(self, i: int) -> MoeLayer:
        return self.layout.layers[self.keys[i]]

    def obstacle(self, i: int) -> str | None:
        """Why the experts of a layer cannot be filled in groups; None where they can."""
        if i not in self.obstacles:
            self.obstacles[i] = self._obstacle(i)
        return self.obstacles[i]

    def _obstacle(self, i: int) -> str | None:
        if i not in self.keys:
            return "it has no experts"
        block, layer = experts_of(self.layers[i]), self.of(i)
        if block is None or expert_modules(block) is not None:
            return "its experts are not called in one of the ways that are known here"
        if self.smallest(i) >= layer.num_experts:
            return f"it has {layer.num_experts} experts"
        if any(tensor.action == "slice" and tensor.axis for tensor in layer.of_role("expert")):
            return "experts lie on an inner axis of its tensors"
        start, own = f"{self.layers_name}.{i}.", self.parameters(i)
        for tensor in layer.of_role("expert"):
            if self.targets[tensor.name].removeprefix(start) not in own:
                return f"{tensor.name} is not divided by experts alone, or lies outside of their module"
        return None

    def parameters(self, i: int) -> frozenset[str]:
        """Names, within a layer, of the parameters of its experts' module that are divided by experts."""
        if i not in self.divided:
            block, start = experts_of(self.layers[i]), f"{self.layers_name}.{i}."
            within = next(name for name, module in self.layers[i].named_modules() if module is block) + "."
            routers = {self.loader.model_key(t.name) for t in self.of(i).tensors if t.role != "expert"}
            small, E = dict(self._with(self.smallest(i))[i].named_parameters()), self.of(i).num_experts
            self.divided[i] = frozenset(
                name
                for name, value in self.layers[i].named_parameters()
                if name.startswith(within)
                and start + name not in routers
                and value.shape != small[name].shape
                and value.shape[1:] == small[name].shape[1:]
                and value.shape[0] * self.smallest(i) == small[name].shape[0] * E
            )
        return self.divided[i]

    def smallest(self, i: int) -> int:
        """The fewest experts of a group: one is built as none by some models, and groups of the router's stay whole."""
        return max(2, self.layout.n_group)

    def cut(self, i: int, most: int) -> tuple[range, ...]:
        """The experts of a layer in as few groups of at most `most` as there can be, about equal, none too small."""
        unit, E = self.layout.n_group, self.of(i).num_experts
        units, fewest = E // unit, self.smallest(i) // unit
        number = max(1, min(-(-units // max(1, most // unit)), units // fewest))
        bounds = [*(units * g // number * unit for g in range(number)), E]
        return tuple(range(first, stop) for first, stop in pairwise(bounds))

    def divide(self, names: Sequence[Sequence[str]], budget: Budget, ahead: bool = False) -> Takes:
        """Cut layers that are too large for the budget; `names` are the tensors of each layer. With `ahead`, the next
        layer, or group, is filled while one computes, where there is room for it.

        Raises InputError where a layer is too large and cannot be cut, or where no cut is small enough.
        """
        takes = self._divided(names, budget)
        filled = [sum(p.nbytes for p in layer.parameters()) for layer in self.layers]
        for i, groups in self.cuts.items():
            share = max(map(len, groups)) / self.of(i).num_experts
            filled[i] = round(max(filled[i] - self.held(i), share * self.held(i)))
        more = replace(takes, ahead=max(filled))
        # on a GPU nothing else waits for what is left; on the host hidden states do
        return more if ahead and more.within(HALF if budget.gpu is None else 1) else takes

    def _divided(self, names: Sequence[Sequence[str]], budget: Budget) -> Takes:
        """See `divide`."""
        stored = [sum(self.checkpoint.tensors[name].nbytes for name in own) for own in names]
        filled = [sum(p.nbytes for p in layer.parameters()) for layer in self.layers]
        outside = sum(p.nbytes for p in self.loader.model.parameters()) - sum(filled)
        for self.piece, share in ((None, HALF), (PIECE, 1)):  # pieces take a copy more, and so time
            whole = Takes(budget, outside, max(n + self._converted(i) for i, n in enumerate(filled)), max(stored))
            if whole.within(share):
                return whole
        alone = [i for i in range(len(self.layers)) if self.obstacle(i) is not None]
        fixed = replace(
            whole,
            weights=max((filled[i] + self._converted(i) for i in alone), default=0),
            buffer=max((stored[i] for i in alone), default=0),
        )
        if not fixed.within():
            if not alone:
                raise whole.refusal("what lies outside of layers is too large by itself")
            i = max(alone, key=lambda i: filled[i] + stored[i])
            raise whole.refusal(f"decoder layer {i} cannot be run in groups of experts: {self.obstacle(i)}")
        found = fixed
        for share in (HALF, 1):
            for number in range(2, 1 + max((self.of(i).num_experts for i in self.keys), default=1)):
                cuts = {i: self.cut(i, -(-self.of(i).num_experts // number)) for i in self.keys if i not in alone}
                found = self._takes(fixed, cuts, stored, filled)
                if found.within(share):
                    self.cuts |= cuts
                    return found
        raise found.refusal("no smaller groups of experts can be run")

    def _takes(
        self, fixed: Takes, cuts: Mapping[int, Sequence[range]], stored: Sequence[int], filled: Sequence[int]
    ) -> Takes:
        """With these cuts: of each layer what is no expert's, and a group, which is converted or copied."""
        weights, buffer = [fixed.weights], [fixed.buffer]
        for i, groups in cuts.items():
            share, read, held = max(map(len, groups)) / self.of(i).num_experts, self.size(i).stored, self.held(i)
            weights.append(round(max(0, filled[i] - held) + (1 if self._copied(i) else 2) * share * held))
            buffer.append(round(max(stored[i] - read, share * read)) + SLACK)
        return replace(fixed, weights=max(weights), buffer=max(buffer), groups=max(map(len, cuts.values()), default=1))

    def _converted(self, i: int) -> int:
        """Bytes that are held beside the weights of a layer while these are made: conversion stacks and joins."""
        if self._copied(i):
            return 0
        return min(self.held(i), 2 * PIECE) if self._by_pieces(i) else self.held(i)

    def _by_pieces(self, i: int) -> bool:
        """Whether the experts of a layer that is not cut are converted a piece at a time."""
        large = self.piece is not None and self.held(i) > self.piece
        return large and not self._copied(i) and i not in self.cuts and self.obstacle(i) is None

    def _copied(self, i: int) -> bool:
        """Whether the experts of a layer are copied to where they stay, without a conversion."""
        if i not in self.copied:
            experts = self.of(i).of_role("expert") if i in self.keys else ()
            first = {tensor.name: self.checkpoint.tensors[tensor.name].dtype for tensor in experts if not tensor.expert}
            coded = (is_coded(name, torch.empty(0, dtype=DTYPES.get(dtype))) for name, dtype in first.items())
            self.copied[i] = bool(first) and not any(coded) and self.loader.only_stacked(first)
        return self.copied[i]

    def reading(self, names: Sequence[Sequence[str]]) -> list[list[TensorEntry]]:
        """What is read at a time: each layer, without experts where it is cut; then each group, which is numbered."""
        found = []
        for i, own in enumerate(names):
            left_out = self.names(i) if i in self.cuts else set()
            found.append([self.checkpoint.tensors[name] for name in own if name not in left_out])
        for i, groups in self.cuts.items():
            for g, experts in enumerate(groups):
                self.numbers[i, g] = len(found)
                found.append(self.entries(i, experts))
        return found

    def names(self, i: int) -> set[str]:
        """The checkpoint's names of the tensors that hold a layer's experts."""
        return {tensor.name for tensor in self.of(i).of_role("expert")} if i in self.keys else set()

    def size(self, i: int) -> Size:
        """Of all experts of a layer."""
        if i not in self.sizes:
            self.sizes[i] = sum((size_of(self.checkpoint.tensors[name]) for name in self.names(i)), Size())
        return self.sizes[i]

    def held(self, i: int) -> int:
        """Bytes of all experts of a layer that is filled."""
        return self.size(i).weights * self.loader.dtype.itemsize

    def entries(self, i: int, experts: range) -> list[TensorEntry]:
        """What the files hold of some experts of a layer: whole tensors, and rows of stacked ones."""
        found = []
        for tensor in self.of(i).of_role("expert"):
            entry = self.checkpoint.tensors[tensor.name]
            if tensor.action == "slice":
                row = entry.nbytes // entry.shape[0] * tensor.rows if entry.shape[0] else 0
                shape = (len(experts) * tensor.rows, *entry.shape[1:])
                start = entry.start + experts.start * row
                found.append(replace(entry, shape=shape, start=start, stop=start + len(experts) * row))
            elif tensor.expert in experts:
                found.append(entry)
        return found

    def named(self, number: int) -> str:
        """What the reader knows by this number, in words."""
        if number < len(self.layers):
            return f"the weights of decoder layer {number}"
        i, g = self._group(number)
        experts = self.cuts[i][g]
        return f"experts {experts.start} to {experts.stop - 1} of decoder layer {i}"

    def _group(self, number: int) -> tuple[int, int]:
        return next(place for place, each in self.numbers.items() if each == number)

    def maker(self, number: int) -> Maker:
        """What makes a twin of a layer, or a layer with a group of experts, of what the reader knows by this number.

        What it needs of the model that computes is taken here: it may be called in another thread.
        """
        if number >= len(self.layers):
            i, g = self._group(number)
            self._with(len(self.cuts[i][g]))
            return partial(self.fill, i, self.cuts[i][g])
        layer = twin(self.layers[number])
        if not self._by_pieces(number):
            return partial(self._fill_layer, number, layer)
        for experts in self._pieces(number):
            self._with(len(experts))
        return partial(self._fill_by_pieces, number, layer, self.parameters(number))

    def fill(self, i: int, experts: range, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Decoder layer i with these experts alone, made of their tensors; of all else it has what these hold.

        Raises InputError for a tensor that is missing.
        """
        small = twin(self._with(len(experts))[i])
        renamed = {}
        for tensor in self.of(i).of_role("expert"):
            if tensor.name in tensors:
                new = tensor.name if tensor.expert is None else tensor.renamed(tensor.expert - experts.start)
                renamed[new] = tensors[tensor.name]
        self.loader.alone(self.layers_name, i, small).load(renamed, self.device)
        for name, value in small.named_parameters():
            if value.is_meta and name in self.parameters(i):
                raise InputError(f"{self.checkpoint.folder}: no tensor for the model's {self.layers_name}.{i}.{name}")
        return small

    def complete(self, i: int, small: nn.Module) -> None:
        """Let a layer with a group of experts have all else that layer i has now."""
        others = dict(self.layers[i].named_parameters())
        for name, value in list(small.named_parameters()):
            if value.is_meta and name in others and others[name].shape == value.shape:
                _put(small, name, others[name])

    def _fill_layer(self, i: int, layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        """What was read of layer i, in it: without experts where it is cut."""
        self.loader.alone(self.layers_name, i, layer).load(tensors, self.device)
        return layer

    def _fill_by_pieces(
        self, i: int, layer: nn.Module, names: frozenset[str], tensors: Mapping[str, Tensor]
    ) -> nn.Module:
        """The same, its experts (`names` within the layer) a piece at a time, so that little is held twice while it is
        converted."""
        own, whole = self.names(i), dict(layer.named_parameters())
        self._fill_layer(i, layer, {name: value for name, value in tensors.items() if name not in own})
        for experts in self._pieces(i):
            part = {}
            for tensor in self.of(i).of_role("expert"):
                if tensor.action == "slice":
                    a, b = (n * tensor.rows for n in (experts.start, experts.stop))
                    part[tensor.name] = tensors[tensor.name][a:b]
                elif tensor.expert in experts:
                    part[tensor.name] = tensors[tensor.name]
            small = dict(self.fill(i, experts, part).named_parameters())
            for name in names:
                if whole[name].is_meta:
                    empty = room_for(whole[name].shape, small[name].dtype, small[name].device)
                    whole[name] = _put(layer, name, nn.Parameter(empty, requires_grad=False))
                rows = len(whole[name]) // self.of(i).num_experts
                whole[name].data[experts.start * rows : experts.stop * rows] = small[name]
        return layer

    def check_filled(self, i: int) -> None:
        """Raise InputError where layer i lacks a tensor that it does not wait for."""
        wait = self.parameters(i) if i in self.cuts else ()
        for name, parameter in self.layers[i].named_parameters():
            if parameter.is_meta and name not in wait:
                raise InputError(f"{self.checkpoint.folder}: no tensor for the model's {self.layers_name}.{i}.{name}")

    def _pieces(self, i: int) -> tuple[range, ...]:
        """The experts of a layer that are converted together."""
        return self.cut(i, PIECE // max(1, self.held(i) // self.of(i).num_experts))

    def _with(self, count: int) -> nn.ModuleList:
        if count not in self.smaller:
            self.smaller[count] = layers_with(self.loader, dict.fromkeys(self.layout.count_paths, count))
        return self.smaller[count]


def less_work(budget: int) -> int:
    """Bytes of a budget that are not for computing."""
    return budget - max(budget // WORK, min(budget // 2, KERNELS))


def _put(layer: nn.Module, name: str, value: nn.Parameter) -> nn.Parameter:
    """Let `value` be the parameter of a layer that has this name."""
    path, _, own = name.rpartition(".")
    layer.get_submodule(path)._parameters[own] = value
    return value

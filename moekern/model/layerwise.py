"""A model whose decoder layers are filled from the checkpoint one at a time; the next one is read in the background."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from moekern.architectures import Layout
from moekern.checkpoint.folder import CONFIG, Checkpoint
from moekern.data.batches import Batch
from moekern.errors import InputError, first_line, is_out_of_memory, memory_for, out_of_memory, raised_here
from moekern.model.budget import Budget, budget_of
from moekern.model.compute import Compute, check_device
from moekern.model.finite import NotFinite, blamed_outside, blamed_weight, expert_list, out_of_range
from moekern.model.memory import return_freed_memory
from moekern.model.reader import LayerReader, read_tensors
from moekern.model.states import States
from moekern.model.stepwise import Beside, Stepwise, Tangled
from moekern.model.suspended import Suspended
from moekern.model.transformers_api import Loader, layer_index, open_loader, router_modules
from moekern.model.walk import Pass, Way, walk
from moekern.team import ALONE, Team

WORK = 8
Task = TypeVar("Task")
_TANGLED: set[type] = set()  # models whose layers hand on more than hidden states, as far as they were met


@dataclass(frozen=True)
class LayerwiseModel:
    """The skeleton (everything outside the decoder layers) is resident; a decoder layer is while it computes.

    In memory beside the skeleton: the parameters of the layer that computes, and the reader's one buffer (the file
    bytes of the largest layer), which holds the next layer, read ahead, or the tensors a layer is being made from.
    """

    checkpoint: Checkpoint
    layout: Layout
    loader: Loader
    device: torch.device
    layers: nn.ModuleList
    layers_name: str
    moe_keys: Mapping[int, str]  # decoder layer -> plan key, for the layers with experts
    reader: LayerReader  # its groups are the decoder layers
    room: int  # bytes of memory for hidden states
    spill: Path | None  # where they go beyond it
    team: Team = ALONE  # the processes that take this pass, each with tasks of its own
    returns: dict[int, Beside] = field(default_factory=dict)  # what layers that have run return

    @property
    def model(self) -> nn.Module:
        return self.loader.model

    @property
    def vocab_size(self) -> int:
        return int(self.loader.model.get_input_embeddings().num_embeddings)

    @property
    def embedding_size(self) -> int:
        """H, but of models that project their embeddings."""
        return int(self.loader.model.get_input_embeddings().embedding_dim)

    def compute(self, batch: Batch) -> Any:
        """The model's own forward pass of one batch: what transformers returns.

        Raises InputError for what the model's own code raises: numbers of config.json that contradict each other.
        """
        model: Any = self.model
        B, S = batch.input_ids.shape
        try:
            return model(input_ids=batch.input_ids.to(self.device), use_cache=False)
        except Exception as error:
            if is_out_of_memory(error):
                remedy = "fewer tokens at a time take less (--chunk, --batch-size, --sequence-length)"
                raise out_of_memory(f"the forward pass of {B} x {S} tokens", error, remedy) from error
            if raised_here(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{self.checkpoint.folder / CONFIG}: its model cannot compute: {reason}") from error

    def run(self, tasks: Sequence[Task], run: Pass[Task]) -> None:
        """Take all tasks through the model in one pass over its weights; see `walk`.

        Hidden states alone wait between layers, or, in a model whose layers hand on more, whole forward passes; where
        this is found on the way, the pass begins again. Raises InputError for numbers that are not finite, naming the
        first layer where they are not and why.
        """
        kind = type(self.model)
        if kind not in _TANGLED:
            try:
                with self.states() as states:
                    self.run_stepwise(tasks, run, states)
            except Tangled as found:
                _TANGLED.add(kind)
                warnings.warn(f"{found}: the pass begins again, and all text of a pass is held in memory", stacklevel=2)
        if kind in _TANGLED:
            self._walk(tasks, run, Suspended(list(self.layers), run, self.device))

    def run_stepwise(self, tasks: Sequence[Task], run: Pass[Task], states: States) -> None:
        """The same with nothing kept but what layers are given. Raises Tangled where that is not enough."""
        self._walk(tasks, run, self.stepwise(run, states))

    def stepwise(self, run: Pass[Any], states: States) -> Stepwise:
        """A way through the layers that keeps hidden states and nothing else."""
        return Stepwise(list(self.layers), run, states, self.device, self.returns)

    def states(self) -> States:
        """A place for the hidden states of tasks, which takes what memory there is for them."""
        return States(self.room, self.spill)

    def _walk(self, tasks: Sequence[Task], run: Pass[Task], way: Way[Task]) -> None:
        last = len(self.layers) if run.stop_after is None else run.stop_after + 1
        self.reader.start(0)
        try:
            load = lambda i: self._load(i, i + 1 if i + 1 < last else None)  # noqa: E731
            walk(list(self.layers), tasks, run, way, load=load, unload=self._unload, met=self._meet)
        except NotFinite as found:
            raise self._refusal(found, run) from None
        except Tangled as found:
            logits = found.__cause__  # that are not finite may be so by the head's own weights
            if isinstance(logits, NotFinite) and blamed_outside(self.model, self.layers_name, head=True):
                raise self._refusal(logits, run) from None
            if not found.told:
                self._meet(found.layer)
            raise
        finally:
            self.reader.cancel()
            for layer in self.layers:
                drop(layer)

    def _meet(self, tangled: int | None = None) -> None:
        """All ranks have come through a layer; where one has found it `tangled`, all begin again."""
        layers = [layer for layer in self.team.every(tangled) if layer is not None]
        if layers and tangled is None:
            raise Tangled(layers[0], told=True)

    def blamed(self, layer: int, held: Sequence[int] | None = None) -> str | None:
        """Which weight of a decoder layer that is loaded is not finite, in words; None where all are finite.

        `held` are the original numbers of the experts that it has now (None: all).
        """
        key, module = self.moe_keys.get(layer), self.layers[layer]
        every = range(self.layout.layers[key].num_experts) if key is not None else ()
        return blamed_weight(module, router_modules(module, self.model), every if held is None else held)

    def _refusal(self, found: NotFinite, run: Pass[Any]) -> InputError:
        """The error for numbers that are not finite, while the weights are there that may have made them so."""
        layer, of, dtype = found.layer, run.name(found.task), self.loader.dtype
        task = f"; seen in {of}" if of else ""
        if not 0 <= layer < len(self.layers):
            what = "the embeddings are" if layer < 0 else "the logits are"
            cause = blamed_outside(self.model, self.layers_name, head=layer >= 0) or out_of_range(what, dtype)
            return InputError(f"{self.checkpoint.folder}: {cause}{task}")
        cause = self.blamed(layer, run.held(layer)) or out_of_range(f"{_outputs(run.overflowing(layer))} are", dtype)
        return InputError(f"{self.checkpoint.folder}: layer {self.moe_keys.get(layer, layer)}: {cause}{task}")

    def visit(self, order: Sequence[int]) -> Iterator[int]:
        """Fill these decoder layers in this order, one at a time; each is dropped when the next one is asked for."""
        self.reader.start(order[0])
        try:
            for i, after in zip(order, (*order[1:], None), strict=True):
                self._load(i, after)
                yield i
                self._unload(i)
        finally:
            self.reader.cancel()
            for layer in self.layers:
                drop(layer)

    def _load(self, i: int, after: int | None) -> None:
        """Fill layer i, whose reading was started, and start to read `after`."""
        with memory_for(f"the weights of decoder layer {i}", "give more (--memory, --gpu-memory)"):
            self.loader.load(self.reader.take(), self.device)
        self.reader.release(self.model)
        return_freed_memory()
        self._check_filled(f"{self.layers_name}.{i}.", self.layers[i])
        if after is not None:
            self.reader.start(after)

    def _unload(self, i: int) -> None:
        drop(self.layers[i])
        return_freed_memory()

    def _check_filled(self, prefix: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                raise InputError(f"{self.checkpoint.folder}: no tensor for the model's {prefix}{name}")


def _outputs(experts: Sequence[int]) -> str:
    return f"{expert_list(experts)}: outputs" if experts else "hidden states"


@contextmanager
def open_layerwise(
    checkpoint: Checkpoint, layout: Layout, compute: Compute = Compute(), team: Team = ALONE
) -> Iterator[LayerwiseModel]:
    """Build the skeleton of a checkpoint's model, for all ranks of `team` at once. Raises InputError when transformers
    cannot build or fill it."""
    check_device(compute.device)
    budget = budget_of(compute)
    if layout.family.stacks:
        raise InputError(f"{checkpoint.folder}: {layout.family.name} is an encoder-decoder; only one stack can be run")
    loader = open_loader(
        checkpoint.folder, compute.torch_dtype, compute.trust_remote_code, layout, len(checkpoint.tensors)
    )
    place = compute.place
    layers_name, layers = loader.decoder_layers()
    layer_keys: list[list[str]] = [[] for _ in layers]
    skeleton: list[str] = []
    for key in checkpoint.tensors:
        target = loader.model_key(key)
        index = layer_index(layers_name, target)
        if index is not None:
            layer_keys[index].append(key)
        elif target is not None:
            skeleton.append(key)
    moe_keys = {index: key for key, index in loader.moe_places(layout).items()}
    with LayerReader(checkpoint, layer_keys, place, team=team) as reader:
        room = _room(budget, loader, layers, reader)
        there = team.first or (compute.spill is not None and compute.spill.is_dir())  # on this node
        spill = compute.spill if there else None
        model = LayerwiseModel(
            checkpoint, layout, loader, place, layers, layers_name, moe_keys, reader, room, spill, team
        )
        with memory_for("what lies outside of the decoder layers", "give more (--memory)"):
            _fill_skeleton(model, skeleton)
        yield model


def _room(budget: Budget, loader: Loader, layers: nn.ModuleList, reader: LayerReader) -> int:
    """Bytes of the budget that are left for hidden states: without skeleton, the largest layer, the reader's buffer,
    and a WORK-th part for what computing takes."""
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
    outside = sum(p.nbytes for p in loader.model.parameters()) - sum(p.nbytes for p in layers.parameters())
    on_host = largest + outside if budget.gpu is None else 0
    return max(0, budget.host - budget.host // WORK - on_host - reader.nbytes)


def _fill_skeleton(model: LayerwiseModel, keys: Iterable[str]) -> None:
    if model.team.local_size == 1:
        model.loader.load(read_tensors(model.checkpoint, keys), model.device)
    else:
        with LayerReader(model.checkpoint, [keys], torch.device("cpu"), team=model.team) as once:
            once.start(0)
            model.loader.load(once.take(), model.device)
            once.release(model.model)
    module: Any = model.model
    module.tie_weights()
    inside = model.layers_name + "."
    for name, parameter in module.named_parameters():
        if parameter.is_meta and not name.startswith(inside):
            raise InputError(f"{model.checkpoint.folder}: no tensor for the model's {name}")
    _move_buffers(module, model.device)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(device)


def drop(layer: nn.Module) -> None:
    """Put the layer's parameters back on the meta device; buffers stay: they are small, and not all are in the file."""
    for part in layer.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

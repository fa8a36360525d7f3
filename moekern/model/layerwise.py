"""A model whose decoder layers are filled from the checkpoint one at a time; the next one comes in the background."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from moekern.architectures import Layout
from moekern.checkpoint.folder import CONFIG, Checkpoint
from moekern.data.batches import Batch
from moekern.errors import (
    InputError,
    first_line,
    is_out_of_memory,
    memory_for,
    out_of_memory,
    raised_here,
)
from moekern.files import sized
from moekern.model.apart import Filled, RowsApart
from moekern.model.budget import budget_of, least
from moekern.model.compute import Compute, check_device
from moekern.model.expert_groups import ExpertGroups, Takes, less_work
from moekern.model.filling import Filler, worth_it
from moekern.model.finite import NotFinite, blamed_outside, blamed_weight, expert_list, out_of_range
from moekern.model.journal import ANEW, Stage, undamaged
from moekern.model.layer_lists import layer_index
from moekern.model.memory import bound_code, drop, hand_over, return_freed_memory
from moekern.model.pinned import blocks_for
from moekern.model.position import Position
from moekern.model.reader import LayerReader
from moekern.model.room import Need
from moekern.model.skeleton import fill_skeleton
from moekern.model.spent import Spent
from moekern.model.states import States
from moekern.model.stepwise import Beside, Stepwise, Tangled
from moekern.model.suspended import Suspended
from moekern.model.transformers_api import Loader, open_loader, router_modules
from moekern.model.walk import Pass, Way, walk
from moekern.team import ALONE, Team

Task = TypeVar("Task")
LOG = logging.getLogger(__name__)
_TANGLED: set[type] = set()  # models whose layers hand on more than hidden states, as far as they were met


@dataclass(frozen=True)
class LayerwiseModel:
    """The skeleton (everything outside the decoder layers) is resident; a decoder layer is while it computes.

    In memory beside the skeleton: the layer that computes, where there is room the next one, and the reader's one
    buffer (the file bytes of the largest layer), which holds what is read ahead, or what a layer is being made from. Of
    a layer that is cut: what are no experts, one group of experts or two, and the buffer for the largest of these.
    """

    checkpoint: Checkpoint
    layout: Layout
    loader: Loader
    device: torch.device
    layers: nn.ModuleList
    layers_name: str
    moe_keys: Mapping[int, str]  # decoder layer -> plan key, for the layers with experts
    filler: Filler  # its numbers are the decoder layers, and behind them groups of experts
    groups: ExpertGroups
    takes: Takes  # memory, and what of it is left
    spill: Path | None  # where they go beyond it
    team: Team = ALONE  # the processes that take this pass, each with tasks of its own
    returns: dict[int, Beside] = field(default_factory=dict)  # what layers that have run return
    notes: list[str] = field(default_factory=list)  # said once the first layer is there
    reserved: int = 0  # bytes of the memory for hidden states that something else has
    stays: bool = False  # what is filled stays so from pass to pass: there is memory for all layers

    @property
    def model(self) -> nn.Module:
        return self.loader.model

    @property
    def reader(self) -> LayerReader:
        return self.filler.reader

    @property
    def vocab_size(self) -> int:
        return int(self.loader.model.get_input_embeddings().num_embeddings)

    @property
    def embedding_size(self) -> int:
        """H, but of models that project their embeddings."""
        return int(self.loader.model.get_input_embeddings().embedding_dim)

    def compute(self, batch: Batch) -> Any:
        """The model's own forward pass of one batch: what transformers returns. Raises InputError for what the model's
        own code raises: numbers of config.json that contradict each other."""
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

    def run(self, tasks: Sequence[Task], run: Pass[Task], stage: Stage | None = None) -> None:
        """Take all tasks through the model in one pass over its weights; see `walk`.

        Hidden states alone wait between layers, or, in a model whose layers hand on more, whole forward passes; where
        this is found on the way, the pass begins again. With a `stage` it goes on where a stopped run was, and how far
        it is is written down; whole forward passes cannot be. Raises InputError for numbers that are not finite, naming
        the first layer where they are not and why.
        """
        kind = type(self.model)
        if kind not in _TANGLED or (stage is not None and stage.left is not None):
            try:
                with self.states() as states:
                    self.run_stepwise(tasks, run, states, stage)
                    return
            except Tangled as found:
                _TANGLED.add(kind)
                warnings.warn(f"{found}: the pass begins again, and all text of a pass is held in memory", stacklevel=2)
        if self.groups.cuts:
            raise self.takes.refusal("layers that hand on more than hidden states are not run in groups of experts")
        if stage is not None:
            stage.journal.tell("of whole forward passes nothing is written down: a pass that is stopped begins anew")
        self._walk(tasks, run, Suspended(list(self.layers), run, self.device), stage)

    def run_stepwise(self, tasks: Sequence[Task], run: Pass[Task], states: States, stage: Stage | None = None) -> None:
        """The same with nothing kept but what layers are given. Raises Tangled where that is not enough."""
        left = None if stage is None else stage.left
        self._walk(tasks, run, self.stepwise(run, states), stage, states, left)

    def stepwise(self, run: Pass[Any], states: States) -> Stepwise:
        """A way through the layers that keeps hidden states and nothing else."""
        last = self._last(run)

        def apart(i: int, final: bool) -> tuple[RowsApart, Filled] | None:
            if i not in self.groups.cuts:
                return None
            then = (i + 1 if i < last else None) if final else self.groups.numbers[i, 0]
            rows = RowsApart(self.groups.cuts[i], self.states_beside(states), self.device)
            return rows, lambda wanted: self.filled(i, wanted, then)

        return Stepwise(list(self.layers), run, states, self.device, self.returns, apart)

    def filled(self, i: int, wanted: Sequence[int], then: int | None) -> Iterator[tuple[int, nn.Module]]:
        """Groups of experts of a layer that is cut, see `Filler.filled`; those too that other ranks want."""
        return self.filler.filled(i, self._by_any(wanted), then)

    def _by_any(self, groups: Sequence[int]) -> list[int]:
        """Groups of experts that some rank of the node wants: all of its ranks read them together."""
        return sorted({group for each in self.team.every_on_node(list(groups)) for group in each})

    @property
    def room(self) -> int:
        """Bytes of memory for hidden states."""
        return max(0, self.takes.room - self.reserved)

    def states(self) -> States:
        """A place for the hidden states of tasks, which takes what memory there is for them."""
        return self.states_beside(States())

    def states_beside(self, others: States) -> States:
        """A place for more, which takes what memory others have left."""
        return States(max(0, self.room - others.size), self.spill, blocks_for(self.device))

    def expect(self, tokens: int, more: int = 0, named: str = "", memory: int = 0) -> None:
        """Say what so many tokens will take. Arguments and errors as of `check_text`."""
        what, beyond = self.check_text(tokens, more, named, memory)
        file = f", {sized(beyond)} of them in a file in {self.spill or tempfile.gettempdir()}" if beyond else ""
        self.notes.append(f"memory: {self.takes.described}; the text takes {what}{file}")

    def check_text(self, tokens: int, more: int = 0, named: str = "", memory: int = 0) -> tuple[str, int]:
        """What so many tokens take, in words, and how many bytes of it go to a file. They take `more` bytes of what is
        `named`, which has `memory` of its own. Raises NoRoomForText where memory and disk have no room, on every rank
        where one has too little."""
        states, apart = tokens * self.embedding_size * self.loader.dtype.itemsize, self.rows_apart(tokens)
        beside = ((states, "hidden states"), (apart, "experts' rows"), (more, named))
        what = " and ".join(f"{sized(n)} of {each}" for n, each in beside if n)
        need = Need(tokens, states + apart, f"{tokens} tokens take {what}", more, memory)
        return what, need.check(self.room, self.spill, self.team)

    def rows_apart(self, tokens: int) -> int:
        """Bytes of what experts that are run in groups are given, and put out, for so many tokens."""
        row, slots = self.embedding_size * self.loader.dtype.itemsize, self.layout.router.top_k
        return tokens * (row + slots * (row + 8)) if self.groups.cuts else 0

    def check_whole(self, what: str) -> None:
        """Raise InputError where layers are run in groups of experts, which `what` cannot be."""
        if self.groups.cuts:
            raise self.takes.refusal(f"{what} is not measured of layers that are run in groups of experts")

    def visits(self, layer: int) -> int:
        """How often each task enters a layer in a pass: twice where its experts are run apart."""
        return 2 if layer in self.groups.cuts else 1

    def _last(self, run: Pass[Any]) -> int:
        """The last layer that a pass runs."""
        return len(self.layers) - 1 if run.stop_after is None else run.stop_after

    def _walk(
        self,
        tasks: Sequence[Task],
        run: Pass[Task],
        way: Way[Task],
        stage: Stage | None = None,
        states: States | None = None,
        left: Position | None = None,
    ) -> None:
        last = self._last(run)
        first = 0 if left is None else left.layer

        def load(i: int) -> None:
            self._load(i, i + 1 if i < last else None)

        def start() -> None:
            if stage is None or left is None:
                run.started()
            else:
                self.take_over(stage, states, last + 1, [run.label(n, task) for n, task in enumerate(tasks)])
                with undamaged(stage.journal.folder):
                    run.restored(first, left.kept)
            if first <= last:
                self._begin(first)  # of what a pass that has ended early left changed, nothing is by now

        def save(i: int) -> None:
            if stage is not None:
                stage.save(i + 1, last + 1, states, run.kept, self.returns)

        try:
            walk(
                list(self.layers), tasks, run, way,
                load=load, unload=self._unload, first=first, start=start, save=save, met=self._meet,
            )  # fmt: skip
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
            self._let_go()

    def take_over(self, stage: Stage, states: States | None, of: int, own: Collection[Any] = ()) -> None:
        """What a stopped run has left of a stage of `of` layers, for this process's `own` tasks, see `Stage`.

        Raises InputError where it is of another number of layers.
        """
        left = stage.left
        if left is None or left.of != of:
            raise InputError(f"{stage.journal.folder}: what a stopped run has left is of other layers; {ANEW}")
        if states is not None:
            stage.take_over(states, own)
        self.returns.update(left.returns)

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
        found = blamed_weight(module, router_modules(module, self.model), every if held is None else held)
        if found is None and self.team.local_size == 1:  # else others would have to read too
            cuts = self.groups.cuts.get(layer, ())
            for g, part in self.filler.filled(layer, range(len(cuts)), None):
                found = found or blamed_weight(part, router_modules(part, self.model), cuts[g])
        return found

    def _refusal(self, found: NotFinite, run: Pass[Any]) -> InputError:
        """The error for numbers that are not finite, while the weights are there that may have made them so."""
        layer, name, dtype = found.layer, run.name(found.task), self.loader.dtype
        task = name and f"; seen in {name}"
        if not 0 <= layer < len(self.layers):
            what = "the embeddings are" if layer < 0 else "the logits are"
            cause = blamed_outside(self.model, self.layers_name, head=layer >= 0) or out_of_range(what, dtype)
            return InputError(f"{self.checkpoint.folder}: {cause}{task}")
        of = run.overflowing(layer)
        outputs = f"{expert_list(of)}: outputs" if of else "hidden states"
        cause = self.blamed(layer, run.held(layer)) or out_of_range(f"{outputs} are", dtype)
        return InputError(f"{self.checkpoint.folder}: layer {self.moe_keys.get(layer, layer)}: {cause}{task}")

    def visit(self, order: Sequence[int]) -> Iterator[int]:
        """Fill these decoder layers in this order, one at a time; each is dropped when the next one is asked for."""
        if order:
            self._begin(order[0])
        try:
            for i, after in zip(order, (*order[1:], None)[: len(order)], strict=True):
                self._load(i, after)
                yield i
                self._unload(i)
        finally:
            self._let_go()

    def _load(self, i: int, after: int | None) -> None:
        """Fill layer i, which was begun, and begin `after`; of a layer that is cut, its experts wait, and the first
        group of them is begun instead."""
        if not self._is_here(i):
            hand_over(self.filler.take(i), self.layers[i])
            self.groups.check_filled(i)
        while self.notes:
            LOG.info(self.notes.pop(0))
        after = self.groups.numbers.get((i, 0), after)
        if after is not None:
            self._begin(after)

    def _begin(self, i: int) -> None:
        """Start towards layer i, or a group of experts, where it is not there."""
        if not self._is_here(i):
            self.filler.begin(i)

    def _is_here(self, i: int) -> bool:
        return self.stays and not any(parameter.is_meta for parameter in self.layers[i].parameters())

    def _unload(self, i: int) -> None:
        if not self.stays:
            drop(self.layers[i])
            return_freed_memory()

    def _let_go(self) -> None:
        """No layer is wanted any longer."""
        self.filler.cancel()
        for layer in () if self.stays else self.layers:
            drop(layer)


@contextmanager
def open_layerwise(
    checkpoint: Checkpoint, layout: Layout, compute: Compute = Compute(), team: Team = ALONE
) -> Iterator[LayerwiseModel]:
    """Build the skeleton of a checkpoint's model, for all ranks of `team` at once. Raises InputError when transformers
    cannot build or fill it."""
    check_device(compute.device)
    budget = least(team.every_on_node(budget_of(compute)))  # ranks of a node read the same groups of experts
    bound_code((budget.host - less_work(budget.host)) // 4)
    if layout.family.only_pruned:
        raise InputError(f"{checkpoint.folder}: {layout.family.name} cannot be run: {layout.family.only_pruned}")
    loader = open_loader(
        checkpoint.folder, compute.torch_dtype, compute.trust_remote_code, layout, len(checkpoint.tensors)
    )
    place = compute.place
    layers_name, layers = loader.decoder_layers()
    layer_keys: list[list[str]] = [[] for _ in layers]
    skeleton: list[str] = []
    targets = {key: sys.intern(loader.model_key(key) or "") for key in checkpoint.tensors}
    for key, target in targets.items():
        index = layer_index(layers_name, target)
        if index is not None:
            layer_keys[index].append(key)
        elif target:
            skeleton.append(key)
    moe_keys = {index: key for key, index in loader.moe_places(layout).items()}
    spent = Spent()
    groups = ExpertGroups(checkpoint, layout, loader, layers, layers_name, moe_keys, targets, place)
    ahead = all(team.every_on_node(worth_it(place, team)))
    takes = groups.divide(layer_keys, budget, ahead)
    there = team.first or (compute.spill is not None and compute.spill.is_dir())  # on this node
    spill = compute.spill if there else None
    with (
        LayerReader(checkpoint, groups.reading(layer_keys), place, team=team) as reader,
        Filler(reader, groups, spent, takes.ahead > 0) as filler,
    ):
        model = LayerwiseModel(
            checkpoint, layout, loader, place, layers, layers_name, moe_keys, filler, groups, takes, spill, team
        )  # fmt: skip
        with memory_for("what lies outside of the decoder layers", "give more (--memory)"):
            fill_skeleton(model, skeleton)
        yield model
        if spent.loading:
            LOG.info(spent.described)

"""A pass that measures: batches go through the model while the experts of the layer that is loaded are watched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from moekern.data.batches import Batch, Segment, TokenData, dealt
from moekern.measurement.batch import BatchContext, InFlight
from moekern.measurement.probe import Probe
from moekern.measurement.recorder import Recorder, gathered
from moekern.measurement.replay import sample, sampled
from moekern.measurement.watch import watching
from moekern.model.compute import few_tokens
from moekern.model.journal import Stage
from moekern.model.layerwise import LayerwiseModel
from moekern.model.walk import Pass, Round
from moekern.statistics.layer import LayerStatistics

Task = tuple[int, Batch]  # a batch and its number
Progress = Callable[[float, int], None]  # (done, total) decoder layers; the one at work counts by its share of tokens
Sums = Mapping[str, LayerStatistics]  # domain -> one layer's sums


class Steps:
    """Counts decoder layers over all passes: called when one is done, and told how much of the next one is."""

    def __init__(self, progress: Progress, total: int, done: int = 0) -> None:
        self.progress, self.total, self.done = progress, total, done

    def __call__(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def within(self, share: float) -> None:
        """`share` of the text has gone through the layer at work."""
        if share < 1:
            self.progress(self.done + share, self.total)


class MeasuringPass(Pass[Task]):
    """Takes all text to the last layer with experts, a chunk at a time; a subclass says what becomes of a layer's sums.

    A layer's sums leave the recorder, and the device, when the layer is done. Each rank of the model's team takes
    segments of its own, and rank 0 adds them all up. `units` are the segments (None: all of the text).
    """

    twice: Collection[int] = ()  # layers that run once, then again from the same inputs; the second run goes on

    def __init__(
        self,
        layerwise: LayerwiseModel,
        data: TokenData,
        recorder: Recorder,
        step: Steps,
        units: Sequence[Segment] | None = None,
    ) -> None:
        self.layerwise, self.data, self.recorder, self.step = layerwise, data.by_chunk(), recorder, step
        self.team, self.units = layerwise.team, self.data.units() if units is None else units
        self.owners = dealt([unit.tokens for unit in self.units], self.team.size)
        own = [u for u, owner in zip(self.units, self.owners, strict=True) if owner == self.team.rank]
        self.unit_of = {chunk: unit for unit in own for chunk in unit.chunks}
        recorder.apart = self.team.size > 1
        self.unused, self.before = copy.deepcopy(recorder), step.done  # where the pass begins
        self.keys, self.tokens, self.through = layerwise.moe_keys, sum(unit.tokens for unit in own), 0
        self.stop_after = max(self.keys)
        self.flight, self.open = InFlight(), ExitStack()
        self.samples: Mapping[int, Tensor] = {}  # batch number -> flat positions that are replayed

    def run(self, stage: Stage | None = None) -> None:
        """The whole pass, or what a stopped run has left of it."""
        self.layerwise.expect(self.tokens)
        with self.open:
            tasks = [(number, self.data.batches[number]) for number in sorted(self.unit_of)]
            self.layerwise.run(tasks, self, stage)

    def finished(self, key: str, sums: Sums) -> None:
        """All batches have gone through a layer, whose weights are still there: `sums`, on the CPU, are its own. Said
        to rank 0."""
        raise NotImplementedError

    def settled(self, key: str) -> None:
        """Rank 0 has made of a layer's sums what it makes of them. Said to every rank."""

    def started(self) -> None:
        self.recorder, self.through, self.step.done = copy.deepcopy(self.unused), 0, self.before

    def kept(self) -> dict[str, Any]:
        return {"steps": self.step.done}

    def restored(self, layer: int, kept: Any) -> None:
        MeasuringPass.started(self)
        self.step.done = int(kept["steps"])

    def label(self, number: int, task: Task) -> int:
        return task[0]

    def rounds(self, layer: int) -> Generator[Round[Task]]:
        if layer in self.twice:
            yield Round(on=False, more=True)
            self.between(layer)
        yield Round()

    def between(self, layer: int) -> None:
        """All tasks have run through a layer of `twice` for the first time: it may be changed."""

    def forward(self, task: Task) -> None:
        self.layerwise.compute(task[1])

    @contextmanager
    def entering(self, task: Task, layer: int) -> Iterator[None]:
        number, batch = task
        B, S = batch.input_ids.shape
        ids = batch.input_ids.reshape(-1).to(self.layerwise.device)
        unit = self.unit_of[number]
        context = BatchContext(unit.domain, (B, S), None, ids, self.samples.get(number), unit.number)
        with self.flight.batch(context), few_tokens(B * S, self.layerwise.device):
            yield
        if layer >= 0:
            self.through += B * S
            runs = self.layerwise.visits(layer) * (2 if layer in self.twice else 1)
            self.step.within(self.through / (self.tokens * runs))
            if layer in self.keys and number == unit.chunks[-1]:
                self.through_segment(layer, context)

    def loaded(self, layer: int) -> None:
        self.step.within(0)
        if layer in self.keys:
            self.watch(layer, self.recorder)

    def watch(self, layer: int, recorder: Recorder) -> None:
        """Let this layer's experts, and no other's, add to the recorder."""
        self.open.close()
        layout = self.layerwise.layout
        empty = any(tensor.trailing for each in layout.layers.values() for tensor in each.tensors)
        module = {self.keys[layer]: self.layerwise.layers[layer]}
        probes = watching(self.layerwise.model, module, recorder, self.flight, empty_slots=empty)
        self.watched(self.open.enter_context(probes))

    def watched(self, probes: Mapping[str, Probe]) -> None:
        """A layer's probes are in place."""

    def done(self, layer: int) -> None:
        if layer in self.keys and layer not in self.twice:
            self.conclude(layer)
        self.open.close()
        self.through = 0
        self.step()

    def through_segment(self, layer: int, context: BatchContext) -> None:
        """The last batch of a segment, whose context this is, has left a layer with experts."""

    def conclude(self, layer: int) -> None:
        """All tasks have gone through a layer with experts, which are still watched: its sums are added up."""
        key = self.keys[layer]
        if self.team.size > 1:
            self.unite(key)
        self.open.close()
        if self.team.first:
            self.finished(key, self.taken(layer))
        self.settled(key)

    def unite(self, key: str) -> None:
        """Rank 0 gets what all ranks have measured of a layer, a segment at a time and in order; the others lose it."""
        names = ((unit.domain, unit.number) for unit in self.units)
        gathered(self.recorder, key, self.team, dict(zip(names, self.owners, strict=True)), self.layerwise.device)

    def taken(self, layer: int) -> Sums:
        """The sums of a layer whose weights are there; see `Recorder.take`."""
        top_k = self.layerwise.layout.router.top_k
        blame = lambda: self.layerwise.blamed(layer, self.held(layer))  # noqa: E731
        return self.recorder.take(self.keys[layer], top_k, blame)

    def name(self, task: Task) -> str:
        return f"domain {task[1].domain}"

    def overflowing(self, layer: int) -> Sequence[int]:
        key = self.keys.get(layer, "")
        held = self.held(layer)
        found = self.recorder.overflowing(key)
        return found if held is None else [held[e] for e in found]


def samples(data: TokenData, size: int) -> dict[int, Tensor]:
    """Chunk's number -> flat positions of its tokens that are replayed, `size` for each domain."""
    found: dict[int, Tensor] = {}
    for domain in data.tokens:
        units = [unit for unit in data.units() if unit.domain == domain]
        numbers = [chunk for i in sampled([unit.tokens for unit in units], size) for chunk in units[i].chunks]
        rows = sample([data.batches[number].input_ids.numel() for number in numbers], size)
        found |= dict(zip(numbers, rows, strict=True))
    return found

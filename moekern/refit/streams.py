"""One pass over the weights with several streams of hidden states: the original's, and each variant's of it.

In every layer with experts the original's tasks go first, since what the layer makes of them is what variants should
make. Then, for one variant after another, the layer drops experts, its tasks ask their router again with experts that
put out nothing, which tells the rows that experts are given and what lacks without them; channels are chosen and
weights are fitted to that, an expert at a time; and the tasks go on through the layer as it is then.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moekern.data.batches import Batch, TokenData, dealt
from moekern.errors import InputError
from moekern.estimation.refit import row_bytes
from moekern.evaluation.predictions import compared
from moekern.model.compute import few_tokens
from moekern.model.finite import NotFinite, all_finite
from moekern.model.journal import Stage
from moekern.model.layerwise import LayerwiseModel
from moekern.model.pinned import blocks_for
from moekern.model.projections import views
from moekern.model.pruned_layers import LivePruner
from moekern.model.states import States
from moekern.model.stepwise import Tangled
from moekern.model.walk import Pass, Round
from moekern.plan.channels import channel_text
from moekern.plan.document import LayerPlan
from moekern.plan.live import live_channels, live_merging
from moekern.refit.choice import Chooser
from moekern.refit.fitting import Fitting, fitted, forwards
from moekern.refit.live import Asked, Listening, LiveExperts, block_of, listening, made_by
from moekern.refit.rows import Room, RowStore
from moekern.refit.stored import Stored, StoredExperts, format_of, stored_bytes
from moekern.refit.target import Target, scale_of, squares_of
from moekern.refit.units import Units
from moekern.refit.variants import FITTED, HELD, JUDGED, Split, Variant

ORIGINAL = 0
Write = Callable[[Variant, str, LayerPlan, Stored], None]  # what a layer's experts have become
Rounds = Generator[Round["Task"]]


@dataclass(frozen=True)
class Task:
    number: int  # ORIGINAL, or of the variant, counted from 1
    batch: Batch
    place: int  # of the batch in the text


class Streams(Pass[Task]):
    """`plans` and `records` hold for each variant (by its place) what each layer became; `sums`, of every batch that is
    held back and every stream, what `evaluation.losses.compared` gives."""

    def __init__(
        self,
        layerwise: LayerwiseModel,
        split: Split,
        variants: Sequence[Variant],
        write: Write,
        progress: Callable[[float, int], None] = lambda done, total: None,
        until: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.layerwise, self.split, self.variants, self.write, self.progress, self.backend = (
            layerwise, split, tuple(variants), write, progress, backend,
        )  # fmt: skip
        self.team, self.keys = layerwise.team, layerwise.moe_keys
        self.stop_after = next((layer for layer, key in self.keys.items() if key == until), None)
        self.last = len(layerwise.layers) - 1 if self.stop_after is None else self.stop_after
        sizes = [batch.input_ids.numel() for batch in split.batches]
        load = [0] * (max(split.numbers) + 1)
        for number, size in zip(split.numbers, sizes, strict=True):
            load[number] += size
        owners = dealt(load, self.team.size)
        self.places = [
            p for p, number in enumerate(split.numbers)
            if owners[number] == self.team.rank and (until is None or split.uses[p] != JUDGED)
        ]  # fmt: skip
        fit = [p for p in self.places if split.uses[p] != JUDGED]
        ends = np.cumsum([0, *(sizes[p] for p in fit)]).tolist()
        self.rows_of = {p: slice(a, b) for p, a, b in zip(fit, ends[:-1], ends[1:], strict=True)}
        self.tokens: int = ends[-1]
        self.held_rows = torch.zeros(self.tokens, dtype=torch.bool)
        for place, rows in self.rows_of.items():
            self.held_rows[rows] = split.uses[place] == HELD
        self.units = split.units(fit)
        self.parts = Units(self.units, self.tokens, self.team)
        self.pruner, self.applied = LivePruner(layerwise.loader, layerwise.layout), ExitStack()
        self.shown: int | None = None  # the stream that the last layer is made for
        self.judging = False  # the last layer is run for what is held back, whichever stream comes
        self.saved: dict[int, list[Tensor]] = {}  # variant -> weights of the last layer's experts
        self.task: Task | None = None
        self.original: Tensor | None = None  # logits of the batch that streams are compared on
        fitted = tuple(b for b, use in zip(split.batches, split.uses, strict=True) if use == FITTED)
        text = TokenData(fitted, {})  # which comes first: a chunk's place is its number
        self.choosers = {
            n: Chooser(layerwise, text, split.numbers[: len(fitted)], owners, v.choice, backend)
            for n, v in enumerate(self.variants, start=1) if v.choice
        }  # fmt: skip
        self.choosing: Chooser | None = None  # the layer at work is measured
        self.room = Room(0)  # of all rows of the layer at work, beside hidden states
        self.through = 0
        self.started()

    def started(self) -> None:
        self.sums: dict[tuple[int, int], Tensor] = {}  # batch and stream
        self.plans: list[dict[str, LayerPlan]] = [{} for _ in self.variants]
        self.records: list[dict[str, Any]] = [{} for _ in self.variants]

    def run(self, stage: Stage | None = None) -> None:
        """The whole pass, or what a stopped run has left of it. Raises InputError for models that cannot be refitted,
        where memory and disk have no room, and for numbers that are not finite."""
        layerwise = self.layerwise
        tasks = list(self._tasks())
        layerwise.expect(sum(task.batch.input_ids.numel() for task in tasks), self._beside(), "rows of a layer")
        half = layerwise.takes.room // 2
        stored = stored_bytes(layerwise.checkpoint, layerwise.layout)
        self.room = Room(max(0, layerwise.takes.room - half - stored), layerwise.spill)
        try:
            with States(half, layerwise.spill, blocks_for(layerwise.device)) as states, self.applied:
                layerwise.run_stepwise(tasks, self, states, stage)
        except Tangled as found:
            why = "and two streams of such cannot be kept side by side"
            raise InputError(f"{layerwise.checkpoint.folder}: {found}, {why}; prune it without a refit") from None

    def kept(self) -> Any:
        sums = [each for found in self.team.gather(self.sums) for each in found.items()]
        plans = [{key: (p.keep, p.channels) for key, p in plans.items()} for plans in self.plans]
        return {
            "sums": [(place, number, total.tolist()) for (place, number), total in sums],
            "plans": plans,
            "records": self.records,
        }

    def restored(self, layer: int, kept: Any) -> None:
        self.started()
        self.sums = {(place, number): torch.tensor(total, dtype=torch.float64) for place, number, total in kept["sums"]}
        for found, plans, variant in zip(kept["plans"], self.plans, self.variants, strict=True):
            for key, (keep, channels) in found.items():
                texts = None if channels is None else tuple(channels)
                plans[key] = LayerPlan(tuple(keep), None, texts, variant.plan.layers[key].groups)
        self.records = list(kept["records"])

    def label(self, number: int, task: Task) -> int:
        return task.place * (1 + len(self.variants)) + task.number

    def group(self, task: Task) -> int:
        return task.number

    def name(self, task: Task) -> str:
        stream = "the original" if task.number == ORIGINAL else self.variants[task.number - 1].name
        return f"{stream}, domain {task.batch.domain}"

    def held(self, layer: int) -> Sequence[int] | None:
        return self.pruner.held.get(self.keys.get(layer, ""))

    def forward(self, task: Task) -> None:
        logits = self.layerwise.compute(task.batch).logits
        predicted = logits[:, :-1]
        if task.number == ORIGINAL:
            self.original = predicted
        assert self.original is not None
        found = compared(predicted, self.original, task.batch.input_ids[:, 1:].to(logits.device))
        if not all_finite(found):
            raise NotFinite(len(self.layerwise.layers))
        self.sums[task.place, task.number] = found

    @contextmanager
    def entering(self, task: Task, layer: int) -> Iterator[None]:
        self.task = task
        if self.judging:
            self._show(layer, task.number)
        measured = nullcontext() if self.choosing is None else self.choosing.batch(task.place)
        with few_tokens(task.batch.input_ids.numel(), self.layerwise.device), measured:
            yield
        if layer >= 0:
            self.through += 1
            self._tell(layer)

    def _tell(self, layer: int, more: float = 0) -> None:
        """How far the layer at work is, counted in batches that go through it once; `more` of a fit at work."""
        more_of = 3 * len(self.variants) + len(self.choosers) + sum(map(forwards, self.variants))
        passes = 1 + more_of * (layer in self.keys)
        done = (self.through + more) / max(1, passes * len(self.places))
        self.progress(layer + min(done, 0.99), len(self.layerwise.layers))

    def loaded(self, layer: int) -> None:
        self.through = 0
        self.progress(layer, len(self.layerwise.layers))

    def done(self, layer: int) -> None:
        self.applied.close()
        self.saved.clear()
        self.shown, self.judging = None, False
        self.progress(layer + 1, len(self.layerwise.layers))

    def rounds(self, layer: int) -> Rounds:
        key, last = self.keys.get(layer), layer == self.last
        if key is None:
            yield Round(self._judged if last else lambda task: True)
            return
        with ExitStack() as stack:
            target = yield from self._target(layer, stack)
            for number, variant in enumerate(self.variants, start=1):
                yield from self._variant(layer, key, number, variant, target)
        if last:
            self.judging = True
            yield Round(self._judged)

    def _target(self, layer: int, stack: ExitStack) -> Generator[Round[Task], None, Target | None]:
        """The original's tasks go through a layer: what it makes of them is what variants should make, where some are
        to be fitted to it."""
        on, module = layer != self.last, self.layerwise.layers[layer]
        if not any(variant.fits for variant in self.variants):
            yield Round(_of(ORIGINAL), on=on, more=True)
            return None
        first = lambda task: task.number == ORIGINAL and task.place == next(iter(self.rows_of), None)  # noqa: E731
        made: list[Tensor] = []
        loud = Listening(silent=False)
        for watcher in (Listening(), loud):
            with listening(module, watcher), made_by(module, lambda hidden: made.append(hidden.detach())):
                yield Round(first, on=False, more=True)
        own = scale_of(made[1] - made[0], loud.put_out, made[1]) if made and loud.put_out is not None else None
        found = self.team.every((next(iter(self.rows_of)), own) if made else None)
        scale = min((each for each in found if each is not None), key=lambda each: each[0])[1]  # of the first batch
        stream = scale is not None
        size = self.layerwise.embedding_size if stream else loud.hidden
        wanted = stack.enter_context(self.room.store(self.tokens, size))
        if scale is not None:
            with made_by(module, lambda hidden: self._put(wanted, hidden)):
                yield Round(_of(ORIGINAL), on=on, more=True)
        else:
            with listening(module, loud), made_by(module, lambda hidden: self._put(wanted, loud.put_out)):
                yield Round(_of(ORIGINAL), on=on, more=True)
        return Target(wanted, scale, squares_of(wanted, self.held_rows, self.parts))

    def _variant(self, layer: int, key: str, number: int, variant: Variant, target: Target | None) -> Rounds:
        """Its tasks go through a layer, which becomes what it is in the variant."""
        last, module = layer == self.last, self.layerwise.layers[layer]
        plan = variant.plan.layers[key]
        if number in self.choosers:
            plan = yield from self._chosen(layer, key, number, len(plan.keep))
        with ExitStack() as stack:
            if variant.needs_text:
                with self.pruner.pruned(key, plan.keep):
                    asked, lacks = yield from self._asked(layer, number, target if variant.fits else None, stack)
                    if variant.width is not None:
                        live = LiveExperts(block_of(module), asked, self.layerwise.device)
                        plan = LayerPlan(plan.keep, None, self._channels(live, variant.width))
            self.plans[number - 1][key] = plan
            with self.pruner.pruned(key, plan.keep, live_channels(plan), live_merging(variant.plan, key)):
                block = block_of(module) if variant.fits else module
                if variant.fits:
                    assert target is not None
                    stored = self._stored(variant, key, plan, block)
                    live = LiveExperts(block, asked, self.layerwise.device, stored)
                    place = self.held_rows, self.units, self.team
                    worth = forwards(variant) * len(self.places)
                    told = lambda share: self._tell(layer, share * worth)  # noqa: E731
                    fitting = Fitting(live, lacks, target, *place, self.room.left, self.room.folder, self.backend, told)
                    self.records[number - 1][key] = fitted(fitting, variant, key)
                    self.through += worth
                    self.write(variant, key, plan, stored.tensors(block))
                if last:
                    self.saved[number] = [p.detach().clone() for p in block.parameters()] if variant.fits else []
                else:
                    yield Round(_of(number), more=number < len(self.variants))

    def _chosen(self, layer: int, key: str, number: int, count: int) -> Generator[Round[Task], None, LayerPlan]:
        """The experts that stay, by what all of the layer's do with the variant's text that is fitted to."""
        chooser = self.choosers[number]
        with chooser.watching(key, self.layerwise.layers[layer]):
            self.choosing = chooser
            fitted = lambda task: task.number == number and self.split.uses[task.place] == FITTED  # noqa: E731
            yield Round(fitted, on=False, more=True)
            self.choosing = None
        return chooser.chosen(key, count, lambda: self.layerwise.blamed(layer))

    def _asked(
        self, layer: int, number: int, target: Target | None, stack: ExitStack
    ) -> Generator[Round[Task], None, tuple[Asked, RowStore]]:
        """What a variant's experts are given, and, where there is a target, what lacks of it without them."""
        module = self.layerwise.layers[layer]
        block = block_of(module)
        given, dtype = views(block).up.shape[2], self.layerwise.loader.dtype
        rows = stack.enter_context(self.room.store(self.tokens, given, dtype))
        lacks = stack.enter_context(self.room.store(self.tokens if target else 0, target.size if target else 0))
        asked = Asked(rows, torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, 1))

        def hear(hidden: Tensor, ids: Tensor, gates: Tensor, applied: bool) -> None:
            if not len(asked.ids):
                asked.ids = torch.full((self.tokens, ids.shape[1]), -1, dtype=torch.int32)
                asked.gates = torch.zeros(self.tokens, ids.shape[1])
            place = self._rows()
            if len(hidden) != place.stop - place.start:
                raise InputError(f"layer {self.keys[layer]}: its experts are not called once with every token")
            rows[place], asked.ids[place], asked.gates[place] = hidden, ids, gates
            asked.applied = applied

        def came(hidden: Tensor) -> None:
            if target is not None and target.scale is not None:
                place = self._rows()
                lacks[place] = (target.wanted[place] - hidden.detach().float().flatten(0, -2).cpu()) / target.scale

        with listening(module, Listening(hear)), made_by(module, came):
            yield Round(lambda task: task.number == number and task.place in self.rows_of, on=False, more=True)
        if target is not None and target.scale is None:
            lacks.copy_from(target.wanted)
        return asked, lacks

    def _stored(self, variant: Variant, key: str, plan: LayerPlan, block: nn.Module) -> StoredExperts:
        """As what the experts of a layer are stored."""
        of, channels = self.layerwise, live_channels(plan)
        layer = of.layout.layers[key]
        return StoredExperts(
            of.checkpoint, of.loader, layer, plan.keep, block, channels,
            all_parts=variant.all_parts(layer), dtype=format_of(variant.computed, of.checkpoint, of.layout).dtype,
        )  # fmt: skip

    def _channels(self, live: LiveExperts, width: int) -> tuple[str, ...]:
        """Of each expert the `width` channels whose features times their columns of down have the most energy on the
        text that is fitted; of equal ones the first."""
        texts = []
        for expert, energy in enumerate(live.energies(self.parts, ~self.held_rows, self.backend)):
            energy *= live.down(expert).double().square().sum(0).cpu()
            best = energy.argsort(descending=True, stable=True)[:width].sort().values
            texts.append(channel_text(best.numpy(), live.width))
        return tuple(texts)

    def _show(self, layer: int, number: int) -> None:
        """Let the last layer be that of a stream."""
        if self.shown == number:
            return
        self.applied.close()
        self.shown, key = number, self.keys[layer]
        if number == ORIGINAL:
            return
        plan = self.plans[number - 1][key]
        merging = None if self.saved[number] else live_merging(self.variants[number - 1].plan, key)
        self.applied.enter_context(self.pruner.pruned(key, plan.keep, live_channels(plan), merging))
        if self.saved[number]:
            block = block_of(self.layerwise.layers[layer])
            for parameter, value in zip(block.parameters(), self.saved[number], strict=True):
                parameter.data.copy_(value)

    def _judged(self, task: Task) -> bool:
        return self.split.uses[task.place] == JUDGED

    def _tasks(self) -> Iterator[Task]:
        """Of each batch the original first: the others are held against it."""
        for place in self.places:
            batch = self.split.batches[place]
            yield Task(ORIGINAL, batch, place)
            for number, variant in enumerate(self.variants, start=1):
                if variant.needs_text or self.split.uses[place] == JUDGED:
                    yield Task(number, batch, place)

    def _rows(self) -> slice:
        """Where the task in flight has its rows."""
        assert self.task is not None
        return self.rows_of[self.task.place]

    def _put(self, store: RowStore, value: Tensor | None) -> None:
        assert value is not None
        assert self.task is not None
        if self.task.place in self.rows_of:
            store[self._rows()] = value.detach().float().flatten(0, -2).cpu()

    def _beside(self) -> int:
        """Bytes of a layer's rows: the target, what lacks, one copy for each factor, and what experts are given."""
        fits = [variant for variant in self.variants if variant.fits]
        copies = max((len(v.ridge.factors) if v.ridge else 1 for v in fits), default=-2)
        return row_bytes(self.tokens, self.layerwise.embedding_size, self.layerwise.loader.dtype.itemsize, copies)


def _of(number: int) -> Callable[[Task], bool]:
    return lambda task: task.number == number

"""What a stage takes before it is run: time, memory and disk, from headers, config and a probe of this machine.

A layer's operations are twice the weights that a token uses (attention, router, shared experts, K of E routed experts)
and attention itself; its bytes are read once a pass, while the layer before it computes.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moekern.architectures import Layout
from moekern.architectures.quantisation import quantisation_of, unread
from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import SEGMENTS
from moekern.estimation.counted import Asked, Counted, Figure, Layer, Part, Stage
from moekern.estimation.overview import overview, running
from moekern.estimation.probe import Rates
from moekern.estimation.refit import (
    FACTORS,
    HELD,
    MOST,
    REFINE,
    RIDGE,
    STEP,
    numbers_bytes,
    refine_steps,
    refitted_bytes,
    row_bytes,
)
from moekern.files import sized
from moekern.model.budget import Budget
from moekern.model.expert_groups import HALF, PIECE, less_work
from moekern.model.sizes import Size
from moekern.router import kept_count
from moekern.statistics.layer import HALVES, LayerStatistics

AT_ONCE = frozenset({"outliers", "gradient"})  # tiers that need all of the text (`tiers.not_by_segments`)
COPIES = 2  # of a layer's parameters: experts are stacked, then gate and up are joined; assumed
CONVERTED = 0.8  # of a layer's experts, that is held beside them while they are stacked and joined; measured
TOUCHED = 20  # times that norms, residuals and rotations write a layer's hidden states; assumed
LOGITS = 14  # times that evaluation writes the logits of a batch in float32; assumed
HELD_LOGITS = 6  # of them, that are held at the same time; assumed
BACKWARD = 4  # forward passes that the gradient tier is worth: one, and one with its backward pass; assumed
PRUNING = 150 << 20  # bytes of memory that `prune` takes, whatever the model; assumed
WORKING = 6  # copies of an expert in training: weights, gradients, Adam's two, the best, those that it had; assumed
STATES = "hidden states"
REPLAYED = 512  # tokens of a domain that tier replay runs all experts on, where nobody says how many


def estimate(job: Job, not_refitted: str = "") -> tuple[Stage, ...]:
    """Calibrate, evaluate, prune, and a refit without and with --refine. `not_refitted` says why experts cannot be."""
    return job.calibrate(), job.evaluate(), job.prune(), *(job.refit(each, not_refitted) for each in (False, True))


def job_of(
    checkpoint: Checkpoint, layout: Layout, model: Counted, rates: Rates, asked: Asked, budget: Budget,
    *, held: int = 0, started: float = 0.0,
) -> Job:  # fmt: skip
    """What stages are estimated of. `held` are the bytes that a process has before it reads a weight, `started` the
    seconds that it needs to get there."""
    return Job(checkpoint, layout, model, rates, asked, budget, Part("the process itself", held, "measured"),
               Part("start", started, "measured" if started else "assumed"))  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A model, a machine, and what is to be done."""

    checkpoint: Checkpoint
    layout: Layout
    model: Counted
    rates: Rates
    asked: Asked
    budget: Budget
    process: Part
    start: Part

    def calibrate(self) -> Stage:
        tiers, upto = self.asked.tiers, self.model.upto
        forward = [self.layer_seconds(layer, measured=True) for layer in self.model.layers[:upto]]
        passes = [forward] * (2 if "outliers" in tiers else 1)
        if "gradient" in tiers:
            every = [self.layer_seconds(layer, measured=False) for layer in self.model.layers]
            passes += [every, [(BACKWARD - 1) * each for each in every]]
        more = [Part("replay", self.replay_seconds(), "assumed")] if "replay" in tiers else []
        if "weights" in tiers:
            more.append(Part("weights, read again", self.read_seconds(self.model.layers[:upto]), self.rates.read.known))
        sums = [self.sums(layer) for layer in self.model.layers if layer.experts]
        inputs = len(self.model.layers) * self.hidden if "gradient" in tiers else 0
        working = [
            Part(STATES, self.hidden + 8 * self.asked.tokens, "counted"),
            *([Part("inputs of all layers, or --spill", inputs, "counted")] if inputs else []),
        ]
        device = [Part("sums of a layer", max(sums), "counted"), Part("activations", self.activations(), "assumed")]
        groups = 1 if AT_ONCE & set(tiers) else SEGMENTS * self.asked.domains
        statistics = Figure((Part("statistics", sum(sums), "counted"),))
        found = self.stage("calibrate", passes, more, working, device, statistics, most=groups)
        if "gradient" not in tiers:
            return found
        kept = sized(4 * sum(layer.routed for layer in self.model.layers))
        note = f"with --part, gradients of each segment take {kept} of the disk until all parts are merged"
        return replace(found, notes=(*found.notes, note))

    def evaluate(self) -> Stage:
        model, shapes, plans = self.model, self.model.shapes, self.asked.plans
        cut = [Part("a layer cut to a plan", self.kept * self.largest.weights * model.itemsize, "counted")]
        logits = shapes.sequence * model.vocabulary * 4
        working = [Part(STATES, (1 + plans) * self.hidden + 8 * self.asked.tokens, "counted")]
        device = [
            *(cut if plans else []),
            Part("logits of a batch", HELD_LOGITS * logits, "assumed"),
            Part("activations", self.activations() * shapes.sequence / shapes.tokens, "assumed"),
        ]
        each = [
            (1 + plans) * self.layer_seconds(layer, measured=False)
            + plans * self.kept * layer.size.weights * model.itemsize / self.rates.fill.value
            for layer in model.layers
        ]
        more = [Part("logits and losses", self.head_seconds(self.asked.tokens * (1 + plans)), "assumed")]
        sequences = math.ceil(self.asked.tokens / shapes.sequence)
        return self.stage("evaluate", [each], more, working, device, Figure(()), most=sequences)

    def prune(self) -> Stage:
        kept = overview(self.checkpoint).bytes_at(kept_count(self.asked.keep, self.layout.router))
        slower = min(self.rates.read, self.rates.write, key=lambda rate: rate.value)
        return Stage(
            "prune",
            Figure((Part("copying", kept / slower.value, slower.known),)),
            Figure((Part("the process itself", PRUNING, "assumed"),)),
            None,
            Figure((Part("the checkpoint", kept, "counted"),)),
            "disk",
            ("less time and disk where the file system shares blocks (--copy reflink)",),
        )

    def refit(self, refine: bool, not_refitted: str) -> Stage:
        """One pass of the original's stream and the pruned model's: in each layer experts are asked once without any
        output and once with, and fitted in between. Of the plan as it is, what is judged goes through."""
        model, shapes, asked = self.model, self.model.shapes, self.asked
        experts = [self.experts_seconds(layer) for layer in model.layers]
        judged = min(HELD * asked.tokens, MOST * asked.domains)
        share, size = judged / asked.tokens, model.itemsize
        cut = self.kept * self.largest.weights * size
        each = [
            (2 + share + bool(layer.experts)) * self.layer_seconds(layer, measured=False)
            + 3 * self.kept * layer.size.weights * size / self.rates.fill.value * bool(layer.experts)
            for layer in model.layers
        ]
        more = [
            Part("logits and losses", self.head_seconds(3 * judged), "assumed"),
            Part(f"ridge, {RIDGE} forwards of the experts", RIDGE * sum(experts), "assumed"),
        ]
        kept = dict.fromkeys(self.layout.layers, kept_count(asked.keep, self.layout.router))
        if refine:
            steps = refine_steps(asked.tokens, shapes.top_k, kept)
            more.append(Part(f"refine, {REFINE} more", REFINE * sum(experts), "assumed"))
            more.append(Part(f"its {steps} steps", STEP * steps, "assumed"))
        one = max(layer.routed // max(1, layer.experts) for layer in model.layers)
        count = max(kept.values()) * shapes.inner
        rows = asked.tokens * shapes.top_k
        working = [
            Part(STATES, (2 + share) * self.hidden + 8 * asked.tokens, "counted"),
            Part("rows of a layer", row_bytes(asked.tokens, shapes.hidden, size), "counted"),
            Part("copies of the down projections", 4 * (1 + FACTORS) * count * shapes.hidden, "counted"),
        ]
        device = [
            Part("a layer cut to a plan, and the last one again", 2 * cut, "counted"),
            Part("logits of a batch", HELD_LOGITS * shapes.tokens * model.vocabulary * 4, "assumed"),
            Part("activations", self.activations(), "assumed"),
            *([Part("an expert in training", 4 * WORKING * one, "assumed")] if refine else []),
        ]
        computed = refitted_bytes(self.checkpoint, self.layout, kept, all_parts=refine)
        disk = Figure((Part("refitted layers, until the checkpoint is done", computed, "counted"),))
        held = [Part("which rows experts have", numbers_bytes(asked.tokens, shapes.top_k), "counted")]
        name = "refit --refine" if refine else "refit"
        found = self.stage(name, [each], more, working, device, disk, whole=True, held=held)
        why = not_refitted or ("" if computed else "its experts are no matrices of gate, up and down")
        spare = sized(8 * count * shapes.inner + 4 * shapes.inner * rows)
        moving = "" if self.rates.transfer is None else "; moving rows between memory and GPU is not in it"
        notes = (
            *([f"it cannot be refitted: {why}"] if why else []),
            "an estimate: forwards were counted on a CPU, where ridge took 5 to 7, refine 15 to 18 more; up to "
            f"{spare} of features and their products are kept where memory has room, else computed anew{moving}",
        )
        return replace(found, notes=(*found.notes, *notes))

    def stage(
        self, name: str, passes: Sequence[Sequence[float]], more: Sequence[Part], working: Sequence[Part],
        device: Sequence[Part], disk: Figure, most: int = 1, whole: bool = False, held: Sequence[Part] = (),
    ) -> Stage:  # fmt: skip
        """One that takes passes over the layers, of so many seconds each: a layer is read while the one before it
        computes, then filled. Text that there is no room for is taken in up to `most` groups, with so many times the
        passes; one that needs `whole` layers cannot run them in groups of experts. What is `working` may go to a file,
        what is `held` may not."""
        layers = self.model.layers
        memory, on_gpu = self.resident([*held, *working], device)
        spilled, groups, notes = self.within(memory, working, most, whole)
        passes = [[each / groups for each in computing] for computing in passes for _ in range(groups)]
        reads = [self.read_seconds([layer]) for layer in layers]
        waiting = (
            sum(_waits(reads, computing) for computing in passes) + self.model.skeleton.stored / self.rates.read.value
        )
        computing, reading = sum(map(sum, passes)), sum(sum(reads[: len(each)]) for each in passes)
        filling = sum(self.fill_seconds(layer.size) for each in passes for layer in layers[: len(each)])
        seconds = (
            self.start,
            Part("computing", computing, "measured"),
            Part("making parameters", filling + self.fill_seconds(self.model.skeleton), "assumed"),
            Part("waiting for the disk", waiting, self.rates.read.known),
            *more,
        )
        parts = {"compute": computing + sum(part.value for part in more), "disk": reading, "memory": filling}
        if self.rates.transfer is not None:
            parts["transfer"] = parts.pop("memory")
        notes = (*self.obstacles(), *notes)
        return Stage(
            name, Figure(seconds), memory, on_gpu, Figure((*disk.parts, *spilled)),
            max(parts, key=parts.__getitem__), notes,
        )  # fmt: skip

    def resident(self, working: Sequence[Part], device: Sequence[Part]) -> tuple[Figure, Figure | None]:
        """Memory of the host, and of the GPU where there is one."""
        size = self.model.itemsize
        weights = [
            Part("skeleton", self.model.skeleton.weights * size, "counted"),
            Part("a layer's parameters", self.largest.weights * size, "counted"),
        ]
        buffer = Part("a layer as it is stored", self.largest.stored, "counted")
        if (more := self.converted - sum(part.value for part in device)) > 0:  # which is computed with afterwards
            device = [*device, Part("experts as they are made, beyond that", more, "assumed")]
        if self.budget.gpu is None:
            return Figure((self.process, *weights, buffer, *working, *device)), None
        return Figure((self.process, buffer, *working)), Figure((*weights, *device))

    @property
    def converted(self) -> float:
        """Bytes that are held beside a layer while its experts are made, if they are not just copied: of all, or of
        pieces where memory is short (`model.expert_groups`)."""
        size, host = self.model.itemsize, self.budget.gpu is None
        experts = max((layer.routed for layer in self.model.layers if not layer.copied), default=0) * size
        room = self.budget.host if self.budget.gpu is None else self.budget.gpu
        whole = self.largest.weights * size + experts + self.largest.stored * host
        if whole > HALF * (less_work(room) - self.model.skeleton.weights * size):
            experts = min(experts, 2 * PIECE)
        return CONVERTED * experts

    def within(
        self, memory: Figure, working: Sequence[Part], most: int, whole: bool
    ) -> tuple[list[Part], int, tuple[str, ...]]:
        """What goes to the disk where memory is less than a stage would take, in how many groups the text is taken
        where the disk has no room for that, and what happens then."""
        room = self.budget.host + self.process.value
        if memory.value <= room:
            return [], 1, ()
        movable = sum(part.value for part in working)
        spilled = min(movable, memory.value - room)
        notes = [f"{sized(memory.value)} are more than the {sized(room)} there are: hidden states go to a file"]
        states = sum(part.value for part in working if part.name == STATES)
        if states:
            notes.append(f"where the disk has up to {sized(2 * states)} more, a run that is stopped goes on from there")
        if memory.value - movable > room:
            notes.append("layers are too large for it: allow more" if whole else "a layer is run in groups of experts")
        place, groups = Path(tempfile.gettempdir()), 1
        free = shutil.disk_usage(place).free
        if spilled > free:
            left = f"{place} has {sized(free)} for it"
            fitting = movable - spilled + free
            if most > 1 and movable <= most * fitting:
                groups = math.ceil(movable / fitting)
                notes.append(f"{left}: the text is taken in {groups} groups, each a pass over the weights")
                spilled = free
            else:
                notes.append(f"{left}, which is too little: name another folder (--spill), or less text")
        return [Part("hidden states in a file", spilled, "counted")], groups, ("; ".join(notes),)

    def obstacles(self) -> Iterator[str]:
        """What keeps the model from being run, or comes before it is."""
        config = self.checkpoint.config
        reason = running(self.layout.family, config)[2] or unread(quantisation_of(config))
        if reason:
            yield f"it cannot be run, only pruned: {reason}"
        if self.rates.read.known == "assumed":
            yield f"the download of {sized(self.checkpoint.nbytes)} is not counted, and the disk's speed is assumed"

    @property
    def hidden(self) -> int:
        """Bytes of one hidden state of every token."""
        return self.asked.tokens * self.model.shapes.hidden * self.model.itemsize

    @property
    def largest(self) -> Size:
        layers = [layer.size for layer in self.model.layers]
        return Size(max(size.stored for size in layers), max(size.weights for size in layers))

    @property
    def kept(self) -> float:
        """Share of the experts."""
        return kept_count(self.asked.keep, self.layout.router) / self.layout.num_experts

    def layer_seconds(self, layer: Layer, *, measured: bool) -> float:
        """Computing a layer for all tokens."""
        shapes, rates = self.model.shapes, self.rates
        token = 2 * (layer.size.weights - layer.routed) / rates.dense.value
        token += TOUCHED * shapes.hidden * self.model.itemsize / rates.fill.value
        token += 1 / rates.measuring.value if measured and layer.experts else 0
        whole = self.asked.tokens * token + self.asked.tokens / shapes.sequence / rates.attention.value
        return whole + self.experts_seconds(layer)

    def experts_seconds(self, layer: Layer) -> float:
        """Computing its routed experts for all tokens."""
        shapes = self.model.shapes
        filled = shapes.rows * shapes.experts / (shapes.tokens * shapes.top_k)  # rows for each routed one
        used = layer.routed * shapes.top_k / layer.experts if layer.experts else 0
        return 2 * self.asked.tokens * used * filled / self.rates.experts.value

    def head_seconds(self, tokens: float) -> float:
        """Logits and losses of so many tokens."""
        numbers = tokens * self.model.vocabulary
        return 2 * numbers * self.model.shapes.hidden / self.rates.dense.value + LOGITS * numbers * 4 / (
            self.rates.fill.value
        )

    def replay_seconds(self) -> float:
        tokens = min(self.asked.tokens, REPLAYED * self.asked.domains)
        return sum(2 * tokens * layer.routed / self.rates.experts.value for layer in self.model.layers)

    def read_seconds(self, layers: Iterable[Layer]) -> float:
        return sum(layer.size.stored for layer in layers) / self.rates.read.value

    def fill_seconds(self, size: Size) -> float:
        if self.rates.transfer is not None:
            return size.stored / self.rates.transfer.value
        return COPIES * size.weights * self.model.itemsize / self.rates.fill.value

    def sums(self, layer: Layer) -> int:
        """Bytes of a layer's sums, of all domains."""
        words = -(-self.model.vocabulary // 64)
        hidden = self.model.shapes.hidden
        dimensions = hidden if {"dimensions", "outliers"} & set(self.asked.tiers) else 0
        held = LayerStatistics.zeros(
            layer.experts, dimensions, "meta", tiers=(*self.asked.tiers, HALVES), hidden=hidden, words=words
        )
        return self.asked.domains * sum(value.nbytes for value in held.tensors().values())

    def activations(self) -> float:
        """Bytes that a layer holds at a time while it computes a chunk: its routed rows, and what is T rows long."""
        s = self.model.shapes
        rows = max(s.tokens * s.top_k, s.rows * s.experts)
        return (rows * 3 * (s.hidden + s.inner) + s.tokens * (8 * s.hidden + 4 * s.heads * s.head_size)) * (
            self.model.itemsize
        )


def _waits(reads: Sequence[float], computing: Sequence[float]) -> float:
    """Seconds that nothing is computed because the next layer is still being read."""
    following = reads[1 : len(computing)]
    return reads[0] + sum(max(0.0, read - spent) for read, spent in zip(following, computing, strict=False))

"""Which text is trained on in which step, and which is only looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.held_out import LEAST
from moekern.recovery.settings import Training
from moekern.recovery.teacher import Predicted, Teacher
from moekern.refit.variants import FITTED, HELD, JUDGED, Split


@dataclass(frozen=True)
class Sample:
    """A batch and its place in the text."""

    place: int
    batch: Batch

    @property
    def predicted(self) -> int:
        return self.batch.predicted

    def counted(self, logits: Tensor, teacher: Teacher | None) -> tuple[Tensor, Tensor, Predicted | None]:
        """Of logits [B, S, V] those [n, V] of tokens whose successors count, these int64 [n], and what the original
        predicts in their places."""
        rows, wanted = logits[:, :-1].flatten(0, 1), self.batch.input_ids[:, 1:].flatten()
        own, some = None if teacher is None else teacher.of(self.place), self.batch.counted
        if some is not None:
            rows, wanted, own = rows[some.to(rows.device)], wanted[some], None if own is None else own.rows(some)
        return rows, wanted.to(rows.device), own

    def __repr__(self) -> str:
        return f"domain {self.batch.domain}"


@dataclass(frozen=True)
class Course:
    """samples: all that is used, by place. steps: the samples of each; held chooses the best state, judged nothing."""

    samples: tuple[Sample, ...]
    steps: tuple[tuple[Sample, ...], ...]
    held: tuple[Sample, ...]
    judged: tuple[Sample, ...]
    notes: tuple[str, ...]

    @staticmethod
    def of(data: TokenData, training: Training, judged: TokenData | None = None) -> Course:
        """Chunks of the text in an order drawn anew each time it has been gone through. Of each domain a tenth is held
        back, and another one, unless it is given, to judge by.

        Raises InputError where there is nothing to train on.
        """
        split = Split.of(data, judged)
        batches = {use: _of(split, use) for use in (FITTED, HELD, JUDGED)}
        fitted = batches[FITTED]
        if not fitted:
            raise InputError("recover: no sequence of two tokens is there to train on; give text (--data)", kind="data")
        order = schedule([batch.input_ids.numel() for batch in fitted], training)
        used = sorted({n for step in order for n in step})
        samples = [Sample(n, b) for n, b in enumerate([fitted[n] for n in used] + batches[HELD] + batches[JUDGED])]
        of = dict(zip(used, samples, strict=False))
        first, last = len(used), len(used) + len(batches[HELD])
        return Course(
            tuple(samples),
            tuple(tuple(of[n] for n in step) for step in order),
            tuple(samples[first:last]),
            tuple(samples[last:]),
            _notes(split, order, [batch.input_ids.numel() for batch in fitted]),
        )

    def tokens(self, step: int) -> int:
        return sum(sample.batch.input_ids.numel() for sample in self.steps[step])


def schedule(sizes: Sequence[int], training: Training) -> list[list[int]]:
    """The batches, of so many tokens each, of every step, one at least: a step ends where all so far come nearest to
    what they are to have, so that what one lacks the next one has."""
    rng, steps = np.random.default_rng(training.seed), list[list[int]]()
    if training.epochs == 0:
        return steps
    waiting: list[int] = rng.permutation(len(sizes)).tolist()
    whole = round(training.epochs * sum(sizes))
    most = training.tokens_of_step(whole)
    total = 0
    for number in range(1, max(1, round(whole / most)) + 1):
        step = list[int]()
        while not step or total + sizes[waiting[0]] / 2 <= number * most:
            step.append(waiting.pop(0))
            total += sizes[step[-1]]
            waiting = waiting or rng.permutation(len(sizes)).tolist()
        steps.append(step)
    return steps


def _of(split: Split, use: int) -> list[Batch]:
    """Batches of a use that predict something."""
    pairs = zip(split.batches, split.uses, strict=True)
    return [batch for batch, own in pairs if own == use and batch.predicted]


def _notes(split: Split, order: Sequence[Sequence[int]], sizes: Sequence[int]) -> tuple[str, ...]:
    """What a person should know of the text."""
    notes = []
    total, there = sum(sizes[n] for step in order for n in step), sum(sizes)
    if total > 1.5 * there:
        notes.append(
            f"{total} tokens of {there} different ones: each is trained on {total / there:.1f} times; give more"
        )
    if not split.tokens(HELD):
        few = f"no domain has the {LEAST} sequences of which one is held back"
        notes.append(f"{few}: nothing chooses the best state, so the last one is written; give more text")
    return tuple(notes)

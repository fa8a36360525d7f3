"""Steps of training, and looks at held-back text: passes over the layers, forward and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from moekern.data.batches import dealt
from moekern.errors import InputError
from moekern.evaluation.losses import Loss, means
from moekern.model.backward import Backward, eager_experts
from moekern.model.batch_groups import batch_groups
from moekern.model.compute import few_tokens
from moekern.model.finite import NotFinite, all_finite
from moekern.model.layerwise import LayerwiseModel
from moekern.model.walk import Pass
from moekern.recovery.course import Sample
from moekern.recovery.entropy import Entropy
from moekern.recovery.objective import Objective
from moekern.recovery.teacher import Teacher, check_head
from moekern.recovery.trained import Trained

WHAT = "recover"


@dataclass
class Steps:
    """What trains of a model, towards what. teacher: None where the loss is cross-entropy alone. entropy: the weight of
    that of routers."""

    layerwise: LayerwiseModel
    trained: Trained
    objective: Objective
    teacher: Teacher | None
    entropy: float = 0.0

    def step(self, samples: Sequence[Sample], rate: float, progress: Callable[[float], None]) -> dict[str, float]:
        """One step on these samples, which the ranks share. What is told of it: loss, its parts, the norm of gradients.

        Raises InputError for numbers that are not finite, before anything has changed.
        """
        layerwise, trained = self.layerwise, self.trained
        total = sum(sample.predicted for sample in samples)
        mine = self._own(samples)
        sums = torch.zeros(4, dtype=torch.float64)

        def loss(sample: Sample) -> Tensor:
            found, parts = self._loss(sample)
            nonlocal sums
            sums = sums + parts
            return found / total

        layers = len(layerwise.layers)
        first = min((one.layer for one in trained.some if one.layer is not None), default=layers)
        tokens = sum(sample.batch.input_ids.numel() for sample in samples)
        routers = Entropy(layerwise, self.entropy, tokens, first)
        with eager_experts(layerwise.model), layerwise.states() as states:
            trained.put_in(None)
            back = Backward(
                layerwise, first, states, dict(enumerate(mine)), loss,
                what=WHAT, loaded=trained.put_in, done=trained.take_out, beside=routers.term,
                outside=trained.parameters(None),
            )  # fmt: skip
            back.forward(lambda i: progress((i + 1) / layers / 3))
            trained.add(None, back.of_outside or [None] * len(trained.of_layer(None)))
            trained.take_out(None)
            for i in back.layers():
                trained.put_in(i)
                with routers.watching(i) if self.entropy else nullcontext():
                    self._through(back, i)
                trained.take_out(i)
                progress(1 / 3 + 2 / 3 * (layers - i) / layers)
        sums = sum(layerwise.team.every(sums), torch.zeros_like(sums))
        self._gather()
        told = {"nll": float(sums[0]) / total, "kl": float(sums[1]) / total, "top1": float(sums[2]) / total}
        told |= {"entropy": sum(layerwise.team.every(routers.mean))} if self.entropy else {}
        norm = trained.stepped(rate)
        if not math.isfinite(norm):
            raise InputError(f"{WHAT}: the gradients are not finite; a lower --rate, or --dtype float32, may mend it")
        return {**told, "norm": norm}

    def begin(self) -> None:
        """Let the values of all layers begin, which one layer after the other does when it is first filled."""
        for i in self.layerwise.visit(range(len(self.layerwise.layers))):
            self.trained.put_in(i)
            self.trained.take_out(i)

    def _through(self, back: Backward[Sample], i: int) -> None:
        """The way back of all tasks through a layer that is filled, with the gradients of what trains in it."""
        parameters = self.trained.parameters(i)
        totals: list[Tensor | None] = [None] * len(parameters)
        for number in range(len(back.tasks)):
            found = back.through(i, number, lambda: parameters)
            for n, gradient in enumerate(found):
                if gradient is not None:
                    total = totals[n]
                    totals[n] = gradient.float() if total is None else total.add_(gradient)
        self.trained.add(i, totals)

    def _gather(self) -> None:
        """Gradients of all ranks are added, in the order of ranks."""
        team = self.layerwise.team
        if team.size == 1:
            return
        self.trained.touched = {name for each in team.every(self.trained.touched) for name in each}
        for name in self.trained.names:
            own = self.trained.numbers["gradient", name]
            parts = team.every(own.clone())
            own.copy_(sum(parts[1:], parts[0]))

    def look(
        self, samples: Sequence[Sample], step: Callable[[float, int], None], *, untrained: bool = False
    ) -> Mapping[str, Loss]:
        """Losses by domain of what is trained as it is now, in one pass forward, or in several where there is no room
        for all of the text; the same at every rank. `step` is told how many layers are done, of how many. untrained: of
        the model as the checkpoint has it."""
        found: dict[int, Tensor] = {}
        groups, _ = batch_groups(self.layerwise, [sample.batch.input_ids.numel() for sample in samples])
        of = len(groups) * len(self.layerwise.layers)
        for number, group in enumerate(groups):
            done = number * len(self.layerwise.layers)
            told = lambda layers, _, done=done: step(done + layers, of)  # noqa: E731
            look = _Look(self, self._own(samples[group.start : group.stop]), told, untrained)
            with eager_experts(self.layerwise.model):
                if not untrained:
                    self.trained.put_in(None)
                self.layerwise.run(look.samples, look)
                if not untrained:
                    self.trained.take_out(None)
            for each in self.layerwise.team.every(look.sums):
                found |= each
        rows = ((WHAT, sample.batch.domain, found[sample.place]) for sample in samples)
        return means([WHAT], rows)[WHAT]

    def _own(self, samples: Sequence[Sample]) -> list[Sample]:
        team = self.layerwise.team
        owners = dealt([sample.batch.input_ids.numel() for sample in samples], team.size)
        return [sample for sample, owner in zip(samples, owners, strict=True) if owner == team.rank]

    def _loss(self, sample: Sample) -> tuple[Tensor, Tensor]:
        logits = self.layerwise.compute(sample.batch).logits
        check_head(self.layerwise, logits, self.layerwise.vocab_size)
        return self.objective(*sample.counted(logits, self.teacher))


class _Look(Pass[Sample]):
    """Losses of samples, without a gradient."""

    def __init__(
        self, steps: Steps, samples: Sequence[Sample], step: Callable[[float, int], None], untrained: bool
    ) -> None:
        self.steps, self.samples, self.step, self.untrained = steps, samples, step, untrained
        self.sums: dict[int, Tensor] = {}

    def forward(self, task: Sample) -> None:
        _, found = self.steps._loss(task)
        if not all_finite(found):
            raise NotFinite(len(self.steps.layerwise.layers))
        self.sums[task.place] = found

    @contextmanager
    def entering(self, task: Sample, layer: int) -> Iterator[None]:
        with few_tokens(task.batch.input_ids.numel(), self.steps.layerwise.device):
            yield

    def name(self, task: Sample) -> str:
        return f"domain {task.batch.domain}"

    def loaded(self, layer: int) -> None:
        if not self.untrained:
            self.steps.trained.put_in(layer)

    def done(self, layer: int) -> None:
        if not self.untrained:
            self.steps.trained.take_out(layer)
        self.step(layer + 1, len(self.steps.layerwise.layers))

"""A model under masks: losses, and what every expert is worth to them, in passes over the layers forward and back.

A mask is the plan that it would become: the router chooses among the experts that stay (`model.masking`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.evaluation.losses import Loss, means
from moekern.masks.slots import Routing, asking, check_called, with_slots
from moekern.model.backward import Backward, eager_experts, handed_more
from moekern.model.compute import few_tokens
from moekern.model.expert_lists import NO_GRADIENT, blocks_with_lists
from moekern.model.finite import NotFinite, all_finite
from moekern.model.layerwise import LayerwiseModel
from moekern.model.masking import masked_layer
from moekern.model.stepwise import Tangled
from moekern.model.walk import Pass
from moekern.recovery.course import Sample
from moekern.recovery.objective import Objective
from moekern.recovery.teacher import Teacher, check_head

WHAT = "optimise"
Dropped = Mapping[str, Sequence[int]]  # by layer key


@dataclass(frozen=True)
class Task:
    """A sample under the mask of this number."""

    sample: Sample
    mask: int
    dropped: Dropped

    def __repr__(self) -> str:
        return repr(self.sample)


def check_optimised(layerwise: LayerwiseModel) -> None:
    """Raise InputError for a model whose masks cannot be optimised; nothing has to be filled."""
    for _, block in blocks_with_lists(layerwise.model):
        raise InputError(f"{WHAT}: {type(block).__name__}: {NO_GRADIENT}")
    if layerwise.groups.cuts:
        raise layerwise.takes.refusal("masks of layers that are run in groups of experts are not optimised")
    for i, key in layerwise.moe_keys.items():
        check_called(layerwise.layers[i], key, WHAT)


@dataclass
class Masked:
    """teacher: None where the loss is cross-entropy alone."""

    layerwise: LayerwiseModel
    objective: Objective
    teacher: Teacher | None
    layer: int = -1  # which is in memory
    own_choice: bool = False  # the mask does not hold: the layer is asked for its own choice

    def worth(
        self,
        samples: Sequence[Sample],
        masks: Sequence[Dropped],
        progress: Callable[[float], None] = lambda share: None,
        *,
        plain: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The derivative of the mean loss of samples, which are dealt to the masks, by each mask's experts: float64
        [masks, E] by layer (`slots`); and the sums that the objective tells.

        Raises InputError for numbers that are not finite.
        """
        layerwise, total = self.layerwise, sum(sample.predicted for sample in samples)
        tasks = [Task(s, n % len(masks), masks[n % len(masks)]) for n, s in enumerate(samples)]
        sums, found = torch.zeros(4, dtype=torch.float64), dict[str, Tensor]()

        def loss(task: Task) -> Tensor:
            nonlocal sums
            value, parts = self.loss(task)
            sums = sums + parts
            return value / total

        first, layers = min(layerwise.moe_keys), len(layerwise.layers)
        with eager_experts(layerwise.model), layerwise.states() as states:
            back = Backward(layerwise, first, states, dict(enumerate(tasks)), loss, what=WHAT, loaded=self._at)
            back.forward(lambda i: progress((i + 1) / layers / 3))
            for i in back.layers():
                self._at(i)
                key = layerwise.moe_keys.get(i)
                if key is not None:
                    found[key] = torch.zeros(len(masks), layerwise.layout.layers[key].num_experts, dtype=torch.float64)
                for number, task in enumerate(tasks):
                    if key is None:
                        back.through(i, number, lambda: ())
                    else:
                        found[key][task.mask] += self._through(back, i, number, key, plain)
                progress(1 / 3 + 2 / 3 * (layers - i) / (layers - first))
        if not all(all_finite(value) for value in found.values()):
            raise InputError(f"{WHAT}: gates' gradients are not finite; --dtype float32 may mend it")
        return found, sums

    def _through(self, back: Backward[Task], i: int, number: int, key: str, plain: bool) -> Tensor:
        layer, dropped = self.layerwise.layers[i], back.tasks[number].dropped[key]
        unmasked = self._own_choice(back, i, number)
        with with_slots(layer, self.layerwise.layout.layers[key].num_experts, unmasked) as slots:
            gradients = back.through(i, number, lambda: slots.leaves)
        return slots.worth(gradients, dropped, plain=plain)

    def _own_choice(self, back: Backward[Task], i: int, number: int) -> Routing:
        """What layer i would choose without a mask, of the same input."""
        self.own_choice = True
        try:
            with asking(self.layerwise.layers[i]) as found:
                back.steps.only(i, back.tasks[number], back.entering(i, number))
        finally:
            self.own_choice = False
        return found[0]

    def look(self, samples: Sequence[Sample], dropped: Dropped) -> Mapping[str, Loss]:
        """Losses by domain under one mask, in a pass forward."""
        look = _Look(self)
        with eager_experts(self.layerwise.model), self.layerwise.states() as states:
            try:
                self.layerwise.run_stepwise([Task(sample, 0, dropped) for sample in samples], look, states)
            except Tangled as found:
                raise handed_more(WHAT, self.layerwise, found.layer) from None
        return means([WHAT], ((WHAT, s.batch.domain, look.sums[s.place]) for s in samples))[WHAT]

    def loss(self, task: Task) -> tuple[Tensor, Tensor]:
        """A task's whole forward pass; its loss, as the objective has it."""
        batch = task.sample.batch
        with self._applied(task.dropped):
            logits = self.layerwise.compute(batch).logits
        check_head(self.layerwise, logits, self.layerwise.vocab_size)
        return self.objective(*task.sample.counted(logits, self.teacher))

    def _at(self, layer: int) -> None:
        self.layer = layer

    @contextmanager
    def _applied(self, dropped: Dropped) -> Iterator[None]:
        """The mask holds in the layer that is in memory."""
        key = self.layerwise.moe_keys.get(self.layer)
        with ExitStack() as stack:
            if key is not None and dropped[key] and not self.own_choice:
                loader, layer = self.layerwise.loader, self.layerwise.layout.layers[key]
                module = self.layerwise.layers[self.layer]
                stack.enter_context(masked_layer(loader, layer, module, dropped[key]))
            yield


class _Look(Pass[Task]):
    """Losses of samples, without a gradient."""

    def __init__(self, masked: Masked) -> None:
        self.masked = masked
        self.sums: dict[int, Tensor] = {}

    def forward(self, task: Task) -> None:
        _, found = self.masked.loss(task)
        if not all_finite(found):
            raise NotFinite(len(self.masked.layerwise.layers))
        self.sums[task.sample.place] = found

    @contextmanager
    def entering(self, task: Task, layer: int) -> Iterator[None]:
        with few_tokens(task.sample.batch.input_ids.numel(), self.masked.layerwise.device):
            yield

    def name(self, task: Task) -> str:
        return f"domain {task.sample.batch.domain}"

    def loaded(self, layer: int) -> None:
        self.masked._at(layer)

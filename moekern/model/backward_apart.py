"""The way back through a decoder layer whose experts run in groups.

The rows y of all tasks are computed first, as on the way forward. Then a task goes through the layer with y as a leaf,
which gives the gradient of y and what reaches the layer's input past the experts. Each group of experts is filled once
more and makes of that the gradients of its weights and of what it was given, x. At last the task goes to the experts'
call again, to take the gradient of x to the layer's input. Autograd is on each time, so that the same numbers come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from moekern.model.apart import TOKENS, Asked, Rows, RowsApart
from moekern.model.backward import Backward
from moekern.model.experts import experts_of
from moekern.model.states import State, States

Task = TypeVar("Task")


@dataclass
class _Leaves(RowsApart):
    """The rows y are leaves; when a task asks once more, x is kept with its graph."""

    x: Tensor | None = None
    y: Tensor | None = None
    again: bool = False

    def ask(self, rows: Rows, wanted: Sequence[tuple[Tensor, Tensor]]) -> None:
        if not self.again:
            super().ask(rows, wanted)
        ((tokens, offsets),) = wanted
        self.x, _ = rows.given(tokens, offsets)
        raise Asked

    def answer(self, rows: Rows, n: int, offsets: Tensor) -> Tensor:
        self.y = super().answer(rows, n, offsets).requires_grad_()
        return self.y


@dataclass
class BackwardApart(Generic[Task]):
    """Of one layer. Each task is taken, in this order, through `outputs`, `groups` and `inputs`."""

    back: Backward[Task]
    layer: int
    kept: States = field(init=False)
    rows: _Leaves = field(init=False)

    def __enter__(self) -> BackwardApart[Task]:
        layerwise = self.back.layerwise
        self.kept = layerwise.states_beside(self.back.store)
        self.rows = _Leaves(layerwise.groups.cuts[self.layer], self.kept, layerwise.device)
        for task in self.back.tasks:
            self._run(task)
        self.rows.compute(lambda wanted: layerwise.filled(self.layer, wanted, layerwise.groups.numbers[self.layer, 0]))
        return self

    def __exit__(self, *error: object) -> None:
        self.kept.clear()

    def _run(self, task: int) -> tuple[Tensor, Any]:
        """A task's input, a leaf, and what the layer makes of it."""
        given = self.back.entering(self.layer, task)
        return given.hidden, self.back.steps.only(self.layer, self.back.tasks[task], given, task, self.rows)

    def outputs(self, task: int, wanted: Callable[[], Sequence[Tensor]]) -> list[Tensor | None]:
        """Gradients of `wanted()` by way of all but the experts; the experts' outputs get theirs."""
        hidden, output = self._run(task)
        y, self.rows.y = self.rows.y, None
        assert y is not None
        found = self.back.gradients(self.layer, task, output, [hidden, y, *wanted()])
        for name, gradient in (("past the experts", found[0]), ("of y", found[1])):
            if gradient is not None:
                self.kept.put((name, task), State(gradient, {}))
        return found[2:]

    def groups(self, tasks: Sequence[int], *, last: bool) -> Iterator[tuple[range, nn.Module]]:
        """The experts of each group that these tasks, or those of other processes, want, with a layer that holds them,
        for `weights`; `last`: no others will."""
        layerwise, groups = self.back.layerwise, self.rows.groups
        before = self.layer - 1 if self.layer > self.back.first else None
        then = before if last else layerwise.groups.numbers[self.layer, 0]
        own = [g for g, experts in enumerate(groups) if any(self._rows_of(task, experts) for task in tasks)]
        wanted = sorted(set().union(*layerwise.team.every(own)))
        for g, layer in layerwise.filled(self.layer, wanted, then):
            yield groups[g], layer

    def _rows_of(self, task: int, experts: range) -> range:
        (request,) = self.rows.requests[task]
        own, _ = request.within(experts)
        return range(own.start, own.stop)

    def weights(self, task: int, experts: range, layer: nn.Module, wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of `wanted`, weights of a group that is filled; what the experts were given gets its own."""
        (request,) = self.rows.requests[task]
        own, offsets = request.within(experts)
        if own.stop == own.start or ("of y", task) not in self.kept.there:
            return [None] * len(wanted)
        device = self.back.layerwise.device
        asked = self.kept.look(("asked", task, 0))
        tokens = asked.beside[TOKENS][own]
        with torch.enable_grad():
            x = asked.hidden[tokens].to(device).requires_grad_()
            y = request.of_rows(experts_of(layer), x, offsets.to(device))
        upstream = self.kept.look(("of y", task)).hidden[own].to(device, y.dtype)
        found = torch.autograd.grad(y, [x, *wanted], upstream, allow_unused=True)
        if found[0] is not None:
            total = self._of_x(task, asked.hidden).index_add_(0, tokens, found[0].to("cpu", torch.float32))
            self.kept.put(("of x", task), State(total, {}))
        return list(found[1:])

    def _of_x(self, task: int, x: Tensor) -> Tensor:
        """The gradient of what the experts were given, as far as it is known, in float32."""
        known = ("of x", task) in self.kept.there
        return self.kept.take(("of x", task)).hidden if known else torch.zeros_like(x, dtype=torch.float32)

    def inputs(self, task: int, wanted: Callable[[], Sequence[Tensor]]) -> list[Tensor | None]:
        """Gradients of `wanted()` by way of the experts; the task leaves the layer."""
        self.rows.asking = self.rows.again = True
        try:
            hidden, _ = self._run(task)
        finally:
            self.rows.asking = self.rows.again = False
        x, self.rows.x = self.rows.x, None
        assert x is not None
        upstream = self._of_x(task, self.kept.take(("asked", task, 0)).hidden).to(x.device, x.dtype)
        found = torch.autograd.grad(x, [hidden, *wanted()], upstream, allow_unused=True)
        total = self.kept.take(("past the experts", task)).hidden.to(hidden.device)
        self.back.hand_on(self.layer, task, hidden, total if found[0] is None else total + found[0])
        return list(found[1:])

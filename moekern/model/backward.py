"""A backward pass with one decoder layer in memory: inputs kept on the way forward, layers visited in reverse.

On the way forward the hidden states that every layer is given are kept, from the first layer that is wanted on. Behind
the last layer autograd is switched on with a fresh leaf, so that the model's own norm, head and loss give the gradient
of its output. Then each layer is loaded again, run with autograd from what it was given, and hands the gradient of its
input to the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from moekern.errors import InputError
from moekern.model.finite import NotFinite, all_finite
from moekern.model.journal import Stage
from moekern.model.layer_lists import is_experts_module
from moekern.model.layerwise import LayerwiseModel
from moekern.model.states import State, States
from moekern.model.stepwise import Stepwise, Tangled
from moekern.model.transformers_api import experts_implementation
from moekern.model.walk import Pass, hidden_of

Task = TypeVar("Task")


@dataclass
class Backward(Generic[Task]):
    """What the way forward kept, from decoder layer `first` on. `loss(task)` is a task's whole forward pass."""

    layerwise: LayerwiseModel
    first: int
    store: States  # by (what it is, layer or -1, task)
    tasks: Mapping[int, Task]  # by number; of several processes each has its own
    loss: Callable[[Task], Tensor]
    kept: Callable[[], Any] = lambda: None  # what another process must know that goes on with this
    what: str = "--tier gradient"  # what it is for, in refusals
    loaded: Callable[[int], None] = lambda i: None  # a layer's weights are in memory, on the way forward: see `Pass`
    done: Callable[[int], None] = lambda i: None
    beside: Callable[[], Tensor | None] = lambda: None  # what the layer that has run adds to the loss, a number
    outside: Sequence[Tensor] = ()  # leaves behind the layers (a norm's weight) whose gradients are wanted too
    of_outside: list[Tensor] = field(default_factory=list)  # these, summed over tasks in float32
    steps: Stepwise = field(init=False)

    def forward(self, progress: Callable[[int], None], stage: Stage | None = None) -> None:
        """Keep the layers' inputs, and the gradient of the loss by the last layer's output."""
        run = _Forward(self, progress)
        with run.hooked():
            try:
                self.layerwise.run_stepwise(list(self.tasks.items()), run, self.store, stage)
            except Tangled as found:
                raise self.refusal(found.layer) from None

    def layers(self, stage: Stage | None = None) -> Iterator[int]:
        """Decoder layers from the last one to the first that is wanted, each with its weights in memory; with a `stage`
        from the one that a stopped run was in."""
        run, order = _Alone(self), range(len(self.layerwise.layers) - 1, self.first - 1, -1)
        done = 0
        if stage is not None and stage.left is not None:
            self.layerwise.take_over(stage, self.store, len(order), [("gradient", -1, task) for task in self.tasks])
            done = stage.left.layer
        with self.layerwise.stepwise(run, self.store) as self.steps:
            for i in self.layerwise.visit(order[done:]):
                yield i
                if stage is not None:
                    stage.save(order[0] - i + 1, len(order), self.store, self.kept, self.layerwise.returns)

    def through(self, i: int, task: int, wanted: Callable[[], Sequence[Tensor]]) -> list[Tensor | None]:
        """One task's way back through layer i: gradients of `wanted()`, asked for when the layer has run.

        Raises InputError where the layer does not hand on what the layer behind it was given.
        """
        given = self.entering(i, task)
        out = self.steps.only(i, self.tasks[task], given)
        found = self.gradients(i, task, out, [given.hidden, *wanted()])
        self.hand_on(i, task, given.hidden, found[0])
        return found[1:]

    def entering(self, i: int, task: int) -> State:
        """What a task enters layer i with, on the device; its hidden states are a leaf."""
        given = self.store.copy(("input", i, task), self.layerwise.device)
        return State(given.hidden.requires_grad_(), given.beside)

    def gradients(self, i: int, task: int, output: Any, wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of `wanted` by way of what layer i has put out; that of its output is used up."""
        out = hidden_of(output)
        upstream = self.store.take(("gradient", -1, task)).hidden.to(out.device, out.dtype)
        outputs, by = [out], [upstream.view_as(out)]
        if (own := self.beside()) is not None:
            outputs, by = [*outputs, own], [*by, torch.ones_like(own)]
        try:
            found = torch.autograd.grad(outputs, wanted, by, allow_unused=True)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            why = "its code changes numbers in place that gradients need"
            raise InputError(f"{self.what}: {type(self.layerwise.layers[i]).__name__}: {why}") from error
        if i + 1 < len(self.layerwise.layers):
            after = self.store.take(("next", -1, task)).hidden
            if after.shape != out.shape or not _alike(out.detach().to("cpu"), after):
                raise self.refusal(i + 1)
        return list(found)

    def hand_on(self, i: int, task: int, hidden: Tensor, gradient: Tensor | None) -> None:
        """A task has left layer i: its input, and the gradient of this, go to the layer before."""
        self.store.take(("input", i, task))
        if i > self.first:
            assert gradient is not None
            self.store.put(("next", -1, task), State(hidden, {}))
            self.store.put(("gradient", -1, task), State(gradient, {}))

    def add_outside(self, gradients: Sequence[Tensor | None]) -> None:
        """One task's gradients of `outside`."""
        if not self.of_outside:
            self.of_outside.extend(torch.zeros_like(leaf, dtype=torch.float32) for leaf in self.outside)
        for total, gradient in zip(self.of_outside, gradients, strict=True):
            if gradient is not None:
                total += gradient

    def refusal(self, i: int) -> InputError:
        return handed_more(self.what, self.layerwise, i)


def eager_experts(model: nn.Module) -> AbstractContextManager[None]:
    """Experts are computed by transformers' own loop, which autograd knows and which was measured to be the fastest."""
    return experts_implementation([m for m in model.modules() if is_experts_module(m)], "eager")


def handed_more(what: str, layerwise: LayerwiseModel, i: int) -> InputError:
    """The error for a family in which layers depend on each other by more than the hidden states."""
    layer, name = type(layerwise.layers[i]).__name__, layerwise.layout.family.name
    return InputError(
        f"{what}: {name}: decoder layer {i} ({layer}) is given more of the layers before it than hidden states, so "
        "gradients cannot be handed back layer by layer"
    )


class _Alone(Pass[Task]):
    """Runs a task's forward pass through one layer."""

    def __init__(self, back: Backward[Task]) -> None:
        self.back = back

    def forward(self, task: Task) -> None:
        self.back.loss(task)


class _Forward(Pass[tuple[int, Task]]):
    """The way forward: what every layer from the first that is wanted on is given, and the loss' first gradient."""

    def __init__(self, back: Backward[Task], progress: Callable[[int], None]) -> None:
        self.back, self.progress = back, progress
        self.running = 0
        self.leaves: dict[int, Tensor] = {}

    def label(self, number: int, task: tuple[int, Task]) -> int:
        return task[0]

    def forward(self, task: tuple[int, Task]) -> None:
        number, batch = task
        try:
            total = self.back.loss(batch)
            if not all_finite(total):
                raise NotFinite(len(self.back.layerwise.layers))
            leaf = self.leaves.pop(number)
            gradient, *others = torch.autograd.grad(total, [leaf, *self.back.outside], allow_unused=True)
        finally:
            torch.set_grad_enabled(False)
        assert gradient is not None
        self.back.store.put(("gradient", -1, number), State(gradient, {}))
        self.back.add_outside(others)

    @contextmanager
    def entering(self, task: tuple[int, Task], layer: int) -> Iterator[None]:
        self.running = task[0]
        yield

    def given(self, task: tuple[int, Task], layer: int, state: State) -> None:
        if layer >= self.back.first:
            if any(value.is_floating_point() for value in state.beside.values()):
                raise Tangled(layer)
            self.back.store.put(("input", layer, task[0]), state, lasting=True)

    def kept(self) -> Any:
        return self.back.kept()

    def loaded(self, layer: int) -> None:
        self.back.loaded(layer)

    def done(self, layer: int) -> None:
        self.back.done(layer)
        self.progress(layer)

    def name(self, task: tuple[int, Task]) -> str:
        return f"the loss of {task[1]}"

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """A hook behind the last layer."""
        handle = self.back.layerwise.layers[-1].register_forward_hook(self._lead)
        try:
            yield
        finally:
            handle.remove()

    def _lead(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        torch.set_grad_enabled(True)  # the last layer is never passed over
        self.leaves[self.running] = leaf = hidden_of(output).detach().requires_grad_()
        return leaf if isinstance(output, Tensor) else (leaf, *output[1:])


def _alike(got: Tensor, kept: Tensor) -> bool:
    """Whether 7 of 8 tokens have the same numbers but for rounding: products may take another road when a gradient is
    wanted, and then a near tie in a router may go the other way."""
    difference = (got.float() - kept.float()).abs().amax(-1)
    near = difference <= 64 * torch.finfo(kept.dtype).eps * kept.float().abs().max()
    return int(near.sum()) * 8 >= near.numel() * 7

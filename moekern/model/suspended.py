"""Run many micro-batches through a model one decoder layer at a time, with the model's own forward pass.

Every micro-batch is a greenlet that runs the whole forward pass and parks in a pre-hook of each decoder layer. When all
of them are parked at layer i, its weights are loaded, each is resumed in turn until it parks at layer i + 1, and the
weights are dropped. No mask, RoPE table or state between layers is ever rebuilt by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Generic, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from moekern.model.finite import NotFinite, all_finite

Task = TypeVar("Task")
BEFORE = -1  # the stretch up to the first layer's door
DONE = -2
HALFWAY = -3  # a layer that runs twice has run once
HIDDEN = "hidden_states"


class _Stopped(Exception):
    """Leaves a forward pass after the last layer that is wanted."""


class Pass(Generic[Task]):
    """What one pass over the layers does with its tasks. A pass overrides what it needs; the rest does nothing."""

    twice: Collection[int] = ()  # layers that run once, then again from the same inputs; the second run goes on
    stop_after: int | None = None  # the last layer that is wanted: nothing behind it is run

    def forward(self, task: Task) -> None:
        """One task's whole forward pass."""
        raise NotImplementedError

    def entering(self, task: Task, layer: int) -> AbstractContextManager[Any]:
        """Around every stretch of a task's computation: from a layer's door to the next one (-1: up to the first)."""
        return nullcontext()

    def loaded(self, layer: int) -> None:
        """A layer's weights are in memory, and no task has entered it: it may be changed."""

    def between(self, layer: int) -> None:
        """All tasks have run through a layer of `twice` for the first time: it may be changed."""

    def done(self, layer: int) -> None:
        """All tasks have left a layer, whose weights are still there."""

    def group(self, task: Task) -> int:
        """Before the last layer, tasks run in this order; through it and what follows, as they were given."""
        return 0

    # For the refusal of hidden states that are not finite: what is said of the layer behind which they are not.

    def name(self, task: Task) -> str:
        """What the task computes, in words."""
        return ""

    def held(self, layer: int) -> Sequence[int] | None:
        """The original numbers of the experts that a layer has now; None where all are there."""
        return None

    def overflowing(self, layer: int) -> Sequence[int]:
        """The experts (as `held` numbers them) whose outputs are not finite though their inputs are, where seen."""
        return ()


def run_suspended(
    layers: Sequence[nn.Module],
    tasks: Sequence[Task],
    run: Pass[Task],
    *,
    load: Callable[[int], None],
    unload: Callable[[int], None],
    device: torch.device | None = None,
) -> None:
    """Take every task through `run.forward`, all of them in step, layer by layer.

    `load(i)` fills layer i before the first task enters it, `unload(i)` drops it after the last one left. Tasks' hidden
    states wait on the CPU when `device` is another one. Raises NotFinite, with the weights of the layer still there,
    for hidden states that hold NaN or infinities.
    """
    last = len(layers) - 1 if run.stop_after is None else run.stop_after
    waiting: list[tuple[Task, greenlet]] = []
    try:
        with _Doors(layers, run.twice, run.stop_after, device), torch.no_grad():
            for task in tasks:
                lane = greenlet(_body(run.forward))
                waiting.append((task, lane))
                _check_step(_resume(lane, run, task, BEFORE, task), 0, task)
            grouped = sorted(waiting, key=lambda each: run.group(each[0]))
            for i in range(last + 1):
                load(i)
                run.loaded(i)
                if i in run.twice:
                    for task, lane in waiting:
                        _check_step(_resume(lane, run, task, i), HALFWAY, task)
                    run.between(i)
                for task, lane in waiting if i == last else grouped:
                    _check_step(_resume(lane, run, task, i), DONE if i == last else i + 1, task)
                run.done(i)
                unload(i)
    finally:
        for _, lane in waiting:
            if not lane.dead:
                lane.throw(GreenletExit)


def _body(forward: Callable[[Task], None]) -> Callable[[Task], int]:
    def body(task: Task) -> int:
        with suppress(_Stopped):
            forward(task)
        return DONE

    return body


def _resume(lane: greenlet, run: Pass[Task], task: Task, layer: int, *args: Any) -> int:
    try:
        with run.entering(task, layer):
            return int(lane.switch(*args))
    except NotFinite as found:
        found.task = task
        raise


def _check_step(got: int, expected: int, task: object) -> None:
    if got != expected:
        where = "ended" if got == DONE else f"came to decoder layer {got}"
        raise RuntimeError(f"the forward pass {where} where decoder layer {expected} was expected (task {task!r})")


class _Doors:
    """Hooks on the decoder layers while suspended passes run: park before each, keep hidden states off the device."""

    def __init__(
        self, layers: Sequence[nn.Module], twice: Collection[int], stop_after: int | None, device: torch.device | None
    ) -> None:
        self.layers, self.twice, self.stop_after = layers, twice, stop_after
        self.device = None if device is None or device.type == "cpu" else device
        self.main = getcurrent()

    def __enter__(self) -> None:
        self.handles = [
            handle
            for i, layer in enumerate(self.layers)
            for handle in (
                layer.register_forward_pre_hook(self._before(i), with_kwargs=True),
                layer.register_forward_hook(self._after(i)),
            )
        ]
        for i in self.twice:
            self.layers[i].forward = self._two_runs(i, self.layers[i].forward)

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        for i in self.twice:
            del self.layers[i].forward

    def _two_runs(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The first run gets copies, since layers may change what they are given; its output is dropped."""

        def run(*args: Any, **kwargs: Any) -> Any:
            _check_finite(forward(*_copied(args, self.device), **_copied(kwargs, self.device)), i)
            self.main.switch(HALFWAY)
            if self.device is not None:
                args, kwargs = _all_moved(args, kwargs, self.device)
            return forward(*args, **kwargs)

        return run

    def _before(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if i == 0:
                _check_finite(kwargs.get(HIDDEN, args[0] if args else None), BEFORE)
            self.main.switch(i)
            if self.device is None or i in self.twice:
                return None
            return _all_moved(args, kwargs, self.device)

        return hook

    def _after(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            _check_finite(output, i)
            if i == self.stop_after:
                raise _Stopped
            if self.device is None or i + 1 == len(self.layers):
                return None
            cpu = torch.device("cpu")
            return tuple(_moved(o, cpu) for o in output) if isinstance(output, tuple) else _moved(output, cpu)

        return hook


def _check_finite(output: Any, layer: int) -> None:
    if not all_finite(hidden_of(output)):
        raise NotFinite(layer)


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a decoder layer returns."""
    return output if isinstance(output, Tensor) else output[0]  # type: ignore[no-any-return]


def _copied(value: Any, device: torch.device | None) -> Any:
    """A copy of the tensors in nested tuples, lists and dicts, on `device` (None: where they are)."""
    if isinstance(value, Tensor):
        return value.to(device or value.device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copied(item, device) for item in value)
    return value


def _all_moved(
    args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(_moved(a, device) for a in args), {key: _moved(value, device) for key, value in kwargs.items()}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value

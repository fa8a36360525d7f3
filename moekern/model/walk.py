"""Take many micro-batches through a model one decoder layer at a time, with the model's own forward pass.

When all tasks stand at the door of layer i, its weights are loaded, each task in turn goes on to the door of layer
i + 1, and the weights are dropped. There are two ways of taking a task from door to door: `stepwise`, which keeps its
hidden states and nothing else, and `suspended`, which parks the whole forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from moekern.model.finite import NotFinite, all_finite
from moekern.model.states import State

Task = TypeVar("Task")
BEFORE = -1  # in front of the first layer's door
HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Round(Generic[Task]):
    """Tasks that run through a layer, one after another. Where they do not go `on`, what the layer makes of them is
    dropped, and they stay at its door; `more`: another round follows."""

    takes: Callable[[Task], bool] = lambda task: True
    on: bool = True
    more: bool = False


class Pass(Generic[Task]):
    """What one pass over the layers does with its tasks. A pass overrides what it needs; the rest does nothing."""

    stop_after: int | None = None  # the last layer that is wanted: nothing behind it is run

    def started(self) -> None:
        """The pass begins, or begins again from the first layer: nothing has been seen yet."""

    def kept(self) -> Any:
        """What a run that goes on behind the layer that is done must know of this pass, as JSON."""

    def restored(self, layer: int, kept: Any) -> None:
        """In the place of `started`: the pass goes on with a layer, and this is what it had `kept` in front of it."""
        self.started()

    def label(self, number: int, task: Task) -> int:
        """What a task is called among all, whichever process computes it; `number` is its place in this one."""
        return number

    def forward(self, task: Task) -> None:
        """One task's whole forward pass: begun anew for every layer or not, always the same."""
        raise NotImplementedError

    def entering(self, task: Task, layer: int) -> AbstractContextManager[Any]:
        """Around every stretch of a task's computation: from a layer's door to the next one (-1: up to the first)."""
        return nullcontext()

    def given(self, task: Task, layer: int, state: State) -> None:
        """With what a task enters a layer, before it runs. Said stepwise, not when suspended."""

    def loaded(self, layer: int) -> None:
        """A layer's weights are in memory, and no task has entered it: it may be changed."""

    def rounds(self, layer: int) -> Generator[Round[Task]]:
        """In which tasks go through a layer, each of them on in one at most. A layer may be changed between rounds."""
        yield Round()

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


class Way(Protocol[Task]):
    """How tasks are taken from door to door. Used as a context manager, with one task at a time."""

    def __enter__(self) -> Way[Task]: ...

    def __exit__(self, *error: object) -> None: ...

    def begin(self, number: int, task: Task) -> None:
        """Before the first layer is loaded."""

    def before(self, layer: int, tasks: Sequence[tuple[int, Task]], *, last: bool) -> None:
        """All these tasks are about to run a layer that is loaded, in this order; `last`: not to run it again."""

    def through(self, layer: int, number: int, task: Task) -> None:
        """Take a task through a layer, to the door of the next one or to the end."""

    def once(self, layer: int, number: int, task: Task) -> None:
        """Run a layer: what comes of it is dropped, and the task stays at its door."""


def walk(
    layers: Sequence[nn.Module],
    tasks: Sequence[Task],
    run: Pass[Task],
    way: Way[Task],
    *,
    load: Callable[[int], None],
    unload: Callable[[int], None],
    first: int = 0,
    start: Callable[[], None] | None = None,
    save: Callable[[int], None] = lambda i: None,
    met: Callable[[], None] = lambda: None,
) -> None:
    """Take every task through `run.forward`, all of them in step, layer by layer.

    `load(i)` fills layer i before the first task enters it, `unload(i)` drops it after the last one left, and then
    `save(i)` may write down how far the pass is. With `first` it goes on with that layer, for which the way has the
    states of all tasks, and `start` stands for `run.started`. `met()` is called when this process's tasks have left a
    layer, and before anything is made of it. Raises NotFinite, with the weights of the layer still there, for hidden
    states that hold NaN or infinities.
    """
    last = len(layers) - 1 if run.stop_after is None else run.stop_after
    numbered = [(run.label(number, task), task) for number, task in enumerate(tasks)]
    grouped = sorted(numbered, key=lambda each: run.group(each[1]))
    with torch.no_grad(), way:
        (start or run.started)()
        for number, task in numbered:
            way.begin(number, task)
        for i in range(first, last + 1):
            load(i)
            run.loaded(i)
            with closing(run.rounds(i)) as rounds:
                for each in rounds:
                    some = [(n, task) for n, task in (numbered if i == last else grouped) if each.takes(task)]
                    way.before(i, some, last=not each.more)
                    for number, task in some:
                        (way.through if each.on else way.once)(i, number, task)
                    met()
            run.done(i)
            unload(i)
            save(i)


def out_of_step(got: int | None, expected: int, task: object) -> RuntimeError:
    """The error for a forward pass that does not go through its layers one after the other; None: it ended."""
    where = "ended" if got is None else f"came to decoder layer {got}"
    return RuntimeError(f"the forward pass {where} where decoder layer {expected} was expected (task {task!r})")


def check_finite(output: Any, layer: int) -> None:
    """Raise NotFinite for what a layer has made, where it is not."""
    if not all_finite(hidden_of(output)):
        raise NotFinite(layer)


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a decoder layer returns."""
    return output if isinstance(output, Tensor) else output[0]  # type: ignore[no-any-return]


def taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among what a decoder layer is given."""
    return kwargs[HIDDEN] if HIDDEN in kwargs else args[0]  # type: ignore[no-any-return]


def moved(value: Any, device: torch.device, *, copy: bool = False) -> Any:
    """The tensors in nested tuples, lists and dicts on a device, copied there where they must not be shared."""
    if isinstance(value, Tensor):
        return value.to(device, copy=copy)
    if isinstance(value, dict):
        return {key: moved(item, device, copy=copy) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved(item, device, copy=copy) for item in value)
    return value

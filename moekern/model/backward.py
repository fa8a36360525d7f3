"""A backward pass with one decoder layer in memory: inputs kept on the way forward, layers visited in reverse.

On the way forward every layer's arguments are kept from the first layer that is wanted on. Behind the last layer
autograd is switched on with a fresh leaf, so that the model's own norm, head and loss give the gradient of its output.
Then each layer is loaded again, run with autograd from what it was given, and hands the gradient of its input to the
one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.model.finite import NotFinite, all_finite
from moekern.model.layerwise import LayerwiseModel
from moekern.model.suspended import HIDDEN, Pass, hidden_of

Task = TypeVar("Task")


@dataclass
class Store:
    """Tensors by name, in memory or, with a folder, in one file each."""

    folder: Path | None = None
    held: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, value: Tensor) -> None:
        value = value.detach().to("cpu", copy=True)
        if self.folder is None:
            self.held[name] = value
        else:
            torch.save(value, self.folder / name)

    def pop(self, name: str) -> Tensor:
        if self.folder is None:
            return self.held.pop(name)
        value: Tensor = torch.load(self.folder / name)
        (self.folder / name).unlink()
        return value


@dataclass(frozen=True)
class Backward:
    """What the way forward kept, from decoder layer `first` on."""

    layerwise: LayerwiseModel
    first: int
    store: Store
    calls: dict[tuple[int, int], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def forward(self, tasks: Sequence[Task], loss: Callable[[Task], Tensor], progress: Callable[[int], None]) -> None:
        """Keep the layers' inputs, and the gradient of `loss(task)`, a forward pass, by the last layer's output."""
        run = _Forward(self, loss, progress)
        with run.hooked():
            self.layerwise.run(list(enumerate(tasks)), run)

    def layers(self) -> Iterator[int]:
        """Decoder layers from the last one to the first that is wanted, each with its weights in memory."""
        return self.layerwise.visit(range(len(self.layerwise.layers) - 1, self.first - 1, -1))

    def through(self, i: int, task: int, wanted: Callable[[], Sequence[Tensor]]) -> list[Tensor | None]:
        """One task's way back through layer i: gradients of `wanted()`, asked for when the layer has run.

        Raises InputError where the layer does not hand on what the layer behind it was given.
        """
        device = self.layerwise.device
        args, kwargs = self.calls.pop((i, task))
        hidden = self.store.pop(f"input-{i}-{task}").to(device).requires_grad_()
        upstream = self.store.pop(f"gradient-{task}").to(device)
        with torch.enable_grad():
            args, kwargs = _moved(args, device), _moved(kwargs, device)
            out = hidden_of(self.layerwise.layers[i](*_given(args, hidden), **_given(kwargs, hidden)))
            asked = [hidden, *wanted()]
            found = torch.autograd.grad(out, asked, upstream.to(out.dtype).view_as(out), allow_unused=True)
        if i + 1 < len(self.layerwise.layers):
            after = self.store.pop(f"next-{task}")
            if after.shape != out.shape or not _alike(out.detach().to("cpu"), after):
                raise self.refusal(i + 1)
        if i > self.first:
            assert found[0] is not None
            self.store.put(f"next-{task}", hidden)
            self.store.put(f"gradient-{task}", found[0])
        return list(found[1:])

    def refusal(self, i: int) -> InputError:
        """The error for a family in which layers depend on each other by more than the hidden states."""
        layer, name = type(self.layerwise.layers[i]).__name__, self.layerwise.layout.family.name
        return InputError(
            f"--tier gradient: {name}: decoder layer {i} ({layer}) is given more of the layers before it than hidden "
            "states, so gradients cannot be handed back layer by layer"
        )


class _Forward(Pass[tuple[int, Task]]):
    """The way forward: what every layer from the first that is wanted on is given, and the loss' first gradient."""

    def __init__(self, back: Backward, loss: Callable[[Task], Tensor], progress: Callable[[int], None]) -> None:
        self.back, self.loss, self.progress = back, loss, progress
        self.running = 0
        self.leaves: dict[int, Tensor] = {}
        self.seen: dict[int, Given] = {}

    def forward(self, task: tuple[int, Task]) -> None:
        number, batch = task
        try:
            total = self.loss(batch)
            if not all_finite(total):
                raise NotFinite(len(self.back.layerwise.layers))
            (gradient,) = torch.autograd.grad(total, self.leaves.pop(number))
        finally:
            torch.set_grad_enabled(False)
        self.back.store.put(f"gradient-{number}", gradient)

    @contextmanager
    def entering(self, task: tuple[int, Task], layer: int) -> Iterator[None]:
        self.running = task[0]
        yield

    def done(self, layer: int) -> None:
        self.progress(layer)

    def name(self, task: tuple[int, Task]) -> str:
        return f"the loss of {task[1]}"

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the layers that are wanted, and behind the last one."""
        layers = self.back.layerwise.layers
        with ExitStack() as stack:
            for i in range(self.back.first, len(layers)):
                stack.callback(layers[i].register_forward_pre_hook(self._keep(i), with_kwargs=True).remove)
                stack.callback(layers[i].register_forward_hook(self._returned).remove)
            stack.callback(layers[-1].register_forward_hook(self._lead).remove)
            yield

    def _keep(self, i: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, args, kwargs = _taken(args, kwargs)
            if self.seen.setdefault(self.running, Given(hidden, args, kwargs)).more_than_hidden(args, kwargs):
                raise self.back.refusal(i)
            self.back.calls[i, self.running] = args, kwargs
            self.back.store.put(f"input-{i}-{self.running}", hidden)

        return hook

    def _returned(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self.seen[self.running].returned += floats(output[1:]) if isinstance(output, tuple) else []

    def _lead(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        torch.set_grad_enabled(True)
        leaf = hidden_of(output).detach().requires_grad_()
        self.leaves[self.running] = leaf
        return leaf if isinstance(output, Tensor) else (leaf, *output[1:])


def _alike(got: Tensor, kept: Tensor) -> bool:
    """Whether 7 of 8 tokens have the same numbers but for rounding: products may take another road when a gradient is
    wanted, and then a near tie in a router may go the other way."""
    difference = (got.float() - kept.float()).abs().amax(-1)
    near = difference <= 64 * torch.finfo(kept.dtype).eps * kept.float().abs().max()
    return int(near.sum()) * 8 >= near.numel() * 7


class Given:
    """What the first layer of a task was given beside hidden states, and what layers have returned beside them."""

    def __init__(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.shape = hidden.shape
        self.streams = self._streams(args, kwargs)
        self.shared = self._shared(args, kwargs)
        self.returned: list[Tensor] = []  # kept alive, so that no other tensor gets their ids

    def more_than_hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a later layer's arguments hold what layers have made: returned, another stream as wide as the hidden
        states, or tensors that were put into a shared dictionary on the way."""
        given = {id(value) for value in floats((args, kwargs))}
        return (
            bool(given & {id(value) for value in self.returned})
            or _differ(self.streams, self._streams(args, kwargs))
            or _differ(self.shared, self._shared(args, kwargs))
        )

    def _streams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        B, S, H = self.shape[0], self.shape[1], self.shape[-1]
        return [v for v in floats((args, kwargs)) if v.ndim > 2 and v.shape[:2] == (B, S) and v.shape[-1] == H]

    def _shared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        return [v for value in (*args, *kwargs.values()) if isinstance(value, Mapping) for v in floats(value)]


def _differ(before: list[Tensor], now: list[Tensor]) -> bool:
    return [id(value) for value in before] != [id(value) for value in now]


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [found for each in value for found in floats(each)] if isinstance(value, (tuple, list)) else []


class _Place:
    """Where the hidden states were among a layer's arguments."""


PLACE = _Place()


def _taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if HIDDEN in kwargs:
        return kwargs[HIDDEN], args, {**kwargs, HIDDEN: PLACE}
    return args[0], (PLACE, *args[1:]), kwargs


def _given(values: Any, hidden: Tensor) -> Any:
    if isinstance(values, dict):
        return {name: hidden if value is PLACE else value for name, value in values.items()}
    return tuple(hidden if value is PLACE else value for value in values)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(each, device) for name, each in value.items()}
    return tuple(_moved(each, device) for each in value) if type(value) is tuple else value

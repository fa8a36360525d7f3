"""From door to door with nothing kept but what layers are given: for each layer the forward pass begins anew.

The model's own forward pass is called for every layer and task. Layers before the one that is wanted are passed over:
what they return is NaN. At the door of layer i the task's own hidden states take the place of what is handed in; at the
door of layer i + 1 they are kept, and the pass is left. What stands before the layers (embeddings, masks, RoPE tables)
is computed each time, and is cheap beside a layer. What else a layer returns and the next one is given (the tokens that
an indexer has chosen) is kept beside the hidden states.

This is the same computation only where nothing else passes from layer to layer. NaN shows whether it does: where one
appears that no layer has made, or where a layer puts something into what is shared, layers are `Tangled`, and the pass
must be suspended instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moekern.errors import InputError, is_out_of_memory
from moekern.model.apart import Asked, Filled, RowsApart
from moekern.model.finite import NotFinite, all_finite
from moekern.model.states import Path, State, States
from moekern.model.walk import BEFORE, HIDDEN, Pass, check_finite, hidden_of, out_of_step, taken

Beside = list[tuple[torch.dtype, int] | None] | None


class Tangled(Exception):
    """A decoder layer is given more of the layers before it than hidden states."""

    def __init__(self, layer: int, told: bool = False) -> None:
        super().__init__(f"decoder layer {layer} is given more of the layers before it than hidden states")
        self.layer, self.told = layer, told  # by another process


class _Door(BaseException):
    """Leaves a forward pass; no Exception, so that no model's own code takes it for one."""


class Stepwise:
    """One forward pass for each task and layer. `states` keeps what tasks hand on between layers."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        run: Pass[Any],
        states: States,
        device: torch.device | None = None,
        returns: dict[int, Beside] | None = None,
        apart: Callable[[int, bool], tuple[RowsApart, Filled] | None] = lambda layer, last: None,
    ) -> None:
        self.layers, self.run, self.states = layers, run, states
        self.device = torch.device("cpu") if device is None else device
        self.passed = 0  # layers that are passed over
        self.at = BEFORE  # the layer that runs
        self.next = 0  # the door that the pass must come to
        self.returns = {} if returns is None else returns  # of the layers that have run
        self.checked: set[int] = set()  # layers of which it is known that they are given no more than is kept
        self.task: Any = None
        self.state: State | None = None  # that the layer is given; None: what the pass itself brings to the first
        self.first: set[int] = set()  # tensors beside hidden states that the first layer is given, by identity
        self.handed: list[Tensor] = []  # what it was given and has returned beside hidden states
        self.shared: Any = None  # what else it was given, by identity, where it is not checked yet
        self.leave = False  # behind the layer
        self.grad = False  # autograd is wanted in the layer
        self.output: Any = None
        self.make_apart = apart  # of a layer that is too large: its experts' rows, and what fills its experts
        self.apart: RowsApart | None = None  # of the layer that runs
        self.number = 0  # of the task
        self.installed = ExitStack()  # in the layer, while it runs

    def __enter__(self) -> Stepwise:
        self.handles = []
        for i, layer in enumerate(self.layers):
            self.handles.append(layer.register_forward_pre_hook(self._before(i), with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self._after(i), with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        self._pass_over(0)
        self._forget()

    def begin(self, number: int, task: Any) -> None:
        """Nothing is computed: the first layer's pass brings its own hidden states."""

    def before(self, layer: int, tasks: Sequence[tuple[int, Any]], *, last: bool) -> None:
        """Where the layer is too large, its experts' rows are computed first, a group of experts at a time."""
        self._forget()
        made = self.make_apart(layer, last)
        if made is None:
            return
        self.apart, filled = made
        for number, task in tasks:
            self.once(layer, number, task)
        self.apart.compute(filled)

    def _forget(self) -> None:
        """The rows of a layer that has run."""
        if self.apart is not None:
            self.apart.kept.clear()
            self.apart = None

    def through(self, layer: int, number: int, task: Any) -> None:
        state = None if layer == 0 else self.states.take(number)
        self.number = number
        found = self._pass(layer, task, state, leave=layer == self.run.stop_after)
        if isinstance(found, State):
            self.states.put(number, found)

    def once(self, layer: int, number: int, task: Any) -> None:
        state = None if layer == 0 else self.states.copy(number, self.device)  # layers may change what they are given
        self.number = number
        self._pass(layer, task, state, leave=True)

    def only(self, layer: int, task: Any, state: State, number: int = 0, apart: RowsApart | None = None) -> Any:
        """What one layer makes of hidden states on its device, with autograd through it; None where the task, which is
        known by its `number` there, has only asked for its experts' rows."""
        self.number, self.apart = number, apart
        with torch.no_grad():  # outside of the layer
            return self._pass(layer, task, state, leave=True, grad=True)

    def _pass(self, layer: int, task: Any, state: State | None, *, leave: bool, grad: bool = False) -> Any:
        """The State with which the next layer is entered, or, where the pass was to `leave`, the layer's output."""
        self.at, self.next, self.task, self.state, self.leave, self.grad = layer, 0, task, state, leave, grad
        self._pass_over(layer)
        try:
            with self.run.entering(task, layer):  # which goes on to its end when the pass is left
                try:
                    self.run.forward(task)
                except (_Door, Asked):
                    return self.output
        except NotFinite as found:
            found.task = task
            suspected = self._suspected(found) if found.layer >= len(self.layers) else found
            if suspected is found:
                raise
            raise suspected from found
        except InputError as error:  # a model's own code may miss what layers before it would have made
            raise self._suspected(error) if error.__cause__ is not None else error from error.__cause__
        finally:
            self.installed.close()
            self.state = self.output = None
            self.handed = []
        if self.next < len(self.layers):
            raise out_of_step(None, self.next, task)
        return None

    def _suspected(self, error: Exception) -> Exception:
        """The error itself where no layer has been passed over, or memory is the matter; else Tangled."""
        if self.at == 0 or self.next <= self.at or (error.__cause__ is not None and is_out_of_memory(error.__cause__)):
            return error
        return Tangled(self.at)

    def _before(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if i != self.next:
                raise out_of_step(i, self.next, self.task)
            self.next += 1
            if i == 0:
                self.first = {id(value) for _, value in _tensors(_others(args, kwargs))}
            if i < self.at:
                return None
            if i > self.at:
                self._arrive(i, args, kwargs)
            if i == 0:
                check_finite(taken(args, kwargs), BEFORE)
            given = State(taken(args, kwargs), {}) if self.state is None else self.state.moved(self.device)
            self.run.given(self.task, i, given)
            self.handed = list(given.beside.values())
            args, kwargs = _put(args, kwargs, given)
            if i not in self.checked:
                _check_given(i, args, kwargs)
                self.shared = _contents(_others(args, kwargs))
            if self.apart is not None:
                self.installed.enter_context(self.apart.installed(module, self.number, self.run.held(i)))
            torch.set_grad_enabled(self.grad)
            return args, kwargs

        return hook

    def _arrive(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The door of the layer behind the one that ran."""
        hidden = taken(args, kwargs)
        if hidden is not hidden_of(self.output) and not all_finite(hidden):
            raise Tangled(i)  # the layer's own output was looked at
        own = {id(value) for value in self.handed}
        others = dict(_tensors(_others(args, kwargs)))
        beside = {path: value for path, value in others.items() if id(value) in own}
        if i not in self.checked and any(
            each and not each[0].is_floating_point for each in self.returns[self.at] or ()
        ):
            known = own | self.first  # NaN shows what is made of numbers that layers return, but nothing of integers
            if any(id(value) not in known and not value.is_floating_point() for value in others.values()):
                raise Tangled(i)
        self.output = State(hidden, beside)
        raise _Door

    def _after(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if i < self.at:
                return
            check_finite(output, i)
            if i not in self.checked:
                if _contents(_others(args, kwargs)) != self.shared:
                    raise Tangled(i)
                self.returns[i] = _beside(i, output)
                self.checked.add(i)
            self.shared, self.output = None, output
            self.handed += [value for _, value in _tensors(output[1:])] if isinstance(output, tuple) else []
            if self.leave:
                torch.set_grad_enabled(False)
                raise _Door

        return hook

    def _pass_over(self, layers: int) -> None:
        """The first `layers` layers return NaN, the others what they compute."""
        for i in range(self.passed, layers):
            self.layers[i].forward = self._nothing(i)
        for i in range(layers, self.passed):
            del self.layers[i].forward
        self.passed = layers

    def _nothing(self, i: int) -> Callable[..., Any]:
        """What stands for the forward pass of a layer that is passed over."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = taken(args, kwargs)
            nothing = hidden.new_full((), torch.nan).expand(hidden.shape)
            beside = self.returns.get(i)
            return nothing if beside is None else (nothing, *(_blank(each, self.device) for each in beside))

        return forward


def _others(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, Any]:
    """What a decoder layer is given beside hidden states: by name, or by its place among the arguments."""
    return {key: value for key, value in (*enumerate(args), *kwargs.items()) if key not in (0, HIDDEN)}


def _put(args: tuple[Any, ...], kwargs: dict[str, Any], state: State) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with a state in its places."""
    values: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    values[HIDDEN if HIDDEN in kwargs else 0] = state.hidden
    for path, value in state.beside.items():
        values[path[0]] = _with(values[path[0]], path[1:], value)
    return tuple(values[i] for i in range(len(args))), {name: values[name] for name in kwargs}


def _with(whole: Any, path: Path, value: Tensor) -> Any:
    if not path:
        return value
    if isinstance(whole, Mapping):
        return {**whole, path[0]: _with(whole[path[0]], path[1:], value)}
    return type(whole)(_with(each, path[1:], value) if i == path[0] else each for i, each in enumerate(whole))


def _check_given(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise Tangled where, beside its state, a layer is given what a layer that was passed over has returned."""
    for _, value in _tensors(_others(args, kwargs)):
        if getattr(value, "_moekern_blank", False) or (value.is_floating_point() and bool(value.isnan().any())):
            raise Tangled(layer)


def _beside(layer: int, output: Any) -> Beside:
    """Dtype and number of axes of each tensor that a layer returns beside hidden states; None: it returns no tuple."""
    if isinstance(output, Tensor):
        return None
    if not isinstance(output, tuple) or any(not (each is None or isinstance(each, Tensor)) for each in output):
        raise Tangled(layer + 1)
    return [None if each is None else (each.dtype, each.ndim) for each in output[1:]]


def _blank(beside: tuple[torch.dtype, int] | None, device: torch.device) -> Tensor | None:
    if beside is None:
        return None
    dtype, ndim = beside
    blank = torch.full((1,) * ndim, torch.nan if dtype.is_floating_point else 0, device=device).to(dtype)
    blank._moekern_blank = True  # type: ignore[attr-defined]
    return blank


def _tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in nested tuples, lists and mappings, each with its place."""
    if isinstance(value, Tensor):
        yield path, value
        return
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (tuple, list)) else ()
    )
    for key, each in items:
        yield from _tensors(each, (*path, key))


def _contents(value: Any) -> Any:
    """Which objects stand in nested tuples, lists, mappings and plain objects: changed when something is put in."""
    if isinstance(value, Mapping):
        return [(key, _contents(each)) for key, each in value.items()]
    if isinstance(value, (tuple, list)):
        return [_contents(each) for each in value]
    if hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, type)):
        return id(value), [(key, id(each)) for key, each in vars(value).items()]
    return id(value)

"""From door to door in forward passes that are parked, for models whose layers hand on more than hidden states.

Every task is a greenlet that runs its whole forward pass and parks in a pre-hook of each decoder layer. No mask, RoPE
table or state between layers is ever rebuilt, and all that the passes hold stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from moekern.model.finite import NotFinite
from moekern.model.walk import BEFORE, Pass, check_finite, moved, out_of_step, taken

DONE = -2
HALFWAY = -3  # a layer has run, and will run again


class _Stopped(Exception):
    """Leaves a forward pass after the last layer that is wanted."""


class Suspended:
    """One greenlet for each task. Hidden states wait on the CPU when `device` is another one."""

    def __init__(self, layers: Sequence[nn.Module], run: Pass[Any], device: torch.device | None = None) -> None:
        self.layers, self.run = layers, run
        self.device = None if device is None or device.type == "cpu" else device
        self.main = getcurrent()
        self.lanes: dict[int, greenlet] = {}
        self.on = True  # behind the layer that runs

    def __enter__(self) -> Suspended:
        self.handles = [
            handle
            for i, layer in enumerate(self.layers)
            for handle in (
                layer.register_forward_pre_hook(self._before(i), with_kwargs=True),
                layer.register_forward_hook(self._after(i)),
            )
        ]
        for i, layer in enumerate(self.layers):
            layer.forward = self._runs(i, layer.forward)
        return self

    def __exit__(self, *error: object) -> None:
        for lane in self.lanes.values():
            if not lane.dead:
                lane.throw(GreenletExit)
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            del layer.forward

    def begin(self, number: int, task: Any) -> None:
        self.lanes[number] = greenlet(_body(self.run.forward))
        self._resume(number, BEFORE, task, 0, task)

    def before(self, layer: int, tasks: Sequence[tuple[int, Any]], *, last: bool) -> None:
        """Nothing: a pass goes through a layer whole."""

    def through(self, layer: int, number: int, task: Any) -> None:
        self.on = True
        last = layer == len(self.layers) - 1 or layer == self.run.stop_after
        self._resume(number, layer, task, DONE if last else layer + 1)

    def once(self, layer: int, number: int, task: Any) -> None:
        self.on = False
        self._resume(number, layer, task, HALFWAY)

    def _resume(self, number: int, layer: int, task: Any, expected: int, *args: Any) -> None:
        try:
            with self.run.entering(task, layer):
                got = int(self.lanes[number].switch(*args))
        except NotFinite as found:
            found.task = task
            raise
        if got != expected:
            raise out_of_step(None if got == DONE else got, expected if expected >= 0 else len(self.layers), task)

    def _runs(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """All runs but the last get copies, since layers may change what they are given; their output is dropped."""

        def run(*args: Any, **kwargs: Any) -> Any:
            place = self.device or torch.device("cpu")
            while not self.on:
                check_finite(forward(*moved(args, place, copy=True), **moved(kwargs, place, copy=True)), i)
                self.main.switch(HALFWAY)
            if self.device is not None:
                args, kwargs = moved(args, self.device), moved(kwargs, self.device)
            return forward(*args, **kwargs)

        return run

    def _before(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if i == 0:
                check_finite(taken(args, kwargs), BEFORE)
            self.main.switch(i)

        return hook

    def _after(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            check_finite(output, i)
            if i == self.run.stop_after:
                raise _Stopped
            if self.device is None or i + 1 == len(self.layers):
                return None
            return moved(output, torch.device("cpu"))

        return hook


def _body(forward: Callable[[Any], None]) -> Callable[[Any], int]:
    def body(task: Any) -> int:
        with suppress(_Stopped):
            forward(task)
        return DONE

    return body

"""A pass made of functions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from moekern.model.walk import Pass


class Given(Pass[Any]):
    """What is given instead of a class of its own."""

    def __init__(
        self,
        forward: Callable[[Any], Any],
        entering: Callable[[Any, int], AbstractContextManager[Any]] = lambda task, layer: nullcontext(),
        stop_after: int | None = None,
    ) -> None:
        self._forward, self._entering, self.stop_after = forward, entering, stop_after

    def forward(self, task: Any) -> None:
        self._forward(task)

    def entering(self, task: Any, layer: int) -> AbstractContextManager[Any]:
        return self._entering(task, layer)

"""Layers, and groups of experts, made of what is read, one after another; where there is room, the next one is made
while the one before computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from moekern.errors import memory_for
from moekern.model.expert_groups import ExpertGroups, Maker
from moekern.model.memory import drop, return_freed_memory, weights_apart
from moekern.model.reader import LayerReader
from moekern.model.spent import Spent
from moekern.team import Team

T = TypeVar("T")


class Result(Protocol[T]):  # type: ignore[misc]
    """What will be there, or the error in its place."""

    def result(self) -> T: ...


class WhenAsked(Generic[T]):
    """What a call gives, once it is asked for."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.call, self.given = call, list[T]()

    def result(self) -> T:
        if not self.given:
            self.given.append(self.call())
        return self.given[0]


def worth_it(device: torch.device, team: Team) -> bool:
    """Whether a thread that makes layers has something to make them with: a GPU's own copies, or cores of the CPU that
    compute nothing."""
    return device.type == "cuda" or (device.type == "cpu" and spare_cores(team) > 0)


def spare_cores(team: Team) -> int:
    """Cores that this process has beside those that compute; the ranks of a node share what there is."""
    return len(os.sched_getaffinity(0)) // team.local_size - torch.get_num_threads()


class Filler:
    """`begin(number)` starts towards what the reader knows by this number, `take()` waits for it.

    Reading begins at once and in the background. With `ahead` making does too, as soon as all is read: in a thread of
    its own, on a GPU on a stream of its own, which that thread waits for; else `take` makes it. Only twins of layers
    are filled, so that nothing changes that computes, and an error is raised by `take`. Ranks of a node must call the
    same methods in the same order.
    """

    def __init__(self, reader: LayerReader, groups: ExpertGroups, spent: Spent, ahead: bool) -> None:
        self.reader, self.groups, self.spent = reader, groups, spent
        self.device, team = reader.device, reader.team
        self.number: int | None = None  # of what is under way
        self._read: Result[Any] | None = None
        self._made: Result[nn.Module] | None = None
        self._stream = torch.cuda.Stream(self.device) if ahead and self.device.type == "cuda" else None
        threads = max(1, spare_cores(team)) if self.device.type == "cpu" else torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, "moekern-fill", torch.set_num_threads, (threads,)) if ahead else None

    def __enter__(self) -> Filler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        if self._pool is not None:
            self._pool.shutdown()

    def begin(self, number: int) -> None:
        """Start towards this; what else is under way is forgotten."""
        if self.number == number:
            return
        self.cancel()
        make = self.groups.maker(number)
        self.reader.start(number)
        self.number = number
        self._read = self._later(self.reader.take)
        gone = None if self._stream is None else torch.cuda.current_stream(self.device).record_event()
        self._made = self._later(partial(self._make, make, self.groups.named(number), self._read, gone))

    def take(self, number: int) -> nn.Module:
        """A twin of the layer, filled, or a layer with a group of experts; the buffer is free then. Errors as
        `LayerReader.take`, `Loader.load` and for memory that is not there."""
        self.begin(number)
        assert self._read is not None
        assert self._made is not None
        with self.spent.waiting():
            self._read.result()
        with self.spent.filling():
            made = self._made.result()
        self.number = self._read = self._made = None
        if self._stream is not None:  # where memory is freed while kernels still use it, the next copy must not take it
            for tensor in (*made.parameters(), *made.buffers()):
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(self.device))
        return made

    def filled(self, i: int, wanted: Sequence[int], then: int | None) -> Iterator[tuple[int, nn.Module]]:
        """These groups of a layer that is cut, by number, each with a layer that holds it; the next is begun meanwhile,
        and behind the last what the reader knows as `then`."""
        order = [self.groups.numbers[i, g] for g in wanted]
        for g, number, after in zip(wanted, order, (*order[1:], then)[: len(order)], strict=True):
            small = self.take(number)
            self.groups.complete(i, small)
            if after is not None:
                self.begin(after)
            yield g, small
            drop(small)
            return_freed_memory()

    def cancel(self) -> None:
        """Forget what is under way. Ranks of a node end it, since each waits for the others to have read."""
        if self._pool is not None and self._made is not None:
            if self.reader.team.local_size == 1:
                self.reader.give_up()
            self._pool.submit(int).result()  # behind what is under way
        self.reader.cancel()
        self.number = self._read = self._made = None

    def _later(self, call: Callable[[], T]) -> Result[T]:
        return WhenAsked(call) if self._pool is None else self._pool.submit(call)

    def _make(self, make: Maker, what: str, read: Result[Any], gone: torch.cuda.Event | None) -> nn.Module:
        """`gone`: when kernels are through that compute with layers that were dropped."""
        with torch.no_grad(), memory_for(what, "give more (--memory, --gpu-memory)"), self._apart(gone):
            made = make(read.result())
            self.reader.release(made)
        return made

    @contextmanager
    def _apart(self, gone: torch.cuda.Event | None) -> Iterator[None]:
        """What is allocated inside leaves no holes behind. Of a thread that is certain by itself: it has a heap of its
        own, and glibc's threshold is not touched, which other threads' activations go by."""
        if self._pool is None:
            with weights_apart():
                yield
                return_freed_memory()
        elif self._stream is None:
            yield
        else:
            assert gone is not None
            gone.synchronize()
            with torch.cuda.stream(self._stream):
                yield

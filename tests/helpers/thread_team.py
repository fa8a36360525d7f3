"""Processes of a team played by threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any, TypeVar

from moekern.team import Team

T = TypeVar("T")


class Played(Team):
    """One rank; `boxes[to][sender]` hold what is under way."""

    def __init__(self, rank: int, boxes: list[list[Queue[Any]]]) -> None:
        self.rank, self.size, self.boxes = rank, len(boxes), boxes

    def broadcast(self, value: Any) -> Any:
        if self.first:
            for box in self.boxes[1:]:
                box[0].put(value)
            return value
        return self.receive(0)

    def every(self, value: Any) -> list[Any]:
        for box in self.boxes:
            box[self.rank].put(value)
        return [self.receive(rank) for rank in range(self.size)]

    def send(self, value: object) -> None:
        self.boxes[0][self.rank].put(value)

    def receive(self, rank: int) -> Any:
        return self.boxes[self.rank][rank].get(timeout=60)


def in_ranks(size: int, job: Callable[[Team], T]) -> list[T]:
    """What the job returns at each rank."""
    boxes: list[list[Queue[Any]]] = [[Queue() for _ in range(size)] for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return [done.result() for done in [pool.submit(job, Played(rank, boxes)) for rank in range(size)]]

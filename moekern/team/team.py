"""What processes of one run tell each other. Rank 0 leads: it asks for jobs, adds up and writes; the others help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Team:
    """One process that works alone; `ranks.Ranks` are several. Every rank must call the same methods in one order."""

    rank = 0
    size = 1
    local_rank = 0  # on its node
    local_size = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that adds up, writes and speaks."""
        return self.rank == 0

    @property
    def described(self) -> str:
        """For people; empty for one that is alone."""
        return ""

    def together(self, job: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """The others begin the same job, which rank 0 is about to do. They are in `serve`."""

    def serve(self) -> None:
        """Do what rank 0 asks for until it has nothing more to do."""

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value, at rank 0; elsewhere nothing."""
        return [value]

    def every(self, value: T) -> list[T]:
        """Every rank's value."""
        return [value]

    def send(self, value: object) -> None:
        """To rank 0, which is in `receive`."""
        raise RuntimeError("nobody is there to receive")

    def receive(self, rank: int) -> Any:
        """What that rank sends to rank 0."""
        raise RuntimeError("nobody is there to send")

    def meet(self) -> None:
        """Wait until every rank is here."""

    def meet_on_node(self) -> None:
        """Wait until every rank of this node is here."""

    def every_on_node(self, value: T) -> list[T]:
        """The value of every rank of this node."""
        return [value]

    def check_alike(self, facts: Mapping[str, object]) -> None:
        """Raise InputError where two ranks do not have the same facts, which would make their sums another text's."""

    @property
    def speaks(self) -> bool:
        """Whether this rank tells why the run ends."""
        return True

    def lost(self, wait: float = 0) -> str | None:
        """Why the run cannot go on where another rank has died or failed; looked for during `wait` seconds."""
        return None

    def end(self, error: str | None = None) -> None:
        """This process is about to end, for this reason or because all is done; the others learn of it."""


ALONE = Team()
_current = ALONE


def current() -> Team:
    """The team that this process has joined."""
    return _current


def join() -> Team:
    """The processes that torchrun has started; ALONE where it has not started several.

    Raises InputError where they cannot find each other.
    """
    global _current
    if _current is ALONE:
        from moekern.team.member import Member

        member = Member.of_torchrun()
        if member is not None:
            from moekern.team.ranks import joined

            _current = joined(member)
    return _current

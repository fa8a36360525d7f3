"""Which of several processes this one is, as torchrun tells it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from moekern.errors import InputError


@dataclass(frozen=True)
class Part:
    """One of `of` processes that share the work and have no connection, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}-of-{self.of}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that "2/4" names. Raises InputError."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"--part {text}: expected I/N, I from 1 to N, such as 1/4")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def of_torchrun(cls) -> Part | None:
        """The part of a process that torchrun has started, if it has started several; see `Member`."""
        member = Member.of_torchrun()
        return None if member is None else cls(member.rank + 1, member.size)


@dataclass(frozen=True, slots=True)
class Member:
    """One of `size` processes; on its node the `local_rank`-th of `local_size`."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def of_torchrun(cls) -> Member | None:
        """This process where torchrun has started several, else None. Raises InputError for a rank that cannot be.

        RANK and WORLD_SIZE alone say nothing: machines of a cluster have them in every shell.
        """
        rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "1")
        if "TORCHELASTIC_RUN_ID" not in os.environ or size == "1":
            return None
        local_rank, local_size = os.environ.get("LOCAL_RANK", rank), os.environ.get("LOCAL_WORLD_SIZE", size)
        pairs = ((rank, size), (local_rank, local_size))
        if not all(re.fullmatch("[0-9]{1,6}/[0-9]{1,6}", f"{a}/{b}") and int(a) < int(b) for a, b in pairs):
            raise InputError(
                f"RANK={rank} and WORLD_SIZE={size} are no rank of torchrun's; name the part with --part I/N"
            )
        return cls(int(rank), int(size), int(local_rank), int(local_size))

"""What text takes between layers, held against the room that memory and disk have for it."""

from __future__ import annotations

import shutil
import tempfile
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from moekern.errors import NoRoomForText
from moekern.files import sized
from moekern.team import Team


@dataclass(frozen=True)
class Need:
    """Bytes of hidden states of so many tokens, and `more` of something else that has `memory` bytes of its own (below
    0: so many are missing for what is there whatever the tokens); what memory has no room for goes to a file. `what`
    says it in words."""

    tokens: int
    nbytes: int
    what: str
    more: int = 0
    memory: int = 0

    def check(self, room: int, spill: Path | None, team: Team) -> int:
        """How many bytes go to a file in `spill` (None: the system's folder for such). Raises NoRoomForText where
        memory and disk have no room, on every rank where one has too little."""
        beyond, folder = self.beyond(room), spill or Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free // team.local_size  # which ranks of a node share, as memory
        refused = None if beyond <= free else (self.refusal(room, folder, free), self.fitting(room, free))
        told = [(each[1], rank, each[0]) for rank, each in enumerate(team.every(refused)) if each is not None]
        if not told:
            return beyond
        fitting, rank, why = min(told)
        raise NoRoomForText(why if team.size == 1 else f"rank {rank}: {why}", fitting)

    def beyond(self, room: int) -> int:
        """Bytes that go to a file where memory has `room` for hidden states."""
        return self._beyond(room, self.tokens)

    def _beyond(self, room: int, tokens: int) -> int:
        hidden, more = (each * tokens // max(1, self.tokens) for each in (self.nbytes, self.more))
        return max(0, hidden - room) + max(0, more - self.memory)

    def fitting(self, room: int, free: int) -> int:
        """How many of the tokens there is room for, with `free` bytes for files."""
        return max(0, bisect_right(range(self.tokens + 1), free, key=lambda tokens: self._beyond(room, tokens)) - 1)

    def refusal(self, room: int, folder: Path, free: int) -> str:
        """That there is no room, and what to do."""
        ways = "give more (--memory), another folder (--spill) or less text (--tokens)"
        memory = sized(max(0, room + self.memory))
        return f"{self.what}: memory has room for {memory}, and {folder} for {sized(free)}; {ways}"

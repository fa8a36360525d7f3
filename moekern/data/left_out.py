"""What could not be used of the text, and how that is told: nothing is left out in silence."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from moekern.errors import InputError

MOST_KINDS = 5  # that a line names one by one


class Unreadable(ValueError):
    """A row, or a whole file, that holds no text that can be used; the message says why."""


@dataclass
class Notes:
    """Lines for a person, each told once: by `tell`, else kept, and warned of where something was left out."""

    tell: Callable[[str], None] | None = None
    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)
            if self.tell is not None:
                self.tell(line)

    def warn(self, line: str) -> None:
        if line not in self.lines and self.tell is None:
            warnings.warn(line, stacklevel=2)
        self.say(line)


@dataclass
class HeldNotes:
    """Lines that are told when what they are of is used, if it is."""

    lines: list[tuple[bool, str]] = field(default_factory=list)  # with whether something was left out

    def say(self, line: str) -> None:
        self.lines.append((False, line))

    def warn(self, line: str) -> None:
        self.lines.append((True, line))

    def tell(self, notes: Notes) -> None:
        for left_out, line in self.lines:
            (notes.warn if left_out else notes.say)(line)


@dataclass
class LeftOut:
    """Counts of what a domain's text had that was not used. strict: the first of it is an error."""

    domain: str
    strict: bool = False
    rows: Counter[str] = field(default_factory=Counter)  # by file, all that were looked at
    bad_rows: Counter[str] = field(default_factory=Counter)
    files: int = 0  # looked at
    bad_files: dict[str, str] = field(default_factory=dict)  # with the reason
    parts: Counter[str] = field(default_factory=Counter)  # of messages, by their type
    first_row: str = ""

    def row(self, file: str, where: str, reason: Unreadable) -> None:
        if self.strict:
            raise InputError(f"{file}: {where}: {reason} (--strict)", kind="data") from reason
        self.bad_rows[file] += 1
        self.first_row = self.first_row or f"{'' if len(self.rows) == 1 else f'{file}: '}{where}: {reason}"

    def file(self, file: str, reason: Unreadable) -> None:
        if self.strict:
            raise InputError(f"{file}: {reason} (--strict)", kind="data") from reason
        self.bad_files.setdefault(file, str(reason))

    def reasons(self) -> list[str]:
        """A line for each kind of thing that was left out."""
        lines = []
        if self.bad_files:
            name, reason = next(iter(self.bad_files.items()))
            lines.append(f"{len(self.bad_files):,} of {self.files:,} files: first: {name}: {reason}")
        if self.bad_rows:
            names = list(self.rows)
            where = names[0] if len(names) == 1 else f"{len(names):,} files"
            lines.append(f"{self.bad_rows.total():,} of {self.rows.total():,} rows of {where}: first: {self.first_row}")
        if self.parts:
            lines.append(f"{self.parts.total():,} parts of messages that are no text ({counted(self.parts)})")
        return [f"left out: {line}" for line in lines]

    def document(self) -> dict[str, int]:
        """The counts, for the recipe; empty where nothing was left out."""
        counts = {"files": len(self.bad_files), "rows": self.bad_rows.total(), "parts": self.parts.total()}
        return {name: count for name, count in counts.items() if count}


def counted(kinds: Counter[str]) -> str:
    """ "image 3, audio 1", the most frequent first."""
    named = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{name} {count:,}" for name, count in named[:MOST_KINDS]]
    rest = sum(count for _, count in named[MOST_KINDS:])
    return ", ".join([*shown, f"others {rest:,}"] if rest else shown)

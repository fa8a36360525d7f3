"""Markdown of text that a checkpoint, a plan or a file brings along: it is shown, and never means anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

WIDEST = 120  # characters of a value that is shown
SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$:@-])")  # to Markdown, its tables, and formulas of the hub's pages


def _short(text: str, widest: int) -> str:
    """On one line and printable, cut to so many characters."""
    text = "".join(c if c.isprintable() else " " for c in text[: 4 * widest])
    return text if len(text) <= widest else f"{text[: widest - 3]}..."


def plain(value: Any, widest: int = WIDEST) -> str:
    """A value as text that no reader of Markdown or HTML takes for more than text."""
    text = _short(str(value), widest).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", text)


def code(value: Any, widest: int = WIDEST) -> str:
    """A value between backticks, in a table too; those that it holds become apostrophes."""
    text = value if isinstance(value, str) else json.dumps(value)
    inner = _short(text, widest).replace("`", "'").replace("|", "\\|").strip()
    return f"`{inner}`" if inner else "(empty)"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def block(text: str, language: str = "bash") -> str:
    """A block of code; its fence is longer than any row of backticks in it."""
    fence = "`" * max(3, 1 + max((len(row) for row in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}\n"

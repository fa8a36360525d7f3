"""The command `criteria`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from moekern.cli.console import show
from moekern.cli.options import Json, result


def criteria(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/criteria.md.")] = False,
    as_json: Json = False,
) -> None:
    """List the criteria that score, plan and run know."""
    from moekern.criteria.table import described

    rows = described()
    result(rows, lambda: print(markdown(rows), end="") if as_markdown else show_criteria(rows))


def show_criteria(rows: Sequence[Mapping[str, str]]) -> None:
    """Name, meaning and paper of every criterion."""
    show("criteria", tuple(rows[0]), [tuple(row.values()) for row in rows])


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(rows[0]), "|".join("---" for _ in rows[0]), *(" | ".join(row.values()) for row in rows)]
    return "".join(f"| {line.replace('|w|', 'abs w')} |\n" for line in lines)

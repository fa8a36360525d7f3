"""The command `criteria`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated

import typer

from moekern.cli.given import result
from moekern.cli.options import Json, Tiers
from moekern.errors import InputError, nearest_name

FAMILIES = {
    "activation": "what experts put out",
    "inference": "how often and with whom experts are chosen",
    "redundancy": "what others could stand in for",
    "gradient": "what the loss feels",
    "weight": "weights alone, no text",
    "baseline": "to compare with",
}
RECOMMENDED = """\
Take {default}, the default, unless you have measured better: per-token means such as reap and hope lose where rare \
experts have large outputs, sums do not. Next to it hope_all_tokens and gated_square: all three come from one \
calibration. Without text: aimer. Then compare plans by `moekern evaluate` on your own text; docs/comparison.md has \
numbers."""


def criteria(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Show those that have these words in name, family, tier, meaning or paper."),
    ] = None,
    tier: Tiers = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/criteria.md.")] = False,
    as_json: Json = False,
) -> None:
    """List the criteria that score, plan and run know, or those that are asked for."""
    from moekern.criteria.table import described

    rows = [
        row for row in described()
        if all(word.lower() in " ".join(row.values()).lower() for word in words or ())
        and (not tier or set(tier) & set(row["tier"].split(", ")))
    ]  # fmt: skip
    if not rows:
        near = nearest_name(" ".join(words or ()), [row["name"] for row in described()])
        raise InputError(f"criteria {' '.join(words or ())}: none has these words{near}; `moekern criteria` lists all")
    result(rows, lambda: print(markdown(rows), end="") if as_markdown else show_criteria(rows, not (words or tier)))


def show_criteria(rows: Sequence[Mapping[str, str]], all_of_them: bool) -> None:
    """Which to take; then by family the name, meaning, paper and, where it is not the routed one, tier."""
    from moekern.criteria.table import DEFAULT

    width = max(60, shutil.get_terminal_size((80, 24)).columns)
    if all_of_them:
        print(textwrap.fill(RECOMMENDED.format(default=DEFAULT), width))
    order = list(FAMILIES)
    ranked = sorted(rows, key=lambda row: order.index(row["family"]))
    indent = max(len(row["name"]) for row in rows) + 4
    for family, some in groupby(ranked, key=lambda row: row["family"]):
        print(f"\n{family}: {FAMILIES[family]}")
        for row in some:
            tier = "" if row["tier"] == "routed" else f"--tier {row['tier']}"
            said = "; ".join(part for part in (row["meaning"], tier, row["paper"]) if part)
            first = f"  {row['name']}".ljust(indent)
            print(textwrap.fill(said, width, initial_indent=first, subsequent_indent=" " * indent))


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(rows[0]), "|".join("---" for _ in rows[0]), *(" | ".join(row.values()) for row in rows)]
    return "".join(f"| {line.replace('|w|', 'abs w')} |\n" for line in lines)

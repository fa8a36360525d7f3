"""Rows of plain values for notebooks and spreadsheets: as CSV and as an HTML table."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from moekern import files

Row = Mapping[str, str | int | float | bool | None]

SHOWN = 64  # rows of a table in a notebook


def csv_text(rows: Sequence[Row]) -> str:
    """A header line and a line a row; None is empty, numbers have all their digits."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """The same to a file, which appears whole or not at all."""
    files.write_bytes(path, csv_text(rows).encode())


def html_table(title: str, rows: Sequence[Row]) -> str:
    """A table of the first rows under a title; everything is escaped."""
    columns = list(rows[0]) if rows else []
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(row[name]))}</td>" for name in columns) + "</tr>"
        for row in islice(rows, SHOWN)
    )
    more = f"<p>and {len(rows) - SHOWN} rows more</p>" if len(rows) > SHOWN else ""
    return f"<p>{html.escape(title)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def with_error(value: float, error: float | None, form: str = ".4f") -> str:
    """A figure and its standard error, where it has one, both in a format's words."""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")

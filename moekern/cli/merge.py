"""The command `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekern.cli.calibrate import show_all
from moekern.cli.options import Json, check_statistics
from moekern.criteria.table import DEFAULT
from moekern.files import check_new


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Statistics files of one model.")],
    out: Annotated[Path, typer.Option(help="The statistics file to write.")],
    as_json: Json = False,
) -> None:
    """Add statistics gathered in several runs; files that do not match are refused."""
    check_new(out)
    check_statistics(*parts)

    from moekern.statistics.file import Statistics
    from moekern.statistics.file import merge as merged

    total = merged([Statistics.load(part) for part in parts])
    total.save(out, new=True)
    show_all(Statistics.load(out), out, DEFAULT, "0.5")

"""The command `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekern.cli.calibrate import show_all
from moekern.cli.given import check_statistics
from moekern.cli.options import Json
from moekern.criteria.table import DEFAULT
from moekern.files import check_new


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Statistics files of one model.")],
    out: Annotated[Path, typer.Option(help="The statistics file to write.")],
    as_json: Json = False,
) -> None:
    """Add statistics gathered in several runs, or in all parts of one; files that do not match are refused."""
    check_new(out)
    check_statistics(*parts)

    from moekern.statistics.file import Statistics
    from moekern.statistics.file import merge as merged
    from moekern.statistics.parts import is_part, merge_parts

    several = any([is_part(part) for part in parts])
    total = merge_parts(parts) if several else merged([Statistics.load(part) for part in parts])
    total.save(out, new=True)
    show_all(Statistics.load(out), out, DEFAULT, "0.5")

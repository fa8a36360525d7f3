"""The command `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekern.cli.calibrate import show_all
from moekern.cli.console import say
from moekern.cli.given import check_statistics
from moekern.cli.options import Json
from moekern.criteria.table import DEFAULT
from moekern.files import check_new, sized, standing


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Statistics files of one model.")],
    out: Annotated[Path, typer.Option(help="The statistics file to write.")],
    as_json: Json = False,
) -> None:
    """Add statistics gathered in several runs, or in all parts of one; files that do not match are refused."""
    check_new(out)
    check_statistics(*parts)

    from moekern.measurement.gradient_parts import finishing
    from moekern.statistics.file import Statistics
    from moekern.statistics.file import merge as merged
    from moekern.statistics.parts import is_part, merge_parts

    several = any([is_part(part) for part in parts])
    finish = finishing(standing(out.parent)) if several else None
    total = merge_parts(parts, finish) if several else merged([Statistics.load(part) for part in parts])
    total.save(out, new=True)
    if several and "gradient" in total.tiers:
        taken = sized(sum(path.stat().st_size for path in parts))
        say(f"the parts, {taken} with the gradients of their segments, are needed no longer: they may be deleted")
    show_all(Statistics.load(out), out, DEFAULT, "0.5")

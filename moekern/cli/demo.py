"""The command `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekern.cli import console
from moekern.cli.options import Json


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the artefacts; it must not exist. Default: a temporary one.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of random dropping.")] = 5,
    as_json: Json = False,
) -> None:
    """The whole of it on the small trained model that ships with moekern."""
    from moekern.cli.tour import run_demo

    document = run_demo(out, seeds)
    if console.as_json():
        console.emit(document)

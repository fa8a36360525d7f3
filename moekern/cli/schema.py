"""The command `schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moekern.cli.given import result
from moekern.cli.options import Json
from moekern.schemas import NAMES, check_schema


def schema(
    name: Annotated[str, typer.Argument(help=f"{', '.join(NAMES[:-1])} or {NAMES[-1]}.", callback=check_schema)],
    as_json: Json = False,
) -> None:
    """Print the JSON Schema of a file: a recipe, a plan, the header of statistics, a line of the manifest, ..."""
    from moekern.schemas import schema as found

    document = found(name)
    result(document, lambda: print(json.dumps(document, indent=2)))

"""The command `convert`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from moekern.cli import console
from moekern.cli.given import optional_headers, result
from moekern.cli.options import Json, Revision


class Tool(str, Enum):
    moekern = "moekern"
    llm_compressor = "llm-compressor"
    compressed_tensors = "compressed-tensors"


def convert(
    source: Annotated[Path, typer.Argument(help="A plan, an llm-compressor report or a retained_experts map.")],
    to: Annotated[Tool, typer.Option(help="Whose words to write.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    model: Annotated[str | None, typer.Option(help="The checkpoint, which gives modules their names.")] = None,
    allow_nonuniform: Annotated[
        bool, typer.Option("--allow-nonuniform", help="Accept different counts, which no engine loads.")
    ] = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Turn a plan into other tools' words, or theirs into a plan."""
    from moekern import files
    from moekern.plan.document import planned_mtp
    from moekern.plan.interchange import convert as converted
    from moekern.pruning.cuts import kept_experts

    files.check_document(out)
    text = converted(
        source,
        to.value,
        optional_headers(model, revision),
        lambda checkpoint, layout, plan: kept_experts(checkpoint, layout, plan, planned_mtp(plan)),
        allow_nonuniform=allow_nonuniform,
    )
    if not files.write_bytes(out, text.encode(), new=True):
        console.say(f"{out}: held this already")
    document = {"source": str(source), "to": to.value, "out": str(out)}
    result(document, lambda: console.say(f"{out}: {source} for {to.value}"))

"""The command `convert`."""

from __future__ import annotations

from collections.abc import Mapping
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
    order = "order"
    coli_usage = "coli_usage"
    mbolt = "mbolt"


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A plan, an llm-compressor report, a retained_experts map; statistics for the last three."),
    ],
    to: Annotated[
        Tool,
        typer.Option(help="Whose words to write; order: each layer's experts, those chosen together side by side."),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    model: Annotated[str | None, typer.Option(help="The checkpoint, which gives modules their names.")] = None,
    allow_nonuniform: Annotated[
        bool, typer.Option("--allow-nonuniform", help="Accept different counts, which no engine loads.")
    ] = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Turn a plan into other tools' words, or theirs into a plan; statistics into what serving tools read of usage."""
    from moekern import files

    files.check_document(out)
    if to in (Tool.order, Tool.coli_usage, Tool.mbolt):
        text = _placed(
            source, to.value, {"--model": model, "--revision": revision, "--allow-nonuniform": allow_nonuniform}
        )
    else:
        text = _converted(source, to.value, model, revision, allow_nonuniform=allow_nonuniform)
    if not files.write_bytes(out, text.encode(), new=True):
        console.say(f"{out}: held this already")
    document = {"source": str(source), "to": to.value, "out": str(out)}
    result(document, lambda: console.say(f"{out}: {source} for {to.value}"))


def _placed(source: Path, tool: str, others: Mapping[str, object]) -> str:
    from moekern.errors import InputError
    from moekern.plan.placement import placed
    from moekern.statistics.file import Statistics

    for flag in (flag for flag, value in others.items() if value):
        raise InputError(f"--to {tool}: statistics say all that it holds: leave out {flag}")
    return placed(Statistics.load(source), tool)


def _converted(source: Path, tool: str, model: str | None, revision: str | None, *, allow_nonuniform: bool) -> str:
    from moekern.plan.document import planned_mtp
    from moekern.plan.interchange import convert as converted
    from moekern.pruning.cuts import kept_experts

    return converted(
        source,
        tool,
        optional_headers(model, revision),
        lambda checkpoint, layout, plan: kept_experts(checkpoint, layout, plan, planned_mtp(plan)),
        allow_nonuniform=allow_nonuniform,
    )

"""Options and helpers that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any

import typer

from moekern import console


class MtpMode(str, Enum):
    prune = "prune"
    drop = "drop"
    keep = "keep"


Model = Annotated[
    str, typer.Argument(help="A checkpoint folder, or a hub id such as Qwen/Qwen3-30B-A3B, which is downloaded first.")
]
Seed = Annotated[int, typer.Option(help="Seeds the choice of sequences and the random criterion.")]
CriterionOption = Annotated[str, typer.Option(help="How experts are ranked; `moekern criteria` lists them.")]
Keep = Annotated[str, typer.Option(help="Experts kept in each layer: a share (0.5, 50%) or a count (64).")]
Domains = Annotated[
    list[str] | None, typer.Option("--domain", help="Count these domains only; repeatable. Default: all.")
]
ProtectSuper = Annotated[bool, typer.Option("--protect-super", help="Keep experts with extreme outputs in any case.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def result(as_json: bool, document: Any, table: Callable[[], None]) -> None:
    """Show a result as JSON or as a table."""
    if as_json:
        console.emit(document)
    else:
        table()

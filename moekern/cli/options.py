"""Options and helpers that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moekern.cli import console


class MtpMode(str, Enum):
    prune = "prune"
    drop = "drop"
    keep = "keep"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
Data = Annotated[
    list[str],
    typer.Option("--data", help="NAME=PATH: text, JSONL, .npy token ids or a folder of them; repeat it for domains."),
]
Tokens = Annotated[int | None, typer.Option(help="Tokens in all, shared evenly by the domains. Default: all.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens of a packed sequence.")]
BatchSize = Annotated[int, typer.Option(help="Sequences computed at a time.")]
Device = Annotated[str, typer.Option(help="Where layers are computed: cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Weights' type while computing. Default: the checkpoint's.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code shipped in the checkpoint.")]
MtpOption = Annotated[
    MtpMode | None,
    typer.Option(help="MTP layers: prune by router-row norm, drop, or keep whole. Default: as planned, else prune."),
]
StatisticsFile = Annotated[
    Path, typer.Argument(help="A statistics file; or a checkpoint folder, for criteria that need its weights alone.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="transformers, vllm, sglang or llama.cpp, as vllm:tp=2,ep=4; repeatable."),
]
Words = list[str] | None
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def folder_of(model: str | None) -> Path | None:
    """The folder of a model that may be left out."""
    from moekern.checkpoint.hub import model_folder

    return None if model is None else model_folder(model)


def result(as_json: bool, document: Any, table: Callable[[], None]) -> None:
    """Show a result as JSON or as a table."""
    if as_json:
        console.emit(document)
    else:
        table()

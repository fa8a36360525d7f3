"""Options and helpers that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moekern.cli import console
from moekern.errors import InputError, nearest_name


class Computed(str, Enum):  # plan.formats.COMPUTED
    source = "source"
    bf16 = "bf16"


class CopyMode(str, Enum):
    auto = "auto"
    reflink = "reflink"
    kernel = "kernel"
    stream = "stream"


class MtpMode(str, Enum):
    prune = "prune"
    drop = "drop"
    keep = "keep"


DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "auto": "auto"}


def parse_dtype(text: str) -> str:
    """torch's name of a type, or auto. Raises InputError."""
    if text not in DTYPES:
        raise InputError(f"--dtype {text}: expected one of {', '.join(DTYPES)}{nearest_name(text, DTYPES)}")
    return DTYPES[text]


# What can be known to be wrong before torch is imported is checked while the flags are read.


def check_model(name: str) -> str:
    """Raise InputError for what is neither a folder nor a hub id."""
    from moekern.checkpoint.hub import folder_named

    folder_named(name)
    return name


def check_criteria(given: Any) -> Any:
    """Raise InputError for a criterion of no known name."""
    from moekern.criteria.table import check_name

    for text in given if isinstance(given, list) else [given] if given else ():
        check_name(text)
    return given


def check_tiers(given: list[str] | None) -> list[str] | None:
    """Raise InputError for a tier of no known name. Every tier serves a criterion, a replacement or a budget."""
    from moekern.criteria.table import CRITERIA
    from moekern.plan.budgets import RELATIVE_TIER
    from moekern.plan.replacement import TIERS

    served = *(tier for row in CRITERIA.values() for tier in row.tiers), *TIERS.values(), RELATIVE_TIER
    known = dict.fromkeys(("routed", *filter(None, served)))
    for name in given or ():
        if name not in known:
            raise InputError(f"--tier {name}: unknown; expected one of {', '.join(known)}{nearest_name(name, known)}")
    return given


def check_targets(given: list[str] | None) -> list[str] | None:
    """Raise InputError for an engine that is none."""
    if given:
        from moekern.plan.targets import parse_target

        for text in given:
            parse_target(text)
    return given


def check_data(given: list[str] | None) -> list[str] | None:
    """Raise InputError for text that is not there."""
    if given:
        from moekern.data.mixes import domains_of

        domains_of(given)
    return given


def check_tokens(text: str) -> str:
    """Raise InputError for what is no number of tokens."""
    from moekern.data.mixes import parse_tokens

    parse_tokens(text)
    return text


def at_least(least: int) -> Callable[[typer.CallbackParam, int | None], int | None]:
    """A callback that raises InputError for a smaller number."""

    def check(param: typer.CallbackParam, value: int | None) -> int | None:
        if value is not None and value < least:
            raise InputError(f"{param.opts[0]} {value}: expected {least} or more")
        return value

    return check


def check_backend(name: str | None) -> str | None:
    """Raise InputError for kernels of no known name."""
    if name is not None and name not in BACKENDS:
        expected = f"expected one of {', '.join(BACKENDS)}"
        raise InputError(f"--backend {name}: unknown; {expected}{nearest_name(name, BACKENDS)}")
    return name


def check_memory(text: str | None) -> str | None:
    """Raise InputError for what is no size."""
    return _checked_size("--memory", text)


def check_gpu_memory(text: str | None) -> str | None:
    """Raise InputError for what is no size."""
    return _checked_size("--gpu-memory", text)


def _checked_size(flag: str, text: str | None) -> str | None:
    if text is not None:
        from moekern.cli.given import parsed_size

        parsed_size(flag, text)
    return text


def check_spill(folder: Path | None) -> Path | None:
    """Raise InputError for what is no folder that can be written to."""
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(f"--spill {folder}: no folder that can be written to")
    return folder


def check_shape(text: str | None) -> str | None:
    """Raise InputError for what is no shape."""
    from moekern.plan.shapes import parse_shape

    if text is not None:
        parse_shape(text)
    return text


def check_until_stable(threshold: float | None) -> float | None:
    """Raise InputError for what is no share."""
    from moekern.router import check_share

    if threshold is not None:
        check_share("--until-stable", threshold)
    return threshold


class Mix(str, Enum):
    code = "code"
    general = "general"
    reasoning = "reasoning"


class Thinking(str, Enum):
    on = "on"
    off = "off"
    row = "row"


Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint folder, or a hub id such as Qwen/Qwen3-30B-A3B, which is downloaded first.",
        callback=check_model,
    ),
]
HeadersOf = Annotated[
    str,
    typer.Argument(
        help="A checkpoint folder, or a hub id such as Qwen/Qwen3-30B-A3B, of which headers are read.",
        callback=check_model,
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Of a hub id: a branch, tag or commit. Default: the main branch.")
]
Seed = Annotated[
    int, typer.Option(help="Seeds the choice of sequences and the random criterion.", callback=at_least(0))
]
CriterionOption = Annotated[
    str, typer.Option(help="How experts are ranked; `moekern criteria` lists them.", callback=check_criteria)
]
CriteriaOption = Annotated[
    list[str],
    typer.Option(
        "--criterion", help="How experts are ranked; `moekern criteria` lists them. Repeat it for several.",
        callback=check_criteria,
    ),
]  # fmt: skip
Tiers = Annotated[
    list[str] | None,
    typer.Option(
        "--tier",
        help="Measure this too; repeatable: dimensions, constants, stream, vocabulary, token_counts, coalitions, "
        "outliers, reap, mixture, gram, replay, gradient, weights. `moekern criteria` says which a criterion needs.",
        callback=check_tiers,
    ),
]
Keep = Annotated[str, typer.Option(help="Experts kept in each layer: a share (0.5, 50%) or a count (64).")]
Keeps = Annotated[
    list[str] | None,
    typer.Option(
        "--keep", help="Experts kept in each layer: a share (0.5, 50%) or a count (64). Repeat it for several."
    ),
]
UntilStable = Annotated[
    float | None,
    typer.Option(
        help="Measure the text in growing parts, and stop where the sets that its two halves keep are so much alike "
        "(Jaccard index, mean over layers), as 0.98.",
        callback=check_until_stable,
    ),
]
RESERVE = "15%"  # of --fit: the tenth that vLLM and SGLang leave unused by default, and room for activations
FitOption = Annotated[
    str | None,
    typer.Option("--fit", help="Instead of --keep: the most experts whose weights and KV cache fit, as 24GiB."),
]
Bits = Annotated[float | None, typer.Option(help="With --fit: bits a weight, as 4.5. Default: as stored.")]
Context = Annotated[int, typer.Option(help="With --fit: tokens of a sequence in the KV cache.")]
Sequences = Annotated[int, typer.Option(help="With --fit: sequences in the KV cache.")]
Reserve = Annotated[
    str,
    typer.Option(help="With --fit: what of it is left to activations and the engine's own limit, a share or a size."),
]
BudgetOption = Annotated[
    str, typer.Option("--budget", help="uniform; global, adaptive, waterfill, relative: layers keep different numbers.")
]
Normalise = Annotated[
    str, typer.Option(help="With --budget global, each layer's scores: none, sum, max, mean or zscore.")
]
AllowNonuniform = Annotated[bool, typer.Option("--allow-nonuniform", help="Keep uneven counts, which no engine loads.")]
Domains = Annotated[
    list[str] | None, typer.Option("--domain", help="Count these domains only; repeatable. Default: all.")
]
ProtectSuper = Annotated[bool, typer.Option("--protect-super", help="Keep experts with extreme outputs in any case.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="SOURCE, NAME=SOURCE or NAME=SOURCE:AMOUNT: a file of text or rows, a folder of them, or a hub data set "
        "such as org/name[subset](split). AMOUNT: 200k or 2M tokens, 4096 sequences, 0.5 or 50% of --tokens. "
        "Repeatable.",
        callback=check_data,
    ),
]
Preset = Annotated[Mix | None, typer.Option("--preset", help="A mix of hub data sets: code, general or reasoning.")]
Tokens = Annotated[
    str,
    typer.Option(
        help="Tokens of the domains that name no amount, evenly shared: 500000, 500k, 2M or all.", callback=check_tokens
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", help="The column that holds the text of rows, or NAME=COLUMN; repeatable."),
]
ThinkingOption = Annotated[
    Thinking, typer.Option("--thinking", help="enable_thinking of the chat template: on, off, or as each row says.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first row or file that cannot be read.")]
SequenceLength = Annotated[
    int | None,
    typer.Option(help="Tokens of a sequence; 2048, or the model's positions if fewer.", callback=at_least(2)),
]
Pack = Annotated[
    bool,
    typer.Option(help="Pack text into sequences of one length, or make each file, row of data or of an array one."),
]
BatchSize = Annotated[int, typer.Option(help="Sequences computed at a time.", callback=at_least(1))]
Chunk = Annotated[
    int | None,
    typer.Option(
        help="Sequences computed, and added up, at a time: decides the bits. Default: 2048 tokens of them.",
        callback=at_least(1),
    ),
]
UnusedBatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", help="Of earlier versions; changes nothing: statistics are taken by --chunk."),
]
Device = Annotated[
    str, typer.Option(help="Where layers are computed: cpu, cuda, cuda:1, ... Default: cuda if there is one.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Weights' type while computing: bf16, fp16, fp32 or torch's names. auto is the checkpoint's, or fp32 "
        "where the CPU is slow at that and memory allows.",
        callback=parse_dtype, metavar="TYPE",
    ),
]  # fmt: skip
Memory = Annotated[
    str | None,
    typer.Option(
        help="The most memory to take, as 24GiB. Default: what the machine, or its control group, has free.",
        callback=check_memory,
    ),
]
Spill = Annotated[
    Path | None,
    typer.Option(
        help="A folder for what does not fit into memory. Default: beside the output, else the system's.",
        callback=check_spill,
    ),
]
GpuMemory = Annotated[
    str | None, typer.Option(help="The same of the GPU. Default: what it has free.", callback=check_gpu_memory)
]
BACKENDS = ("native", "grouped_mm", "triton", "reference")  # the kernels' own, without the torch they import
BackendOption = Annotated[
    str | None,
    typer.Option(
        help=f"Kernels to use: {', '.join(BACKENDS)}; never another than the named one. Default: the best.",
        callback=check_backend,
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew, whatever a run that was stopped has left.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code shipped in the checkpoint.")]
MtpOption = Annotated[
    MtpMode | None,
    typer.Option(help="MTP layers: prune by router-row norm, drop, or keep whole. Default: as planned, else prune."),
]
RefitOption = Annotated[
    bool,
    typer.Option("--refit", help="Fit what stays by least squares to what the original's layers make (one more pass)."),
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        help="With --refit: auto, or experts x channels as 64x512: fewer and narrower experts of the same bytes as "
        "--keep. auto tries some on a part of the text.",
        callback=check_shape,
    ),
]
RefineOption = Annotated[
    bool,
    typer.Option(
        "--refine", help="Train every kept expert alone as well, gate, up and down, against what its layer lacks."
    ),
]
ReEstimate = Annotated[
    bool, typer.Option("--reestimate", help="Choose as many experts anew behind layers that are pruned and refitted.")
]
ComputedDtype = Annotated[
    Computed,
    typer.Option(
        help="Refitted weights become what MODEL's are, quantised ones again; or bfloat16, where it is plain."
    ),
]
WidthOption = Annotated[
    int | None,
    typer.Option(
        help="Channels that each kept expert keeps, those with the most energy. Default: all.", callback=at_least(1)
    ),
]
CopyOption = Annotated[
    CopyMode,
    typer.Option(
        "--copy",
        help="reflink shares blocks with MODEL, kernel uses copy_file_range, stream goes through memory; auto "
        "takes the best, a named way is taken or refused.",
    ),
]
StatisticsFile = Annotated[
    Path, typer.Argument(help="A statistics file; or a checkpoint folder, for criteria that need its weights alone.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", help="An engine (`check` lists them), as vllm:tp=2,ep=4; repeatable.", callback=check_targets
    ),
]
Words = list[str] | None
# Not looked at by the commands: the callback sets the console's mode before anything else is done.
Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON instead of tables.", callback=console.set_json, is_eager=True),
]

"""Options and helpers that several commands share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli import console
from moekern.errors import InputError, nearest_name
from moekern.files import told

if TYPE_CHECKING:
    from moekern.checkpoint.folder import Checkpoint
    from moekern.data.text import Text
    from moekern.model.compute import Compute
    from moekern.plan.document import Plan


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
    """Raise InputError for a tier of no known name. Every tier serves a criterion, so the table knows them all."""
    from moekern.criteria.table import CRITERIA

    known = dict.fromkeys(("routed", *(tier for row in CRITERIA.values() for tier in row.tiers)))
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
Seed = Annotated[int, typer.Option(help="Seeds the choice of sequences and the random criterion.")]
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
        help="Measure this too; repeatable: dimensions, vocabulary, token_counts, coalitions, outliers, reap, "
        "replay, gradient, weights. `moekern criteria` says which one a criterion needs.",
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
        "(Jaccard index, mean over layers), as 0.98."
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
    str, typer.Option("--budget", help="uniform; global, adaptive or waterfill let layers keep different numbers.")
]
Normalise = Annotated[
    str, typer.Option(help="With --budget global, each layer's scores: none, sum, max, mean or zscore.")
]
AllowNonuniform = Annotated[
    bool, typer.Option("--allow-nonuniform", help="Accept different counts, which no engine loads.")
]
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
SequenceLength = Annotated[int, typer.Option(help="Tokens of a packed sequence; with --no-pack the most of a row.")]
Pack = Annotated[
    bool,
    typer.Option(help="Pack text into sequences of one length, or make each file, row of data or of an array one."),
]
BatchSize = Annotated[int, typer.Option(help="Sequences computed at a time.")]
Chunk = Annotated[
    int | None,
    typer.Option(help="Sequences computed, and added up, at a time: decides the bits. Default: 2048 tokens of them."),
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
    typer.Option(help="The most memory to take, as 24GiB. Default: what the machine, or its control group, has free."),
]
Spill = Annotated[
    Path | None,
    typer.Option(help="A folder for what does not fit into memory. Default: beside the output, else the system's."),
]
GpuMemory = Annotated[str | None, typer.Option(help="The same of the GPU. Default: what it has free.")]
BACKENDS = ("native", "grouped_mm", "triton", "reference")  # the kernels' own, without the torch they import
BackendOption = Annotated[
    str | None,
    typer.Option(help=f"Kernels to use: {', '.join(BACKENDS)}; never another than the named one. Default: the best."),
]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew, whatever a run that was stopped has left.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code shipped in the checkpoint.")]
MtpOption = Annotated[
    MtpMode | None,
    typer.Option(help="MTP layers: prune by router-row norm, drop, or keep whole. Default: as planned, else prune."),
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


def parsed_size(flag: str, text: str) -> int:
    """Bytes: "5GB" is 5e9, "512MiB" 512 * 2^20, "4096" itself. Raises InputError that names the flag."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or (found[3] and not found[2]):
        raise InputError(f"{flag} {text}: expected a size such as 5GB or 512MiB")
    power = " KMGT".index(found[2].upper() or " ")
    nbytes = float(found[1]) * (1024 if found[3] else 1000) ** power
    if nbytes >= 1 << 63:
        raise InputError(f"{flag} {text:.80}: more bytes than there are")
    return int(nbytes)


def parsed_reserve(text: str, limit: int) -> int:
    """Bytes: a share of `limit` ("15%"), or a size. Raises InputError that names --reserve."""
    share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", text.strip())
    if share and float(share[1]) < 100:
        return int(limit * float(share[1]) / 100)
    if share:
        raise InputError(f"--reserve {text}: expected less than 100%")
    return parsed_size("--reserve", text)


def text_of(
    *,
    data: Sequence[str] | None,
    preset: Mix | None,
    tokens: str,
    sequence_length: int,
    column: Sequence[str] | None,
    thinking: Thinking,
    strict: bool,
    pack: bool,
    seed: int,
    batch_size: int = 1,
    chunk: int | None = None,
) -> Text:
    """Which text the options name; none of it is read yet. What is to be said of it goes to the console."""
    from moekern.data.mixes import PRESETS, domains_of, parse_tokens
    from moekern.data.text import Text

    specs = (*(data or ()), *((PRESETS[preset.value],) if preset else ()))
    if specs:
        domains_of(specs)  # what is not there is found before a model is downloaded
    return Text(
        data=specs,
        tokens=parse_tokens(tokens),
        sequence_length=sequence_length,
        batch_size=batch_size,
        chunk=chunk,
        seed=seed,
        columns=tuple(column or ()),
        thinking=thinking.value,
        strict=strict,
        pack=pack,
        tell=console.say,
    )


def say_unused(batch_size: int | None) -> None:
    """What --batch-size is worth where statistics are measured."""
    if batch_size is not None:
        console.say(f"--batch-size {batch_size}: changes nothing here; statistics are computed by --chunk sequences")


def compute_of(
    *,
    device: str,
    dtype: str = "auto",
    backend: str | None = None,
    memory: str | None = None,
    gpu_memory: str | None = None,
    spill: Path | None = None,
    trust_remote_code: bool,
    tell: bool = True,
) -> Compute:
    """How the options say that layers are computed; the first line of what the command says names the device
    (with `tell`)."""
    allowed = None if memory is None else parsed_size("--memory", memory)
    on_gpu = None if gpu_memory is None else parsed_size("--gpu-memory", gpu_memory)

    from moekern.model.budget import budget_of
    from moekern.model.compute import Compute, check_device

    if spill is not None and not os.access(spill, os.W_OK | os.X_OK):
        raise InputError(f"--spill {spill}: no folder that can be written to")
    check_device(device)
    compute = Compute(device, dtype, backend, trust_remote_code, allowed, on_gpu, spill)
    budget_of(compute)  # what cannot be allowed is found before a model is downloaded
    if tell:
        console.open_with(compute.described)
    return compute


def headers_of(model: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint of a folder or a hub id, for what headers tell: no weight is downloaded."""
    from moekern.checkpoint import hub, remote
    from moekern.checkpoint.folder import open_checkpoint

    found = hub.find_model(model, revision, console.say)
    return open_checkpoint(found) if isinstance(found, Path) else remote.headers_of(found, console.progress)


def folder_of(model: str, revision: str | None = None) -> Path:
    """The folder of a model. A hub id is downloaded, once its headers have shown that its layout is known."""
    from moekern.architectures import find_layout
    from moekern.checkpoint import hub, remote

    found = hub.find_model(model, revision, console.say)
    if isinstance(found, Path):
        return found
    checkpoint = remote.headers_of(found, console.progress)
    find_layout(checkpoint)
    return remote.download(found, checkpoint, revision, console.say, console.progress)


def optional_headers(model: str | None, revision: str | None) -> Checkpoint | None:
    """Those of --model, which may be left out."""
    if model is None and revision is not None:
        raise InputError(f"--revision {revision}: goes with --model")
    return None if model is None else headers_of(model, revision)


def check_statistics(*paths: Path) -> None:
    """Raise InputError for a statistics file, or a checkpoint folder in its place, that is not there."""
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such statistics file")


def named_plans(command: str, paths: Sequence[Path]) -> dict[str, Plan]:
    """File -> plan. Raises InputError for a file that is named twice, which would make one row of two."""
    from moekern.plan.document import Plan

    if len(set(paths)) < len(paths):
        raise InputError(f"{command}: the same file is named twice", kind="option")
    return {str(path): Plan.load(path) for path in paths}


def result(document: Any, table: Callable[[], None]) -> None:
    """Show a result as JSON or as a table."""
    with told("standard output"):
        if console.as_json():
            console.emit(document)
        else:
            table()
        sys.stdout.flush()

"""What options say, as the objects that stages take; and a command's result."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moekern.cli import console
from moekern.errors import InputError
from moekern.files import told

if TYPE_CHECKING:
    from moekern.checkpoint.folder import Checkpoint
    from moekern.cli.options import Mix, Thinking
    from moekern.data.text import Text
    from moekern.model.compute import Compute
    from moekern.plan.document import Plan
    from moekern.statistics.file import Statistics


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter stands on the command line, and is neither a default nor a recipe's."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


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
    sequence_length: int | None,
    column: Sequence[str] | None,
    thinking: Thinking,
    strict: bool,
    pack: bool,
    seed: int,
    batch_size: int = 1,
    chunk: int | None = None,
    answers: bool = False,
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
        answers=answers,
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


def result(document: Any, table: Callable[[], None], *, good: bool = True) -> None:
    """Show a result as JSON or as a table; one that is not good ends the command with exit code 1."""
    with told("standard output"):
        if console.as_json():
            console.emit(document)
        else:
            table()
        sys.stdout.flush()
    if not good:
        raise typer.Exit(1)


def statistics_of(source: Path, criteria: Sequence[str]) -> Statistics:
    """A statistics file; or, for criteria of the weights alone, a checkpoint folder, whose shards are read once: only
    then what runs models is imported, which takes longer than a plan.

    Raises InputError for a folder and a criterion that needs text.
    """
    from moekern.criteria import CRITERIA, criterion_named
    from moekern.statistics.file import Statistics

    for text in criteria:
        if criterion_named(text).family != "weight" and source.is_dir():
            alone = ", ".join(name for name, row in CRITERIA.items() if row.family == "weight")
            raise InputError(
                f"{source}: --criterion {text} needs text: calibrate first, and give the statistics file; "
                f"these need none: {alone}"
            )
    if not source.is_dir():
        return Statistics.load(source)
    from moekern.measurement.weights import weigh

    costly = any(re.search(r"\b(ews|wsr)\b", text) for text in criteria)
    with console.progress("weighing") as step:
        return weigh(source, costly=costly, progress=step)

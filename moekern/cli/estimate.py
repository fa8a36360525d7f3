"""The command `estimate`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli.console import say, show
from moekern.cli.given import compute_of, headers_of, result
from moekern.cli.options import Device, DtypeOption, GpuMemory, HeadersOf, Json, Memory, Revision, SequenceLength, Tiers
from moekern.errors import InputError
from moekern.files import sized
from moekern.router import parse_keep

if TYPE_CHECKING:
    from moekern.architectures import Layout
    from moekern.checkpoint.folder import Checkpoint
    from moekern.estimation.counted import Asked, Figure, Stage
    from moekern.estimation.estimate import Job
    from moekern.model.compute import Compute


def estimate(
    model: HeadersOf,
    tokens: Annotated[str, typer.Option(help="Tokens of text: 500000, 500k or 2M.")] = "1M",
    sequence_length: SequenceLength = None,
    domains: Annotated[int, typer.Option(help="Domains of the text, which are kept apart.")] = 1,
    tier: Tiers = None,
    keep: Annotated[str, typer.Option(help="Experts kept in each layer: a share (0.5, 50%) or a count (64).")] = "0.5",
    plans: Annotated[int, typer.Option(help="Plans that are evaluated beside the original.")] = 1,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    out: Annotated[Path, typer.Option(help="A folder on the disk that results go to, which is measured.")] = Path(),
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Time, memory and disk of calibrate, evaluate, prune and refit, before any of it is done.

    From headers and config alone, so that a hub id is enough, and from ten seconds of measuring this machine.
    """
    share, count = parse_keep(keep), _count(tokens)
    if not (out.is_dir() and os.access(out, os.W_OK | os.X_OK)):
        raise InputError(f"--out {out}: no folder that can be written to; name one on the disk that results go to")

    from moekern.architectures import find_layout
    from moekern.data.read import LENGTH
    from moekern.data.text import length_for
    from moekern.estimation.counted import Asked
    from moekern.estimation.estimate import estimate as estimated
    from moekern.recovery.estimated import recovered
    from moekern.recovery.settings import Training
    from moekern.router import kept_count

    compute = compute_of(
        device=device, dtype=dtype, memory=memory, gpu_memory=gpu_memory, trust_remote_code=False, tell=False
    )
    asked = Asked(count, sequence_length or LENGTH, domains, tuple(tier or ()), share, plans)
    checkpoint = headers_of(model, revision)
    asked = replace(asked, sequence=length_for(checkpoint, sequence_length))
    layout = find_layout(checkpoint)
    kept = kept_count(share, layout.router) / layout.num_experts
    job = probed(checkpoint, layout, compute, asked, out)
    trainings = (Training(train=(kind,)) for kind in ("router", "all"))
    stages = (
        *estimated(job, not_refitted=_not_refitted(checkpoint, layout)),
        *(recovered(job, training, kept) for training in trainings),
    )
    document = estimate_document(job, stages)
    result(document, lambda: show_estimate(job, stages))


def estimate_document(job: Job, stages: Sequence[Stage]) -> dict[str, Any]:
    """Stages, and what they are estimated of, as JSON."""
    from moekern.kernels.checks import short

    return {
        "model": job.checkpoint.name,
        "tokens": job.asked.tokens,
        "device": str(job.model.shapes.device),
        "dtype": short(job.model.shapes.dtype),
        "memory": job.budget.host,
        "gpu_memory": job.budget.gpu,
        "rates": _rates(job),
        "stages": {stage.name: stage.document() for stage in stages},
    }


def _rates(job: Job) -> dict[str, Any]:
    return {name: None if rate is None else rate._asdict() for name, rate in vars(job.rates).items()}


def probed(checkpoint: Checkpoint, layout: Layout, compute: Compute, asked: Asked, out: Path) -> Job:
    """What stages are estimated of: this machine is measured, and the disk that `out` is on."""
    from moekern.estimation.counted import counted
    from moekern.estimation.estimate import job_of
    from moekern.estimation.probe import probe
    from moekern.model.budget import budget_of, resident
    from moekern.model.precision import precision

    found = precision(compute, checkpoint, layout)
    compute = replace(compute, dtype=found.name)
    held, started, budget = resident(), _seconds_since_start(), budget_of(compute)
    say(f"{compute.described}, {found.described}, {budget.described}; measuring this machine")
    stated = counted(checkpoint, layout, compute, asked)
    rates = probe(checkpoint, stated.shapes, out)
    return job_of(checkpoint, layout, stated, rates, asked, budget, held=held, started=started)


def _not_refitted(checkpoint: Checkpoint, layout: Layout) -> str:
    """Why what is computed of its experts cannot be written; empty where it can."""
    from moekern.plan.formats import computed_format, weight_format

    names = [tensor.name for layer in layout.layers.values() for tensor in layer.of_role("expert")]
    try:
        computed_format("source", weight_format(checkpoint.config, names))
    except InputError as error:
        return str(error).partition(": ")[2]
    return ""


def _count(text: str) -> int:
    from moekern.data.mixes import parse_tokens

    count = parse_tokens(text)
    if count is None:
        raise InputError("--tokens all: an estimate needs a number, such as 2M")
    return count


def _seconds_since_start() -> float:
    """Of this process, which has imported what the stages import."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def show_estimate(job: Job, stages: Sequence[Stage]) -> None:
    """A row a stage; then what the figures are made of, and how each is known."""
    rows = [
        (s.name, _time(s.seconds.value), s.bound, sized(s.memory.value),
         "-" if s.gpu_memory is None else sized(s.gpu_memory.value), sized(s.disk.value))
        for s in stages
    ]  # fmt: skip
    show(
        f"{job.checkpoint.name}, {job.asked.tokens} tokens",
        ("stage", "time", "most of it", "memory", "GPU memory", "disk"),
        rows,
    )
    parts = [
        (stage.name, name, part.name, shown(part.value), part.known)
        for stage in stages
        for name, figure, shown in _figures(stage)
        for part in figure.parts
        if part.value
    ]
    show("what the figures are made of", ("stage", "figure", "part", "value", "known by"), parts)
    measured = [(name, f"{r['value']:.3g} {r['unit']}", r["known"]) for name, r in _rates(job).items() if r is not None]
    show("this machine", ("what", "rate", "known by"), measured)
    for stage in stages:
        for note in stage.notes:
            say(f"{stage.name}: {note}")


def _figures(stage: Stage) -> list[tuple[str, Figure, Any]]:
    found = [("time", stage.seconds, _time), ("memory", stage.memory, sized), ("GPU memory", stage.gpu_memory, sized),
             ("disk", stage.disk, sized)]  # fmt: skip
    return [(name, figure, shown) for name, figure, shown in found if figure is not None]


def _time(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

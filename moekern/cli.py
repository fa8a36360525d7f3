"""The command line: one command a stage. Each parses its options, calls the stage and shows the result."""

from __future__ import annotations

import dataclasses
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moekern import cli_iteration, cli_planning, console, tables
from moekern.cli_options import (
    BatchSize,
    CriterionOption,
    Data,
    Device,
    DtypeOption,
    Json,
    Keep,
    Model,
    MtpMode,
    ProtectSuper,
    Seed,
    SequenceLength,
    Tokens,
    TrustRemoteCode,
    result,
)
from moekern.errors import InputError, notes

app = typer.Typer(
    name="moekern",
    help="Prune experts from Mixture-of-Experts language models of any size on one machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.add_typer(cli_planning.commands)
app.add_typer(cli_iteration.commands)

STOPPED: dict[Any, str] = {130: "Ctrl-C", 143: "SIGTERM"}


class CopyMode(str, Enum):
    auto = "auto"
    reflink = "reflink"
    kernel = "kernel"
    stream = "stream"


class ChecksumKind(str, Enum):
    xxh3 = "xxh3"
    blake3 = "blake3"
    none = "none"


MtpOption = Annotated[
    MtpMode | None,
    typer.Option(help="MTP layers: prune by router-row norm, drop, or keep whole. Default: as planned, else prune."),
]


def main() -> None:
    """Run the command line; what the user can mend ends in one line and exit code 2, a signal in 128 + its number."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that temporary files go
    try:
        app()
    except (InputError, OSError) as error:
        text = " ".join(str(error).split())
        print(f"moekern: {text}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code in STOPPED:
            print("; ".join([f"moekern: stopped by {STOPPED[end.code]}", *notes(end)]), file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command(epilog="moekern inspect Qwen3-30B-A3B")
def inspect(model: Model, as_json: Json = False) -> None:
    """Show layout, experts, bytes and what can be pruned, from the headers alone."""
    from moekern.checkpoint.hub import model_folder
    from moekern.estimation.overview import overview

    found = overview(model_folder(model))
    result(as_json, dataclasses.asdict(found), lambda: tables.overview(found))


@app.command(epilog="moekern calibrate MODEL --data code=src/ --data prose=a.txt --tokens 500000 --out s.safetensors")
def calibrate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="The statistics file to write.")],
    tokens: Tokens = None,
    sequence_length: SequenceLength = 2048,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure this too; repeatable: dimensions (the default), vocabulary, coalitions, outliers, reap, "
            "replay, gradient, weights; routed alone for none. `moekern criteria` says which one a criterion needs."
        ),
    ] = None,
    spill: Annotated[
        Path | None,
        typer.Option(help="With tier gradient: a folder for the layers' inputs, which else stay in memory."),
    ] = None,
    replay_tokens: Annotated[
        int, typer.Option(help="Tokens of each domain on which tier replay runs all experts.")
    ] = 512,
    backend: Annotated[str | None, typer.Option(help="Kernels to use: native or reference. Default: the best.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Stream text through the model one layer at a time and measure its experts."""
    from moekern import stages
    from moekern.calibration.options import Calibration
    from moekern.checkpoint.hub import model_folder

    options = Calibration(
        tuple(data), tokens, sequence_length, batch_size, seed, device, dtype and dtype.value,
        ("dimensions",) if tier is None else tuple(tier), backend, trust_remote_code, replay_tokens, spill,
    )  # fmt: skip
    statistics = stages.calibrate_to(model_folder(model), options, out)
    result(as_json, {"out": str(out), **statistics.header}, lambda: tables.statistics(statistics, out))


@app.command(epilog="moekern merge part1.safetensors part2.safetensors --out all.safetensors")
def merge(
    parts: Annotated[list[Path], typer.Argument(help="Statistics files of one model.")],
    out: Annotated[Path, typer.Option(help="The statistics file to write.")],
    as_json: Json = False,
) -> None:
    """Add statistics gathered in several runs; files that do not match are refused."""
    from moekern.statistics.file import Statistics
    from moekern.statistics.file import merge as merged

    if out.exists():
        raise InputError(f"--out {out}: exists already")
    total = merged([Statistics.load(part) for part in parts])
    total.save(out)
    result(as_json, {"out": str(out), **total.header}, lambda: tables.statistics(total, out))


@app.command(epilog="moekern prune MODEL plan.json --out MODEL-pruned")
def prune(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="A plan.json, made by moekern or by hand.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    mtp: MtpOption = None,
    copy: Annotated[
        CopyMode,
        typer.Option(
            help="reflink shares blocks with MODEL, kernel uses copy_file_range, stream goes through memory; auto "
            "takes the best, a named way is taken or refused."
        ),
    ] = CopyMode.auto,
    checksum: Annotated[
        ChecksumKind,
        typer.Option(
            help="Of every tensor, in moekern_manifest.jsonl. xxh3: of what passes through memory; blake3: reads back."
        ),
    ] = ChecksumKind.xxh3,
    reread: Annotated[
        bool, typer.Option("--reread", help="Read every file back from the disk and compare its checksums.")
    ] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Make shards anew of at most this size (5GB, 512MiB), instead of MODEL's own.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="I/N: write this process's share of the shards; whoever is last finishes. Set by torchrun."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy the checkpoint without the dropped experts: byte ranges only, nothing is converted.

    What is interrupted goes on where it was when the same command is run again.
    """
    from moekern.checkpoint.hub import model_folder
    from moekern.plan.document import Plan
    from moekern.pruning.prune import prune as run
    from moekern.pruning.work_folder import Part

    limit = None if max_shard_size is None else console.parsed_size("--max-shard-size", max_shard_size)
    share = Part.parse(part) if part else Part.of_torchrun()
    with console.progress("pruning", "bytes", as_json) as step:
        report = run(
            model_folder(model),
            Plan.load(plan),
            out,
            mtp=mtp.value if mtp else None,
            copy=copy.value,
            checksum=checksum.value,
            reread=reread,
            max_shard_size=limit,
            part=share,
            progress=step,
        )
    result(as_json, {**dataclasses.asdict(report), "out": str(report.out)}, lambda: tables.pruned(report))


@app.command(epilog="moekern verify MODEL plan.json MODEL-pruned --forward")
def verify(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="The plan the checkpoint was pruned with.")],
    pruned: Annotated[Path, typer.Argument(help="The pruned checkpoint.")],
    forward: Annotated[
        bool, typer.Option("--forward", help="Also stream both models and compare logits with the masked original.")
    ] = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Compare the pruned checkpoint with the original, byte for byte; exit code 1 on any difference."""
    from moekern import stages
    from moekern.checkpoint.hub import model_folder
    from moekern.plan.document import Plan

    verdict = stages.verify_both(
        model_folder(model),
        Plan.load(plan),
        pruned,
        forward=forward,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    result(as_json, verdict.document(), lambda: tables.say_verdict(verdict))
    if not verdict.good:
        raise typer.Exit(1)


@app.command(epilog="moekern evaluate MODEL --data prose=held-out.txt plan-a.json plan-b.json")
def evaluate(
    model: Model,
    data: Data,
    plans: Annotated[list[Path] | None, typer.Argument(help="Plans to apply on the fly.")] = None,
    tokens: Tokens = None,
    sequence_length: SequenceLength = 2048,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Held-out loss per domain of the original and of plans, in one pass over the weights."""
    from moekern import stages
    from moekern.calibration.options import Calibration
    from moekern.checkpoint.hub import model_folder
    from moekern.evaluation.losses import losses_document
    from moekern.plan.document import Plan

    options = Calibration(
        tuple(data), tokens, sequence_length, batch_size, seed, device, dtype and dtype.value,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    named = {str(path): Plan.load(path) for path in plans or []}
    losses = stages.evaluate_plans(model_folder(model), options, named)
    result(as_json, losses_document(losses), lambda: tables.losses(losses))


@app.command(epilog="moekern run MODEL --data prose=book.txt --keep 0.5 --criterion reap --out MODEL-pruned")
def run(
    model: Model,
    data: Data,
    keep: Keep,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    criterion: CriterionOption = "reap",
    tokens: Tokens = None,
    sequence_length: SequenceLength = 2048,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = None,
    protect_super: ProtectSuper = False,
    mtp: MtpOption = None,
    forward: Annotated[
        bool, typer.Option(help="Prove the result by comparing logits with the masked original (two more passes).")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Calibrate, plan, prune and verify. Statistics and plan stay in OUT.moekern/ and are used again after a kill."""
    from moekern import stages
    from moekern.calibration.options import Calibration
    from moekern.checkpoint.hub import model_folder
    from moekern.criteria import criterion_named
    from moekern.router import parse_keep

    options = Calibration(
        tuple(data), tokens, sequence_length, batch_size, seed, device, dtype and dtype.value,
        tiers=criterion_named(criterion).tiers, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    done = stages.run(
        model_folder(model), options, out,
        criterion=criterion, keep=parse_keep(keep), protect_super=protect_super,
        mtp=mtp.value if mtp else "prune", forward=forward,
    )  # fmt: skip
    result(as_json, done.document(), lambda: tables.run(done))
    if not done.verdict.good:
        raise typer.Exit(1)


@app.command(epilog="moekern bench --case qwen3-30b-a3b --threads 1 --out bench.jsonl")
def bench(
    case: Annotated[list[str] | None, typer.Option(help="Layers to take; repeatable. Default: all.")] = None,
    op: Annotated[
        list[str] | None, typer.Option(help="Beginnings of ops, or experts; repeatable. Default: all.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")] = None,
    repeats: Annotated[int, typer.Option(help="Calls a median is taken of.")] = 9,
    compiled: Annotated[bool, typer.Option(help="Time torch.compile of the torch code too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Append one JSON line a time to this file.")] = None,
    show: Annotated[Path | None, typer.Option(help="Measure nothing: print a record as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Time the kernels on layers of real models, against torch and torch.compile; correct first."""
    import torch

    from moekern.benchmark import run as benchmark
    from moekern.benchmark.inputs import MODELS
    from moekern.benchmark.records import append

    if show is not None:
        if not show.is_file():
            raise InputError(f"--show {show}: no such record")
        print(benchmark.markdown(benchmark.read(show)), end="")
        return
    for name in case or ():
        if name not in MODELS:
            raise InputError(f"--case {name}: expected one of {', '.join(MODELS)}")
    lines = benchmark.measure(
        case or list(MODELS), threads=threads or torch.get_num_threads(), repeats=repeats, ops=op or (),
        compiled=compiled, done=lambda found: append(out, found),
    )  # fmt: skip
    if not lines:
        raise InputError(f"--op {', '.join(op or ())}: no op begins so")
    result(as_json, lines, lambda: benchmark.table(lines))


@app.command(epilog="moekern demo")
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the artefacts; it must not exist. Default: a temporary one.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of random dropping.")] = 5,
    as_json: Json = False,
) -> None:
    """The whole of it on the small trained model that ships with moekern."""
    from moekern.demo.show import run_demo

    document = run_demo(out, seeds, quiet=as_json)
    if as_json:
        console.emit(document)

"""The command `iterate`: experts chosen layer by layer, or in rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekern.cli import ranks
from moekern.cli.console import say
from moekern.cli.given import compute_of, result, say_unused, text_of
from moekern.cli.options import (
    BackendOption,
    Chunk,
    Column,
    CriterionOption,
    Device,
    Domains,
    DtypeOption,
    GpuMemory,
    Json,
    Keep,
    Memory,
    Model,
    Pack,
    Preset,
    Restart,
    Revision,
    Seed,
    SequenceLength,
    Spill,
    Strict,
    Targets,
    Thinking,
    ThinkingOption,
    Tokens,
    TrustRemoteCode,
    UnusedBatchSize,
    check_data,
)
from moekern.cli.plan import check_options, show_plans, slower_with
from moekern.criteria.table import DEFAULT
from moekern.files import standing
from moekern.router import parse_keep


def iterate(
    model: Model,
    keep: Keep,
    out: Annotated[Path, typer.Option(help="The plan to write.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="NAME=PATH, as for calibrate; repeatable. Criteria on weights alone take none.",
            callback=check_data,
        ),
    ] = None,
    criterion: CriterionOption = DEFAULT,
    rounds: Annotated[
        int, typer.Option(help="Experts go in so many rounds, each of which scores all that are left anew.")
    ] = 1,
    reestimate: Annotated[
        bool, typer.Option(help="Measure each layer behind the pruned layers before it, not behind whole ones.")
    ] = True,
    domain: Domains = None,
    target: Targets = None,
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = None,
    pack: Pack = True,
    chunk: Chunk = None,
    batch_size: UnusedBatchSize = None,
    column: Column = None,
    thinking: ThinkingOption = Thinking.row,
    strict: Strict = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    spill: Spill = None,
    backend: BackendOption = None,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Calibrate and plan at once: layers are pruned in memory as they stream by, so that later ones are measured behind
    them.

    A round is one pass over the weights. Rounds that are done, and the layer that the next one has come to, stay
    in OUT.moekern/, and the same command goes on there.
    """
    share = parse_keep(keep)  # before torch is imported

    from moekern.checkpoint.folder import open_checkpoint
    from moekern.cli import pipeline
    from moekern.iteration.rounds import Method
    from moekern.plan.provenance import remarks
    from moekern.plan.several import Planning
    from moekern.plan.targets import parse_target

    targets = tuple(parse_target(text) for text in target or ())
    if ranks.helping() is None:
        pipeline.check_iterated(out)  # before anything is downloaded
    method = Method(criterion, share, rounds, reestimate, tuple(domain) if domain else None, seed)
    say_unused(batch_size)
    text = text_of(
        data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, thinking=thinking,
        strict=strict, pack=pack, chunk=chunk, seed=seed,
    )  # fmt: skip
    compute = ranks.together(compute_of(
        device=device, dtype=dtype, backend=backend, memory=memory, gpu_memory=gpu_memory,
        spill=spill or standing(out.parent), trust_remote_code=trust_remote_code,
    ))  # fmt: skip
    folder = ranks.folder_of(model, revision, compute.team)
    checkpoint = open_checkpoint(folder) if targets else None
    options = Planning((criterion,), (share,), targets=targets, model=checkpoint)
    if checkpoint is not None:
        check_options(checkpoint, options)
    made = pipeline.iterate_to(folder, text, compute, method, out, restart=restart)
    for line in (*remarks(made), *slower_with(made, None, options)):
        say(line)
    document = {"out": str(out), "digest": made.digest, **made.provenance}
    result(document, lambda: show_plans({method.criterion: made}, {method.criterion: out}))

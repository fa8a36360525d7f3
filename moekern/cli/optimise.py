"""The command `optimise`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli.before_after import pairs_document, show_pairs
from moekern.cli.console import say
from moekern.cli.given import compute_of, folder_of, result, text_of
from moekern.cli.options import (
    Chunk,
    Column,
    Data,
    Device,
    DtypeOption,
    GpuMemory,
    Json,
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
    Thinking,
    ThinkingOption,
    Tokens,
    TrustRemoteCode,
    at_least,
)
from moekern.cli.recover import Top, top_of
from moekern.errors import InputError
from moekern.files import check_new, check_work, is_folder, standing, work_path, working

if TYPE_CHECKING:
    from moekern.data.text import Text
    from moekern.masks import Optimised, Search
    from moekern.model.compute import Compute
    from moekern.plan.document import Plan

WORK = "optimise"  # in the work folder
Rate = Annotated[
    float | None,
    typer.Option(help="The learning rate of the logits, or biases. Default: 0.1, or 0.03 for --method bias."),
]
MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        help="masks: masks are drawn, towards the original's predictions; bias: a bias an expert on the whole model's "
        "routers, trained on the next token, ranks (MoRA, arXiv:2610.00367; reconstructed of its abstract).",
    ),
]
Diversity = Annotated[float, typer.Option(help="With --method bias: weight of the entropy of the mean routing.")]
Every = Annotated[
    int | None,
    typer.Option(help="Steps from one look at held-back text to the next. Default: 20 looks.", callback=at_least(1)),
]
Budget = Annotated[
    str, typer.Option("--budget", help="uniform: each layer keeps as many as in PLAN; global: all of them together do.")
]


def optimise(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="The plan to begin with: which experts stay, and how many.")],
    out: Annotated[Path, typer.Option(help="The plan to write.")],
    data: Data = None,
    steps: Annotated[int, typer.Option(help="Steps, each a pass forward and back.", callback=at_least(1))] = 100,
    step_tokens: Annotated[int, typer.Option(help="Tokens of a step.", callback=at_least(1))] = 4096,
    masks: Annotated[int, typer.Option(help="Masks that share the tokens of a step.", callback=at_least(1))] = 4,
    rate: Rate = None,
    method: MethodOption = "masks",
    diversity: Diversity = 0.01,
    budget: Budget = "uniform",
    top: Top = "64",
    every: Every = None,
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = None,
    pack: Pack = True,
    chunk: Chunk = None,
    column: Column = None,
    thinking: ThinkingOption = Thinking.row,
    strict: Strict = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = "auto",
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    spill: Spill = None,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Choose which experts stay by gradient steps through the whole model, from a plan on, a decoder layer in memory.

    The masked model learns to predict what the original does. A tenth of the text chooses the best mask, and another
    one judges it. After a kill the same command goes on at the last look at held-back text.
    """
    from moekern.masks.settings import Search
    from moekern.plan.document import Plan

    search = Search(
        steps=steps, step_tokens=step_tokens, masks=masks, rate=rate, budget=budget,
        top=top_of(top), every=every, seed=seed, method=method, diversity=diversity,
    )  # fmt: skip
    search.check()
    given = Plan.load(plan)
    check_out(out)
    text = text_of(
        data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, thinking=thinking,
        strict=strict, pack=pack, chunk=chunk, seed=seed,
    )  # fmt: skip
    if not text.data:
        raise InputError("optimise: it takes its steps on text: give --data", kind="option")
    compute = compute_of(
        device=device, dtype=dtype, memory=memory, gpu_memory=gpu_memory, spill=spill or standing(out.parent),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    found = optimised(folder_of(model, revision), given, text, search, compute, out, restart=restart)
    result(document_of(found, out), lambda: show_optimised(found, given, out))


def check_out(out: Path) -> None:
    """Raise InputError unless the plan can be written there."""
    check_work(out)
    if not (os.path.lexists(out) and is_folder(work_path(out))):  # of a run that was killed when it had saved the plan
        check_new(out)


def optimised(
    folder: Path, plan: Plan, text: Text, search: Search, compute: Compute, out: Path, *, restart: bool
) -> Optimised:
    """Optimise and save. What a run that was stopped has left is used again."""
    from moekern.architectures import find_layout
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.cli import pipeline
    from moekern.cli.whole_recovery import changing_progress
    from moekern.masks import optimise

    checkpoint = open_checkpoint(folder)
    compute = pipeline.told_compute(compute, checkpoint, find_layout(checkpoint))
    data = text.read(checkpoint, trust_remote_code=compute.trust_remote_code)
    with working(out) as side:
        with changing_progress() as shown:
            found = optimise(
                checkpoint, plan, data, side / WORK, search, compute, restart=restart, tell=say, progress=shown
            )
        found.plan.save(out, new=True)
        shutil.rmtree(side / WORK)
    return found


def document_of(found: Optimised, out: Path) -> dict[str, Any]:
    losses = pairs_document({"held": found.held, "judged": found.judged})
    return {
        "out": str(out), "digest": found.plan.digest, "best": found.best, "steps": found.steps,
        "changed": found.changed, "curve": list(found.curve), "notes": list(found.notes), **losses,
    }  # fmt: skip


def show_optimised(found: Optimised, begun: Plan, out: Path) -> None:
    """How the losses fell, and how many experts changed."""
    pairs = {"chose the best mask": found.held, "decided nothing": found.judged}
    show_pairs(f"before -> after {found.best} steps", "text that no step was taken on", pairs)
    for note in found.notes:
        say(note)
    kept = sum(len(layer.keep) for layer in begun.layers.values())
    say(f"{out}: {found.changed} of {kept} experts that stay are others than in the plan that it began with")

"""The command `recover`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli import ranks
from moekern.cli.console import say, show
from moekern.cli.given import compute_of, result, text_of
from moekern.cli.options import (
    Chunk,
    Column,
    CopyMode,
    CopyOption,
    Data,
    Device,
    DtypeOption,
    GpuMemory,
    Json,
    Memory,
    Pack,
    Preset,
    Restart,
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
from moekern.errors import InputError
from moekern.files import sized, standing

if TYPE_CHECKING:
    from moekern.cli.whole_recovery import Recovered
    from moekern.model.compute import Compute
    from moekern.recovery import Training

Train = Annotated[
    str,
    typer.Option(
        help="What trains, some of bias, scale (a factor an expert), router, norms, lora, down, experts, all (but "
        "embeddings and head), separated by commas."
    ),
]
Kl = Annotated[float, typer.Option(help="Weight of KL to the original's predictions.")]
Next = Annotated[float, typer.Option(help="Weight of the loss of the next token.")]
Top = Annotated[
    str, typer.Option(help="The original's likeliest tokens that KL is over, 6 bytes each in a file; or vocabulary.")
]
Rate = Annotated[
    float | None, typer.Option(help="The learning rate's peak. Default: by what trains, and by the model's width.")
]
Epochs = Annotated[float, typer.Option(help="How often the text is gone through.")]
StepTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of a step. Default: 24 steps of 2048 to 65536 tokens.", callback=at_least(1)),
]
Warmup = Annotated[float, typer.Option(help="The share of steps in which the rate rises.")]
Floor = Annotated[float, typer.Option(help="The share of the rate that the last steps have; it falls by a cosine.")]
Clip = Annotated[float, typer.Option(help="The largest norm of the gradients.")]
Decay = Annotated[float, typer.Option(help="Weight decay of AdamW.")]
Every = Annotated[
    int | None,
    typer.Option(help="Steps from one look at held-back text to the next. Default: 10 looks.", callback=at_least(1)),
]
Patience = Annotated[int, typer.Option(help="Looks that may bring nothing before it ends.", callback=at_least(1))]
LoraRank = Annotated[int, typer.Option(help="With --train lora.", callback=at_least(1))]
LoraAlpha = Annotated[float, typer.Option(help="With --train lora: its product is scaled by alpha / rank.")]
LoraTargets = Annotated[str, typer.Option(help="With --train lora: attention, experts, linear; separated by commas.")]
EntropyOption = Annotated[
    float,
    typer.Option(
        help="Weight of the entropy of what routers choose from, a mean over tokens and layers (SEER-MoE, "
        "arXiv:2404.05089; reconstructed)."
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="Each token chooses so many experts in the end, as config.json then says; the number falls in the first "
        "half of the steps (SEER-MoE, arXiv:2404.05089; the schedule is reconstructed).",
        callback=at_least(1),
    ),
]


@dataclass(frozen=True)
class Options:
    """Of a training, as they are given."""

    train: str
    kl: float
    next: float
    top: str
    rate: float | None
    epochs: float
    step_tokens: int | None
    warmup: float
    floor: float
    clip: float
    decay: float
    every: int | None
    patience: int
    seed: int
    lora_rank: int
    lora_alpha: float
    lora_targets: str
    adapter: bool = False
    entropy: float = 0.0
    top_k: int | None = None

    def training(self) -> Training:
        """Raises InputError."""
        from moekern.recovery import Training

        given: dict[str, Any] = vars(self) | {name: _words(getattr(self, name)) for name in ("train", "lora_targets")}
        training = Training(**given | {"top": int(self.top) if self.top.isdecimal() else self.top})
        training.check()
        return training


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def recover(
    pruned: Annotated[Path, typer.Argument(help="The checkpoint folder whose weights train; it is only read.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    original: Annotated[
        str | None, typer.Option(help="The folder or hub id of the model that predicts what --kl trains towards.")
    ] = None,
    data: Data = None,
    train: Train = "all",
    kl: Kl = 1.0,
    next_token: Annotated[float, typer.Option("--next", help="Weight of the loss of the next token.")] = 0.0,
    top: Top = "64",
    rate: Rate = None,
    epochs: Epochs = 1.0,
    step_tokens: StepTokens = None,
    warmup: Warmup = 0.05,
    floor: Floor = 0.1,
    clip: Clip = 1.0,
    decay: Decay = 0.0,
    every: Every = None,
    patience: Patience = 5,
    lora_rank: LoraRank = 16,
    lora_alpha: LoraAlpha = 32.0,
    lora_targets: LoraTargets = "attention",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="With --train lora: write an adapter for peft instead of a checkpoint.")
    ] = False,
    entropy: EntropyOption = 0.0,
    top_k: TopK = None,
    preset: Preset = None,
    tokens: Tokens = "1M",
    sequence_length: SequenceLength = 2048,
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
    copy: CopyOption = CopyMode.auto,
    predictions: Annotated[
        Path | None,
        typer.Option(help="A folder for what the original predicts, kept for other runs on the same text."),
    ] = None,
    only_estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what it takes (time, memory, disk, reads), and do nothing.")
    ] = False,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train what a pruned model has left towards the original's predictions, a decoder layer in memory.

    A tenth of the text chooses the best state, and another one judges it. After a kill the same command goes on at the
    last look at held-back text.
    """
    options = Options(
        train, kl, next_token, top, rate, epochs, step_tokens, warmup, floor, clip, decay, every, patience, seed,
        lora_rank, lora_alpha, lora_targets, adapter, entropy, top_k,
    )  # fmt: skip
    training = options.training()

    from moekern.cli import whole_recovery
    from moekern.pruning.work_folder import check_target

    check_target(out, pruned)
    if only_estimate:
        _estimate(pruned, training, tokens, sequence_length, len(data or (1,)), compute_of(
            device=device, dtype=dtype, memory=memory, gpu_memory=gpu_memory, trust_remote_code=trust_remote_code,
            tell=False,
        ), out)  # fmt: skip
        return
    text = text_of(
        data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, thinking=thinking,
        strict=strict, pack=pack, chunk=chunk, seed=seed,
    )  # fmt: skip
    if not text.data:
        raise InputError("recover: it trains on text: give --data", kind="option")
    compute = ranks.together(compute_of(
        device=device, dtype=dtype, memory=memory, gpu_memory=gpu_memory, spill=spill or standing(out.parent),
        trust_remote_code=trust_remote_code,
    ))  # fmt: skip
    whole = None if original is None else ranks.folder_of(original, None, compute.team)
    done = whole_recovery.recover_stages(
        pruned, whole, text, training, compute, out, copy.value, predictions=predictions, restart=restart
    )
    result(done.document(), lambda: show_recovered(done))


def _estimate(
    pruned: Path, training: Training, tokens: str, sequence: int, domains: int, compute: Compute, out: Path
) -> None:
    """What training would take, where the original is as large as what is trained is."""
    from moekern.architectures import find_layout
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.cli.estimate import estimate_document, probed, show_estimate
    from moekern.data.mixes import parse_tokens
    from moekern.estimation.counted import Asked
    from moekern.recovery.estimated import recovered

    count = parse_tokens(tokens)
    if count is None:
        raise InputError("--tokens all: an estimate needs a number, such as 2M")
    checkpoint = open_checkpoint(pruned)
    layout = find_layout(checkpoint)
    job = probed(checkpoint, layout, compute, Asked(count, sequence, domains), standing(out.parent))
    stages = (recovered(job, training, 1.0),)
    result(estimate_document(job, stages), lambda: show_estimate(job, stages))


def show_recovered(done: Recovered) -> None:
    """How the losses fell, and what was written."""
    found = done.recovery
    rows = []
    for name, (before, after) in (("chose the best state", found.held), ("decided nothing", found.judged)):
        if before:
            count = sum(loss.tokens for loss in before.values())
            rows.append((f"{count} tokens that {name}", *done.pairs(before, after)))
    columns = ("text that is not trained on", "loss, nats a token", "KL to original", "same top-1")
    if rows:
        show(f"before -> after {found.best} steps", columns, rows)
    for note in found.notes:
        say(note)
    report = done.written
    if report is None:
        say(f"{done.out}: an adapter of {found.tensors} matrices for {done.base}; peft loads it on that checkpoint")
        return
    say(f"{found.tensors} tensors trained; {sized(report.bytes_out)} in {report.shards} files (--copy {report.copy})")
    say(f"{report.out}: load it as any checkpoint; moekern_recovery.json says how it was trained")

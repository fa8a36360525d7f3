"""The command `recover`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli import ranks
from moekern.cli.before_after import show_pairs
from moekern.cli.console import say
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
    from moekern.data.text import Text
    from moekern.model.compute import Compute
    from moekern.recovery import Training

Train = Annotated[
    str,
    typer.Option(
        help="What trains, some of bias, scale (a factor an expert), router, norms, lora, down, experts, all (but "
        "embeddings and head), separated by commas; or factors (experts as products and sparse rows, MC-SMoE)."
    ),
]
Kl = Annotated[float, typer.Option(help="Weight of KL to the original's predictions.")]
Next = Annotated[float, typer.Option("--next", help="Weight of the loss of the next token.")]
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
Adapter = Annotated[
    bool,
    typer.Option(
        "--adapter",
        help="Write an adapter for peft: with --train lora in the place of a checkpoint, with --train factors "
        "OUT-adapter, the products, beside OUT, which has the sparse rows alone.",
    ),
]
Temperature = Annotated[
    float, typer.Option(help="Of --kl; where it is not 1, over --top tokens alone, divided by their sum.")
]
FactorRatio = Annotated[
    float, typer.Option(help="With --train factors: the share of a matrix' numbers that its product holds.")
]
KeptRows = Annotated[
    float, typer.Option(help="With --train factors: the share of the rows beside products that is no zeros in the end.")
]
Original = Annotated[
    str | None, typer.Option(help="The folder or hub id of the model that predicts what --kl trains towards.")
]
Predictions = Annotated[
    Path | None, typer.Option(help="A folder for what the original predicts, kept for other runs on the same text.")
]
OnlyEstimate = Annotated[
    bool, typer.Option("--estimate", help="Say what it takes (time, memory, disk, reads), and do nothing.")
]
EntropyOption = Annotated[
    float,
    typer.Option(
        help="Weight of the entropy of what routers choose from, a mean over tokens and layers (SEER-MoE, "
        "arXiv:2404.05089; reconstructed)."
    ),
]
Answers = Annotated[
    bool,
    typer.Option(
        "--answers",
        help="Only answers have a loss: the last message of conversations, the answer of pairs of a question and it.",
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


def training_of(*, train: str, top: str, lora_targets: str = "attention", **given: Any) -> Training:
    """How options say that a model is trained. Raises InputError."""
    from moekern.recovery import Training

    words: dict[str, Any] = {"train": _words(train), "lora_targets": _words(lora_targets)}
    training = Training(**given, **words, top=top_of(top))
    training.check()
    return training


def top_of(top: str) -> int | str:
    """--top as a number; a word, which is checked where it is used."""
    return int(top) if top.isdecimal() else top


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def recover(
    pruned: Annotated[Path, typer.Argument(help="The checkpoint folder whose weights train; it is only read.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    original: Original = None,
    data: Data = None,
    train: Train = "all",
    kl: Kl = 1.0,
    next_token: Next = 0.0,
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
    adapter: Adapter = False,
    temperature: Temperature = 1.0,
    factor_ratio: FactorRatio = 0.25,
    kept_rows: KeptRows = 0.1,
    entropy: EntropyOption = 0.0,
    top_k: TopK = None,
    answers: Answers = False,
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
    copy: CopyOption = CopyMode.auto,
    predictions: Predictions = None,
    only_estimate: OnlyEstimate = False,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train what a pruned model has left towards the original's predictions, a decoder layer in memory.

    A tenth of the text chooses the best state, another one judges it. After a kill it goes on at the last look.
    """
    training = training_of(
        train=train, kl=kl, next=next_token, top=top, rate=rate, epochs=epochs, step_tokens=step_tokens, warmup=warmup,
        floor=floor, clip=clip, decay=decay, every=every, patience=patience, seed=seed, lora_rank=lora_rank,
        lora_alpha=lora_alpha, lora_targets=lora_targets, adapter=adapter, entropy=entropy, top_k=top_k,
        temperature=temperature, factor_ratio=factor_ratio, kept_rows=kept_rows,
    )  # fmt: skip

    from moekern.cli import whole_recovery

    whole_recovery.check_targets(out, pruned, training)
    text = text_of(data=data, preset=preset, tokens=tokens, sequence_length=sequence_length, column=column, pack=pack,
                   thinking=thinking, strict=strict, chunk=chunk, seed=seed, answers=answers)  # fmt: skip
    compute = compute_of(
        device=device, dtype=dtype, memory=memory, gpu_memory=gpu_memory, spill=spill or standing(out.parent),
        trust_remote_code=trust_remote_code, tell=not only_estimate,
    )  # fmt: skip
    if only_estimate:
        _estimate(pruned, training, text, compute, out)
        return
    if not text.data:
        raise InputError("recover: it trains on text: give --data", kind="option")
    compute = ranks.together(compute)
    whole = None if original is None else ranks.folder_of(original, None, compute.team)
    done = whole_recovery.recover_stages(
        pruned, whole, text, training, compute, out, copy.value, predictions=predictions, restart=restart
    )
    result(done.document(), lambda: show_recovered(done))


def _estimate(pruned: Path, training: Training, text: Text, compute: Compute, out: Path) -> None:
    """What training would take, where the original is as large as what is trained is."""
    from moekern.architectures import find_layout
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.cli.estimate import estimate_document, probed, show_estimate
    from moekern.data.text import length_for
    from moekern.estimation.counted import Asked
    from moekern.recovery.estimated import recovered

    if text.tokens is None:
        raise InputError("--tokens all: an estimate needs a number, such as 2M")
    checkpoint = open_checkpoint(pruned)
    asked = Asked(text.tokens, length_for(checkpoint, text.sequence_length), max(1, len(text.data)))
    job = probed(checkpoint, find_layout(checkpoint), compute, asked, standing(out.parent))
    stages = (recovered(job, training, 1.0),)
    result(estimate_document(job, stages), lambda: show_estimate(job, stages))


def show_recovered(done: Recovered) -> None:
    """How the losses fell, and what was written."""
    found = done.recovery
    pairs = {"chose the best state": found.held, "decided nothing": found.judged}
    show_pairs(f"before -> after {found.best} steps", "text that is not trained on", pairs, against=done.against)
    for note in found.notes:
        say(note)
    report = done.written
    if report is None:
        say(f"{done.out}: an adapter of {found.tensors} matrices for {done.base}; peft loads it on that checkpoint")
        return
    say(f"{found.tensors} tensors trained; {sized(report.bytes_out)} in {report.shards} files (--copy {report.copy})")
    if done.adapter is not None:
        say(f"{done.adapter}: the products, which peft loads on {report.out}: that has the sparse rows alone")
        return
    say(f"{report.out}: load it as any checkpoint; moekern_recovery.json says how it was trained")

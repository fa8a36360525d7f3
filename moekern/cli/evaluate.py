"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli.console import show
from moekern.cli.options import (
    BatchSize,
    Data,
    Device,
    DtypeOption,
    Json,
    Model,
    Pack,
    Revision,
    Seed,
    SequenceLength,
    Tokens,
    TrustRemoteCode,
    compute_of,
    folder_of,
    named_plans,
    result,
    text_of,
)

if TYPE_CHECKING:
    from moekern.evaluation.losses import Evaluation


def evaluate(
    model: Model,
    data: Data,
    plans: Annotated[list[Path] | None, typer.Argument(help="Plans to apply on the fly.")] = None,
    tokens: Tokens = None,
    sequence_length: SequenceLength = 2048,
    pack: Pack = True,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Held-out loss per domain of the original and of plans, in one pass over the weights."""
    from moekern.cli import pipeline
    from moekern.evaluation.losses import losses_document

    text = text_of(
        data=data, tokens=tokens, sequence_length=sequence_length, batch_size=batch_size, seed=seed, pack=pack
    )
    compute = compute_of(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    named = named_plans("evaluate", plans or [])
    losses = pipeline.evaluate_plans(folder_of(model, revision), text, compute, named)
    result(losses_document(losses), lambda: show_losses(losses))


def show_losses(table: Evaluation) -> None:
    """Loss per domain, a row a plan."""
    from moekern.evaluation.losses import mean_loss

    domains = list(next(iter(table.values())))
    rows = [
        (
            name,
            *(f"{row[d].nll:.4f}" for d in domains),
            f"{mean_loss({d: row[d].nll for d in domains}):.4f}",
            f"{mean_loss({d: row[d].kl for d in domains}):.4f}",
            f"{mean_loss({d: row[d].top1 for d in domains}):.1%}",
        )
        for name, row in table.items()
    ]
    show("held-out loss, nats per token", ("plan", *domains, "mean", "KL to original", "same top-1"), rows)

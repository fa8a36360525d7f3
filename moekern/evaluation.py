"""Held-out loss of a checkpoint and of plans applied to it on the fly, in one pass over its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moekern.architectures import Layout, find_layout
from moekern.checkpoint import Checkpoint, open_checkpoint
from moekern.data import Batch, TokenData
from moekern.decoder import LayerwiseModel, open_layerwise
from moekern.decoder.masking import masked_layer
from moekern.plan import Plan, check_plan

ORIGINAL = "original"


@dataclass(frozen=True)
class Loss:
    """Means over predicted tokens.

    nll and kl(original || plan) are in nats; top1 is the share of tokens whose likeliest is the original's.
    """

    nll: float
    kl: float
    top1: float
    tokens: int


Evaluation = Mapping[str, Mapping[str, Loss]]  # plan name (or "original") -> domain -> loss


@dataclass(frozen=True)
class MaskedTask:
    name: str
    dropped: Mapping[str, tuple[int, ...]]  # layer key -> dropped experts
    batch: Batch


def evaluate(
    source: str | Path | Checkpoint,
    data: TokenData,
    plans: Mapping[str, Plan],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Loss per domain of the original and of every plan, as if pruned: the dropped experts are masked out of selection.

    All plans share one pass over the weights; their hidden states are held at the same time, and the original's
    predictions of one batch.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    for plan in plans.values():
        check_plan(plan, layout, checkpoint.fingerprint)
    tasks = [
        MaskedTask(name, dropped_experts(layout, plan), batch)
        for batch in data.batches
        for name, plan in {ORIGINAL: None, **plans}.items()  # the original first: the others are held against it
    ]
    sums: dict[tuple[str, str], Tensor] = {}
    original: list[Tensor] = []

    def add(task: MaskedTask, logits: Tensor) -> None:
        predicted = logits[:, :-1].float().log_softmax(-1)
        if task.name == ORIGINAL:
            original[:] = [predicted]
        found = _compared(predicted, original[0], task.batch.input_ids[:, 1:].to(logits.device))
        key = task.name, task.batch.domain
        sums[key] = sums[key] + found if key in sums else found

    with open_layerwise(
        checkpoint, layout, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    ) as layerwise:
        run_masked(layerwise, tasks, add, progress)
    table: dict[str, dict[str, Loss]] = {name: {} for name in (ORIGINAL, *plans)}
    for (name, domain), total in sums.items():
        nll, kl, top1, count = total.tolist()
        table[name][domain] = Loss(nll / count, kl / count, top1 / count, int(count))
    return table


def dropped_experts(layout: Layout, plan: Plan | None) -> dict[str, tuple[int, ...]]:
    """Layer key -> the experts a plan drops; no plan drops none."""
    if plan is None:
        return {}
    return {
        key: tuple(sorted(set(range(layout.layers[key].num_experts)) - set(layer.keep)))
        for key, layer in plan.layers.items()
    }


def run_masked(
    layerwise: LayerwiseModel,
    tasks: list[MaskedTask],
    done: Callable[[MaskedTask, Tensor], None],
    progress: Callable[[int, int], None] = lambda finished, total: None,
) -> None:
    """Run tasks through the model, each with its own experts masked, and hand logits [B, S, V] to `done`."""
    model: Any = layerwise.model

    def forward(task: MaskedTask) -> None:
        done(task, model(input_ids=task.batch.input_ids.to(layerwise.device), use_cache=False).logits)

    @contextmanager
    def entering(task: MaskedTask, layer: int) -> Iterator[None]:
        key = layerwise.moe_keys.get(layer)
        if key is None:
            yield
            return
        dropped = task.dropped.get(key, ())
        with masked_layer(layerwise.loader, layerwise.layout.layers[key], layerwise.layers[layer], dropped):
            yield

    layerwise.run(tasks, forward, entering=entering, progress=lambda i: progress(i + 1, len(layerwise.layers)))


def _compared(predicted: Tensor, original: Tensor, wanted: Tensor) -> Tensor:
    """Sums over a batch's tokens, float64: -log p of those wanted [B, S], KL, equal likeliest tokens, tokens.

    predicted and original are log probabilities [B, S, V]; a sequence is looked at at a time.
    """
    total = torch.zeros(4, dtype=torch.float64)
    for mine, theirs, ids in zip(predicted, original, wanted, strict=True):
        total[0] -= float(mine.gather(1, ids[:, None]).double().sum())
        total[1] += float(F.kl_div(mine, theirs, reduction="none", log_target=True).sum(1).double().sum())
        total[2] += int((mine.argmax(1) == theirs.argmax(1)).sum())
        total[3] += len(ids)
    return total

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
    """Mean negative log likelihood in nats per predicted token."""

    nll: float
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

    All plans share one pass over the weights; their hidden states are held at the same time.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    for plan in plans.values():
        check_plan(plan, layout, checkpoint.fingerprint)
    tasks = [
        MaskedTask(name, dropped_experts(layout, plan), batch)
        for name, plan in {ORIGINAL: None, **plans}.items()
        for batch in data.batches
    ]
    sums: dict[tuple[str, str], tuple[float, int]] = {}

    def add(task: MaskedTask, logits: Tensor) -> None:
        loss, count = _loss(logits, task.batch.input_ids.to(logits.device))
        before = sums.get((task.name, task.batch.domain), (0.0, 0))
        sums[task.name, task.batch.domain] = (before[0] + loss, before[1] + count)

    with open_layerwise(
        checkpoint, layout, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    ) as layerwise:
        run_masked(layerwise, tasks, add, progress)
    table: dict[str, dict[str, Loss]] = {name: {} for name in (ORIGINAL, *plans)}
    for (name, domain), (total, count) in sums.items():
        table[name][domain] = Loss(total / count, count)
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


def _loss(logits: Tensor, input_ids: Tensor) -> tuple[float, int]:
    """Summed negative log likelihood of tokens 1.. given those before, and how many they are."""
    total = 0.0
    for row, ids in zip(logits, input_ids, strict=True):
        total += float(F.cross_entropy(row[:-1].float(), ids[1:], reduction="none").double().sum())
    return total, input_ids.shape[0] * (input_ids.shape[1] - 1)

"""Held-out loss of a checkpoint and of plans applied to it on the fly, in one pass over its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moekern.architectures import find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.model.compute import Compute
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.pruned_layers import LivePruner
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan

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
class Task:
    name: str
    number: int  # of the plan, the original first
    plan: Plan | None
    batch: Batch


def evaluate(
    source: str | Path | Checkpoint,
    data: TokenData,
    plans: Mapping[str, Plan],
    compute: Compute = Compute(),
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Loss per domain of the original and of every plan: layers are pruned in memory, with the bits of the checkpoint
    that the plan makes.

    All plans share one pass over the weights; their hidden states are held at the same time, and the original's
    predictions of one batch.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    for plan in plans.values():
        check_plan(plan, layout, checkpoint.fingerprint)
    tasks = [  # of each batch the original first: the others are held against it
        Task(name, number, plan, batch)
        for batch in data.batches
        for number, (name, plan) in enumerate({ORIGINAL: None, **plans}.items())
    ]
    sums: dict[tuple[str, str], Tensor] = {}
    original: list[Tensor] = []

    def add(task: Task, logits: Tensor) -> None:
        predicted = logits[:, :-1].float().log_softmax(-1)
        if task.name == ORIGINAL:
            original[:] = [predicted]
        found = _compared(predicted, original[0], task.batch.input_ids[:, 1:].to(logits.device))
        key = task.name, task.batch.domain
        sums[key] = sums[key] + found if key in sums else found

    with open_layerwise(checkpoint, layout, compute) as layerwise:
        _run(layerwise, tasks, add, progress)
    table: dict[str, dict[str, Loss]] = {name: {} for name in (ORIGINAL, *plans)}
    for (name, domain), total in sums.items():
        nll, kl, top1, count = total.tolist()
        table[name][domain] = Loss(nll / count, kl / count, top1 / count, int(count))
    return table


def _run(
    layerwise: LayerwiseModel,
    tasks: list[Task],
    done: Callable[[Task, Tensor], None],
    progress: Callable[[int, int], None],
) -> None:
    """Run tasks through the model, each with its plan applied, and hand logits [B, S, V] to `done`, batch by batch."""
    model: Any = layerwise.model

    def forward(task: Task) -> None:
        done(task, model(input_ids=task.batch.input_ids.to(layerwise.device), use_cache=False).logits)

    with ExitStack() as stack:
        applied = _Applied(layerwise, len(tasks), LivePruner(layerwise.loader, layerwise.layout), stack)
        layerwise.run(
            tasks,
            forward,
            entering=applied.entering,
            group=lambda task: task.number,
            progress=lambda i: progress(i + 1, len(layerwise.layers)),
        )


@dataclass
class _Applied:
    """Keeps one plan at a time applied to the layer that runs, for as many tasks in a row as are of that plan."""

    layerwise: LayerwiseModel
    tasks: int
    pruner: LivePruner
    stack: ExitStack
    now: tuple[int, int] | None = None  # layer, plan number
    passed: int = 0  # tasks that went through the layer

    @contextmanager
    def entering(self, task: Task, layer: int) -> Iterator[None]:
        key = self.layerwise.moe_keys.get(layer)
        if key is None:
            yield
            return
        if self.now != (layer, task.number):
            self.stack.close()
            self.now = layer, task.number
            if task.plan is not None:
                self.stack.enter_context(self.pruner.pruned(key, task.plan.layers[key].keep))
        yield
        self.passed += 1
        if self.passed == self.tasks:  # before the layer's weights go
            self.stack.close()
            self.now, self.passed = None, 0


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


def mean_loss(row: Mapping[str, float]) -> float:
    """Mean over domains, each counting the same."""
    return sum(row.values()) / len(row)


def losses_document(table: Evaluation) -> dict[str, Any]:
    """The same as JSON."""
    return {
        name: {d: {"nll": loss.nll, "kl": loss.kl, "top1": loss.top1, "tokens": loss.tokens} for d, loss in row.items()}
        for name, row in table.items()
    }

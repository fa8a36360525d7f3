"""The oracle on a real checkpoint: the pruned model's logits against the original's with the dropped experts masked;
layers that were refitted are pruned and refitted in memory instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern.architectures import Layout, find_layout
from moekern.architectures.substitution import as_whole
from moekern.calibration.passes import Progress, Steps
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.checkpoint.recovery import read_recovery
from moekern.data.batches import Batch
from moekern.errors import InputError, check_type
from moekern.model.compute import Compute
from moekern.model.finite import NotFinite
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.masking import WHOLE, Channels, masked_layer
from moekern.model.pruned_layers import LivePruner
from moekern.model.substituted import substituted_layer
from moekern.model.walk import Pass
from moekern.plan.channels import channel_rows
from moekern.plan.constants import Live, stored_constants
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.refit import refit_of
from moekern.verification.refitted_layers import RefittedLayers, refitted_layers

# Both sides do the same arithmetic up to the order of sums over experts, so float32 leaves only rounding.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE_TOLERANCE = 0.25  # 16-bit types: one unit in the last place of a logit, and what layers make of it


@dataclass(frozen=True)
class ForwardVerdict:
    """Largest logit difference over all tokens, and what it is measured against."""

    max_difference: float
    logit_std: float  # of the masked original
    top1_agreement: float  # share of tokens whose likeliest next token is the same
    tokens: int
    dtype: str
    tolerance: float  # on max_difference / logit_std

    @property
    def equal(self) -> bool:
        return self.max_difference <= self.tolerance * max(self.logit_std, 1e-6)


def compare_forward(
    source: str | Path | Checkpoint,
    plan: Plan,
    pruned: str | Path | Checkpoint,
    batches: tuple[Batch, ...] | None = None,
    *,
    compute: Compute = Compute(),
    progress: Progress = lambda done, total: None,
) -> ForwardVerdict:
    """Stream both models over `batches` (None: seeded random tokens) and compare logits.

    `progress` counts the layers of both; the one at work by the share of batches that are through it.

    Experts that a plan replaces return, in the original, the constants that the pruned checkpoint holds. The dtype
    "auto" means float32 here, in quantised checkpoints too. All logits are held on the CPU. Raises InputError for a
    checkpoint with trained tensors, which nothing equals.
    """
    check_type("plan", plan, Plan)
    before = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    after = pruned if isinstance(pruned, Checkpoint) else open_checkpoint(pruned)
    if (recovery := read_recovery(after.folder)) is not None:
        raise InputError(not_compared(after.name, len(recovery["tensors"])))
    chosen = compute.torch_dtype or torch.float32
    logits: dict[str, list[Tensor]] = {}
    whole, replaced = as_whole(after)
    constants, after = stored_constants(after, replaced) if replaced else None, whole
    refitted = None
    if refit_of(plan) is not None:
        refitted = refitted_layers(plan, after, find_layout(after), replace(compute, dtype=chosen))
    for side, checkpoint, applied in (("masked", before, plan), ("pruned", after, None)):
        layout = find_layout(checkpoint)
        if applied is not None:
            check_plan(applied, layout, checkpoint, replaced=True)
        with open_layerwise(checkpoint, layout, replace(compute, dtype=chosen)) as layerwise:
            batches = batches or random_batches(layerwise.vocab_size)
            masks = (dropped_experts(layout, applied), kept_channels(applied)) if constants is None else ({}, {})
            tasks = [MaskedTask(side, *masks, batch) for batch in batches]
            layers = len(layerwise.layers)
            step = Steps(progress, 2 * layers, len(logits) * layers)
            masked = _Masked(layerwise, len(tasks), step, refitted if applied else None, constants)
            with masked.applied:
                layerwise.run(tasks, masked)
            logits[side] = masked.logits
    return _verdict(logits["masked"], logits["pruned"], chosen)


def not_compared(what: str, trained: int) -> str:
    """Why the logits of a checkpoint with trained tensors are not compared."""
    return f"{what}: {trained} tensors were trained after pruning, so its logits are not those of the masked original"


def random_batches(vocab_size: int, *, sequences: int = 4, length: int = 64, seed: int = 0) -> tuple[Batch, ...]:
    """Seeded random token ids, for checkpoints without text at hand."""
    generator = torch.Generator().manual_seed(seed)
    return (Batch("random", torch.randint(vocab_size, (sequences, length), generator=generator)),)


def _verdict(masked: list[Tensor], pruned: list[Tensor], dtype: torch.dtype) -> ForwardVerdict:
    differences, agreed, tokens = [], 0, 0
    for a, b in zip(masked, pruned, strict=True):
        differences.append(float((a - b).masked_fill_(a == b, 0).abs().max()))  # where both are -inf too
        agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
        tokens += a[..., 0].numel()
    return ForwardVerdict(
        max_difference=max(differences),
        logit_std=float(torch.cat([a[a.isfinite()] for a in masked]).std()),
        top1_agreement=agreed / tokens,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        tolerance=TOLERANCE.get(dtype, COARSE_TOLERANCE),
    )


@dataclass(frozen=True)
class MaskedTask:
    name: str
    dropped: Mapping[str, tuple[int, ...]]  # layer key -> dropped experts
    channels: Mapping[str, Channels]  # layer key -> of experts that lose some
    batch: Batch


def dropped_experts(layout: Layout, plan: Plan | None) -> dict[str, tuple[int, ...]]:
    """Layer key -> the experts a plan drops; no plan drops none."""
    if plan is None:
        return {}
    return {
        key: tuple(sorted(set(range(layout.layers[key].num_experts)) - set(layer.keep)))
        for key, layer in plan.layers.items()
    }


def kept_channels(plan: Plan | None) -> dict[str, Channels]:
    """Layer key -> the channels of kept experts, where a plan says which stay."""
    return {
        key: dict(zip(layer.keep, torch.from_numpy(channel_rows(layer.channels)), strict=True))
        for key, layer in (plan.layers.items() if plan is not None else ())
        if layer.channels
    }


class _Masked(Pass[MaskedTask]):
    """Every task with its own experts masked; its logits [B, S, V] are held on the CPU. Refitted layers are pruned."""

    def __init__(
        self,
        layerwise: LayerwiseModel,
        tasks: int,
        step: Steps,
        refitted: RefittedLayers | None,
        constants: Live | None = None,
    ) -> None:
        self.constants = constants
        self.layerwise, self.tasks, self.step, self.before = layerwise, tasks, step, step.done
        self.refitted, self.applied = refitted, ExitStack()
        self.pruner = LivePruner(layerwise.loader, layerwise.layout)
        if refitted is not None:
            layerwise.check_whole("what refitted layers compute")
        self.logits: list[Tensor] = []
        self.through = 0  # tasks that have left the layer

    def started(self) -> None:
        self.logits.clear()
        self.applied.close()
        self.through, self.step.done = 0, self.before

    def forward(self, task: MaskedTask) -> None:
        logits = self.layerwise.compute(task.batch).logits
        if not bool(logits.max() < torch.inf):  # NaN is not, either; a head may mask tokens by -inf
            raise NotFinite(len(self.layerwise.layers))
        self.logits.append(logits.float().cpu())

    def name(self, task: MaskedTask) -> str:
        return f"the {task.name} model"

    @contextmanager
    def entering(self, task: MaskedTask, layer: int) -> Iterator[None]:
        with self._masked(task, layer):
            yield
        if layer >= 0:
            self.through += 1
            self.step.within(self.through / (self.tasks * self.layerwise.visits(layer)))

    def _masked(self, task: MaskedTask, layer: int) -> AbstractContextManager[Any]:
        model, key = self.layerwise, self.layerwise.moe_keys.get(layer)
        if key is None or (self.refitted is not None and key in self.refitted.names):
            return nullcontext()
        if self.constants is not None:
            experts = model.layout.layers[key].num_experts
            return substituted_layer(model.layers[layer], key, experts, self.constants(key))
        dropped, channels = task.dropped.get(key, ()), task.channels.get(key, WHOLE)
        return masked_layer(model.loader, model.layout.layers[key], model.layers[layer], dropped, channels)

    def loaded(self, layer: int) -> None:
        self.step.within(0)
        key = self.layerwise.moe_keys.get(layer)
        if key is not None and self.refitted is not None and key in self.refitted.names:
            self.applied.enter_context(self.refitted.applied(self.layerwise, self.pruner, key))

    def held(self, layer: int) -> Sequence[int] | None:
        return self.pruner.held.get(self.layerwise.moe_keys.get(layer, ""))

    def done(self, layer: int) -> None:
        self.applied.close()  # before the layer's weights go
        self.through = 0
        self.step()

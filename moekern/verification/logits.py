"""The oracle on a real checkpoint: the pruned model's logits against the original's with the dropped experts masked;
layers that were refitted are pruned and refitted in memory instead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from moekern.model.batch_groups import batch_groups
from moekern.model.compute import Compute
from moekern.model.finite import NotFinite
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.masking import WHOLE, Channels, masked_layer
from moekern.model.pruned_layers import LivePruner
from moekern.model.states import States
from moekern.model.substituted import substituted_layer
from moekern.model.walk import Pass
from moekern.plan.channels import channel_rows
from moekern.plan.constants import Live, stored_constants
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.refit import refit_of
from moekern.verification.held_logits import Compared, HeldLogits
from moekern.verification.refitted_layers import RefittedLayers, refitted_layers

# Both sides do the same arithmetic up to the order of sums over experts, so float32 leaves only rounding.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE_TOLERANCE = 0.25  # 16-bit types: one unit in the last place of a logit, and what layers make of it
LOGITS = "logits"
LOG = logging.getLogger(__name__)
Made = Callable[[int, Tensor], None]  # of a batch, by its place


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
    "auto" means float32 here, in quantised checkpoints too. Logits of the original wait in memory, beyond half of what
    is there for hidden states in a file; text that there is no room for is compared in groups of batches, two passes
    over the weights each, with the same numbers. Raises InputError for a checkpoint with trained tensors, which nothing
    equals, and NoRoomForText where there is no room for a single batch.
    """
    check_type("plan", plan, Plan)
    before = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    after = pruned if isinstance(pruned, Checkpoint) else open_checkpoint(pruned)
    if (recovery := read_recovery(after.folder)) is not None:
        raise InputError(not_compared(after.name, len(recovery["tensors"])))
    compute = replace(compute, dtype=compute.torch_dtype or torch.float32)
    whole, replaced = as_whole(after)
    constants, after = stored_constants(after, replaced) if replaced else None, whole
    check_plan(plan, find_layout(before), before, replaced=True)
    refitted = None
    if refit_of(plan) is not None:
        refitted = refitted_layers(plan, after, find_layout(after), compute)
    run = _Comparison(before, after, plan, compute, progress, constants, refitted)
    return run.verdict(batches)


@dataclass
class _Comparison:
    """Both models, and how far they are: in groups of batches, of each the masked original first."""

    before: Checkpoint
    after: Checkpoint
    plan: Plan
    compute: Compute
    progress: Progress
    constants: Live | None
    refitted: RefittedLayers | None
    done: int = 0  # batches
    passed: int = 0  # groups

    def verdict(self, batches: Sequence[Batch] | None) -> ForwardVerdict:
        found: list[Compared] = []
        while batches is None or self.done < len(batches):
            with ExitStack() as stack:
                with open_layerwise(self.before, find_layout(self.before), self.compute) as layerwise:
                    batches = batches or random_batches(layerwise.vocab_size)
                    held, part, step = self._masked(layerwise, batches, stack)
                with open_layerwise(self.after, find_layout(self.after), self.compute) as layerwise:
                    layerwise.expect(sum(batches[place].input_ids.numel() for place in part))
                    self._run(
                        layerwise, [MaskedTask("pruned", {}, {}, batches[n], n) for n in part], step, held.compare
                    )
            found += [held.found[place] for place in part]
            self.done, self.passed = part.stop, self.passed + 1
        return _verdict(Compared.joined(found), self.compute.torch_dtype)

    def _masked(
        self, opened: LayerwiseModel, batches: Sequence[Batch], stack: ExitStack
    ) -> tuple[HeldLogits, range, Steps]:
        """The original's logits of as many of the batches that are not done as there is room for, until the stack is
        closed; which these are; and how far both models are, its own pass done."""
        layerwise = replace(opened, reserved=opened.takes.room // 2)
        token = layerwise.vocab_size * layerwise.loader.dtype.itemsize
        sizes = [batch.input_ids.numel() for batch in batches[self.done :]]
        groups, lacks = batch_groups(layerwise, sizes, token, LOGITS, layerwise.reserved)
        if lacks is not None and not self.passed:
            LOG.info(f"{lacks}: it is compared in {len(groups)} groups, each a pass over the weights of both models")
        part = range(self.done, self.done + len(groups[0]))
        tokens = sum(sizes[: len(part)])
        layerwise.expect(tokens, tokens * token, LOGITS, layerwise.reserved)
        layers = 2 * len(layerwise.layers)
        step = Steps(self.progress, (self.passed + len(groups)) * layers, self.passed * layers)
        dropped = dropped_experts(opened.layout, self.plan)
        masks = (dropped, kept_channels(self.plan)) if self.constants is None else ({}, {})
        held = HeldLogits(stack.enter_context(States(layerwise.reserved, layerwise.spill)))
        self._run(
            layerwise, [MaskedTask("masked", *masks, batches[n], n) for n in part], step, held.keep, self.refitted
        )
        return held, part, step

    def _run(
        self,
        layerwise: LayerwiseModel,
        tasks: Sequence[MaskedTask],
        step: Steps,
        made: Made,
        refitted: RefittedLayers | None = None,
    ) -> None:
        masked = _Masked(layerwise, len(tasks), step, made, refitted, self.constants)
        with masked.applied:
            layerwise.run(tasks, masked)


def _verdict(found: Compared, dtype: torch.dtype | None) -> ForwardVerdict:
    assert dtype is not None
    return ForwardVerdict(
        max_difference=found.difference,
        logit_std=found.std,
        top1_agreement=found.agreed / found.tokens,
        tokens=found.tokens,
        dtype=str(dtype).removeprefix("torch."),
        tolerance=TOLERANCE.get(dtype, COARSE_TOLERANCE),
    )


def not_compared(what: str, trained: int) -> str:
    """Why the logits of a checkpoint with trained tensors are not compared."""
    return f"{what}: {trained} tensors were trained after pruning, so its logits are not those of the masked original"


def random_batches(vocab_size: int, *, sequences: int = 4, length: int = 64, seed: int = 0) -> tuple[Batch, ...]:
    """Seeded random token ids, for checkpoints without text at hand."""
    generator = torch.Generator().manual_seed(seed)
    return (Batch("random", torch.randint(vocab_size, (sequences, length), generator=generator)),)


@dataclass(frozen=True)
class MaskedTask:
    name: str
    dropped: Mapping[str, tuple[int, ...]]  # layer key -> dropped experts
    channels: Mapping[str, Channels]  # layer key -> of experts that lose some
    batch: Batch
    place: int  # of the batch


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
    """Every task with its own experts masked; its logits [B, S, V] are given away. Refitted layers are pruned."""

    def __init__(
        self,
        layerwise: LayerwiseModel,
        tasks: int,
        step: Steps,
        made: Made,
        refitted: RefittedLayers | None,
        constants: Live | None,
    ) -> None:
        self.made, self.constants = made, constants
        self.layerwise, self.tasks, self.step, self.before = layerwise, tasks, step, step.done
        self.refitted, self.applied = refitted, ExitStack()
        self.pruner = LivePruner(layerwise.loader, layerwise.layout)
        if refitted is not None:
            layerwise.check_whole("what refitted layers compute")
        self.through = 0  # tasks that have left the layer

    def started(self) -> None:
        self.applied.close()
        self.through, self.step.done = 0, self.before

    def forward(self, task: MaskedTask) -> None:
        logits = self.layerwise.compute(task.batch).logits
        if not bool(logits.max() < torch.inf):  # NaN is not, either; a head may mask tokens by -inf
            raise NotFinite(len(self.layerwise.layers))
        self.made(task.place, logits)

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

"""One ruler for models of every form: losses on one text, beside the same original, and bytes a routed weight.

Plans are evaluated in memory, as `moekern evaluate` does. A folder is held against what the original predicts of the
text, which lies in a file (4 bytes a predicted token and entry of the vocabulary), in one pass over the folder's
weights. Whatever measures, the original's loss of every sequence must be the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from moekern.architectures import Layout, find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL, Evaluation, Loss, Row, means
from moekern.evaluation.predictions import compared
from moekern.model.compute import Compute
from moekern.model.finite import NotFinite, all_finite
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.walk import Pass
from moekern.plan.document import Plan
from moekern.recovery.course import Sample
from moekern.recovery.settings import VOCABULARY
from moekern.recovery.taught import taught
from moekern.recovery.teacher import Teacher

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
APART = 1e-4  # of a sequence's loss: what two ways through the same weights may differ by
Task = tuple[int, Batch]


@dataclass(frozen=True)
class Ruler:
    """judged: the text, in chunks, that nothing else has seen. work: a folder for what the original predicts of it."""

    checkpoint: Checkpoint
    judged: TokenData
    work: Path
    compute: Compute

    @cached_property
    def original(self) -> Row:
        """Losses of the unpruned model."""
        return evaluate(self.checkpoint, self.judged, {}, self.compute)[ORIGINAL]

    def plans(self, plans: Mapping[str, Plan], statistics: Path | None = None) -> Evaluation:
        """Losses of plans, in one pass; `statistics` give their constants."""
        return self.checked(evaluate(self.checkpoint, self.judged, plans, self.compute, statistics=statistics))

    def folder(self, folder: Path) -> Row:
        """Losses of a checkpoint whose vocabulary is the original's."""
        checkpoint = open_checkpoint(folder)
        with open_layerwise(checkpoint, find_layout(checkpoint), self.compute, self.compute.team) as layerwise:
            found = _Held(layerwise, self._teacher).run(self.judged.batches)
        names = (ORIGINAL, str(folder))
        rows = (
            (name, batch.domain, found[place][n])
            for place, batch in enumerate(self.judged.batches)
            for n, name in enumerate(names)
        )
        return self.checked(means(names, rows))[str(folder)]

    def checked(self, found: Evaluation) -> Evaluation:
        """The same. Raises AssertionError where its original is not this one: another text, or another way to count."""
        same(found[ORIGINAL], self.original)
        return found

    @cached_property
    def _teacher(self) -> Teacher:
        with open_layerwise(self.checkpoint, find_layout(self.checkpoint), self.compute, self.compute.team) as whole:
            classes = whole.vocab_size
        samples = [Sample(place, batch) for place, batch in enumerate(self.judged.batches)]
        return taught(self.checkpoint, samples, self.work, VOCABULARY, self.compute, classes)


def same(found: Row, original: Row) -> None:
    """Raise AssertionError unless both are losses of one model on the same sequences."""
    assert found.keys() == original.keys(), (found.keys(), original.keys())
    for domain, loss in found.items():
        mine, theirs = loss.sums, original[domain].sums
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine[:, 3], theirs[:, 3]), f"{domain}: other tokens"
        torch.testing.assert_close(mine[:, 0], theirs[:, 0], rtol=APART, atol=0, msg=lambda m, d=domain: f"{d}: {m}")


class _Held(Pass[Task]):
    """A model held against what the original predicts: of each batch the sums of the original and of the model."""

    def __init__(self, layerwise: LayerwiseModel, teacher: Teacher) -> None:
        self.layerwise, self.teacher = layerwise, teacher
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, batches: Sequence[Batch]) -> Mapping[int, tuple[Tensor, Tensor]]:
        tasks = list(enumerate(batches))
        self.layerwise.expect(sum(batch.input_ids.numel() for batch in batches))
        self.layerwise.run(tasks, self)
        return self.found

    def forward(self, task: Task) -> None:
        place, batch = task
        predicted = self.layerwise.compute(batch).logits[:, :-1]
        original = self.teacher.of(place).logp.to(predicted.device).view(*predicted.shape[:2], -1)
        wanted = batch.input_ids[:, 1:].to(predicted.device)
        found = compared(predicted, original, wanted)
        if not all_finite(found):
            raise NotFinite(len(self.layerwise.layers))
        self.found[place] = compared(original, original, wanted), found

    def name(self, task: Task) -> str:
        return f"domain {task[1].domain}"


@dataclass(frozen=True)
class Routed:
    """The routed weights of a model: how many numbers they are, layer by layer, and their bytes."""

    layout: Layout
    numbers: int
    layers: Mapping[str, int]  # layer -> bytes of its experts
    constant: int  # bytes of one vector that stands for an expert

    @staticmethod
    def of(checkpoint: Checkpoint) -> Routed:
        """Raises InputError for experts that are quantised already."""
        layout, numbers, layers, constant = find_layout(checkpoint), 0, dict[str, int](), 0
        for key, layer in layout.layers.items():
            layers[key] = 0
            for tensor in layer.of_role("expert"):
                entry = checkpoint.tensors[tensor.name]
                if entry.dtype not in ITEM_BYTES:
                    what = f"{tensor.name} is {entry.dtype}: the ruler counts from weights that are not quantised"
                    raise InputError(f"{checkpoint.folder}: {what}; give the original that they were made from")
                numbers, layers[key] = numbers + math.prod(entry.shape), layers[key] + entry.nbytes
                if tensor.projection == "down" and not tensor.is_bias and layer.width:
                    experts = 1 if tensor.expert is not None else layer.num_experts
                    constant = entry.nbytes // (experts * layer.width)
        return Routed(layout, numbers, layers, constant)

    def bits(self, plan: Plan) -> float:
        """Of what a plan keeps, with its constants, for each routed weight of the original."""
        narrow = 1.0 if plan.width is None or self.layout.width is None else plan.width / self.layout.width
        total = 0.0
        for key, nbytes in self.layers.items():
            experts = self.layout.layers[key].num_experts
            kept = len(plan.layers[key].keep) if key in plan.layers else experts
            total += nbytes * kept / experts * narrow
            total += self.constant * (experts - kept) if plan.replace is not None and plan.replace.tier else 0
        return 8 * total / self.numbers


def row_of_sums(sums: Mapping[str, Sequence[float]], tokens: Mapping[str, Sequence[int]]) -> dict[str, Loss]:
    """KL alone, by sequence, as `evaluation.losses.difference` takes it."""
    rows = {}
    for domain, found in sums.items():
        table = torch.zeros(len(found), 4, dtype=torch.float64)
        table[:, 1], table[:, 3] = torch.tensor(found), torch.tensor(tokens[domain])
        rows[domain] = Loss(0, float(table[:, 1].sum() / table[:, 3].sum()), 0, int(table[:, 3].sum()), sums=table)
    return rows

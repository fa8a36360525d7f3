"""Held-out loss of a checkpoint and of plans applied to it on the fly, in one pass over its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern.architectures import find_layout
from moekern.architectures.substitution import as_whole
from moekern.calibration.sharing import facts_of
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import TokenData
from moekern.data.text import check_data
from moekern.errors import InputError, check_type, memory_for
from moekern.evaluation.losses import ORIGINAL, Evaluation, compared, means
from moekern.evaluation.under_plans import Task, UnderPlans, check_plans
from moekern.model.compute import Compute
from moekern.model.finite import NotFinite, all_finite
from moekern.model.journal import Resume, opened, removed
from moekern.model.layerwise import open_layerwise
from moekern.model.position import digest, text_key
from moekern.model.precision import settled
from moekern.plan.constants import Live, constants_digest, live_constants, measured, stored_constants
from moekern.plan.document import Plan
from moekern.statistics.file import Statistics
from moekern.version import versions

STATE = "moekern-evaluate-"  # and a digest: the folder of a run that is not done


def evaluate(
    source: str | Path | Checkpoint,
    data: TokenData,
    plans: Mapping[str, Plan],
    compute: Compute = Compute(),
    *,
    statistics: str | Path | None = None,
    resume: Resume | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> Evaluation:
    """Loss per domain of the original and of every plan: layers are pruned in memory, with the bits of the checkpoint
    that the plan makes. Where a plan replaces dropped experts, they return their constants, which `statistics` give
    where they are no zeros; the original may be a checkpoint whose experts are such constants.

    All plans share one pass over the weights; their hidden states are held at the same time, and the original's
    predictions of one batch. Text that there is no room for is taken in groups of batches, a pass over the weights
    each, to the same bits. With `resume` the same call goes on where it was stopped: its folder holds one of a name
    of its own for each model, text, plans and options. Several processes (`compute.team`) share the batches, and rank 0
    has the losses: the same bits. Raises InputError for plans as `check_plans` does, and for data without batches.
    """
    check_type("plans", plans, Mapping)
    check_type("compute", compute, Compute)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    check_data(data, checkpoint)
    predicted = {batch.domain for batch in data.batches if batch.input_ids[:, 1:].numel()}
    for domain in data.tokens or ["of no name"]:
        if domain not in predicted:
            raise InputError(f"evaluate: domain {domain}: no sequence of two tokens, so none is predicted", kind="data")
    checkpoint, constants, made_of = with_constants(checkpoint, plans, statistics)
    layout = find_layout(checkpoint)
    compute = settled(compute, checkpoint, layout)
    team = compute.team
    team.together(evaluate, checkpoint.folder, data, plans, compute, statistics=statistics)
    team.check_alike(facts_of(checkpoint, compute))
    key = _key(checkpoint, data, plans, compute) | made_of
    if resume is not None:
        resume = replace(resume, folder=resume.folder / f"{STATE}{digest(key)[:16]}")
    with (
        opened(resume, key, ("evaluating",), team) as journal,
        open_layerwise(checkpoint, layout, compute, team) as layerwise,
    ):
        stage = None if journal is None else journal.stage("evaluating")
        found = _Compare(layerwise, data.batches, plans, progress, constants).run(stage)
    if journal is not None and team.first:
        removed(journal.folder)
    names = (ORIGINAL, *plans)
    places = enumerate(data.batches if team.first else ())  # in this order whatever ranks and passes there were
    return means(names, ((name, b.domain, found[p, n]) for p, b in places for n, name in enumerate(names)))


def with_constants(
    checkpoint: Checkpoint, plans: Mapping[str, Plan], source: str | Path | None
) -> tuple[Checkpoint, dict[str, Live], dict[str, Any]]:
    """The checkpoint with all experts; by the name of a plan, or the original, what experts return that are constants;
    and what decides these, in words for people. Raises InputError for a plan that does not fit, or whose constants
    cannot be made."""
    original = checkpoint
    checkpoint, layers = as_whole(checkpoint)
    if layers and plans:
        what = "its dropped experts are constants already, and plans are for the original"
        raise InputError(f"{checkpoint.folder}: {what}; evaluate it alone")
    layout, read = find_layout(checkpoint), None
    check_plans(plans, layout, checkpoint, replaced=True)
    found = {ORIGINAL: stored_constants(original, layers)} if layers else dict[str, Live]()
    made_of: dict[str, Any] = {"constants": constants_digest(original, layers)} if layers else {}
    for name, plan in plans.items():
        if plan.replace is None:
            continue
        if plan.replace.tier is not None and source is None:
            raise InputError(f"--statistics: plan {name} replaces experts by constants: give the file they are made of")
        if plan.replace.tier is not None and read is None:
            read = Statistics.load(str(source))
            made_of["--statistics"] = read.sha256
        vectors = measured(read, plan.replace, checkpoint, layout) if plan.replace.tier is not None and read else None
        found[name] = live_constants(plan, checkpoint, layout, vectors)
    return checkpoint, found, made_of


def _key(checkpoint: Checkpoint, data: TokenData, plans: Mapping[str, Plan], compute: Compute) -> dict[str, Any]:
    """All that decides the bits of losses, in words for people."""
    return {
        "model": checkpoint.fingerprint,
        "config.json": checkpoint.config_sha256,
        "text": text_key(data),
        "plans": [(name, plan.digest) for name, plan in plans.items()],
        "--dtype": compute.dtype_name,
        "--device": compute.place.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


class _Compare(UnderPlans[Tensor]):
    """Logits of every plan are held against the original's: `compared` of each batch."""

    original: Tensor | None = None  # log probabilities of the batch that its plans are compared on

    def written(self, found: Tensor) -> Any:
        return found.tolist()

    def read(self, written: Any) -> Tensor:
        return torch.tensor(written, dtype=torch.float64)

    def forward(self, task: Task) -> None:
        logits = self.layerwise.compute(task.batch).logits
        what = f"log probabilities of {logits.shape[0]} x {logits.shape[1]} tokens, {logits.shape[2]} for each"
        with memory_for(what, "fewer sequences at a time take less (--batch-size), and so do shorter ones"):
            predicted = logits[:, :-1].float().log_softmax(-1)
            if task.name == ORIGINAL:
                self.original = predicted
            assert self.original is not None
            found = compared(predicted, self.original, task.batch.input_ids[:, 1:].to(logits.device))
        if not all_finite(found):
            if not bool(predicted.isnan().any()):
                raise InputError(f"{self.name(task)}: a token of the text has a logit of -inf: its loss is infinite")
            raise NotFinite(len(self.layerwise.layers))
        self.found[task.place, task.number] = found

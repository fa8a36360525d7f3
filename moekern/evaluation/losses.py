"""Held-out loss of a checkpoint and of plans applied to it on the fly, in one pass over its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moekern.architectures import find_layout
from moekern.architectures.substitution import as_whole
from moekern.calibration.sharing import facts_of
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import Batch, TokenData, dealt
from moekern.data.text import check_data
from moekern.errors import InputError, check_type, memory_for
from moekern.model.compute import Compute
from moekern.model.finite import NotFinite, all_finite
from moekern.model.journal import Resume, Stage, opened, removed
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.position import digest, text_key
from moekern.model.precision import settled
from moekern.model.pruned_layers import LivePruner
from moekern.model.substituted import substituted_layer
from moekern.model.walk import Pass
from moekern.plan.constants import Live, constants_digest, live_constants, measured, stored_constants
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.live import live_channels
from moekern.statistics.file import Statistics
from moekern.version import versions

ORIGINAL = "original"
STATE = "moekern-evaluate-"  # and a digest: the folder of a run that is not done


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
    place: int  # of the batch


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
    predictions of one batch. With `resume` the same call goes on where it was stopped: its folder holds one of a name
    of its own for each model, text, plans and options. Several processes (`compute.team`) share the batches, and rank 0
    has the losses: the same bits. Raises InputError for a plan that does not fit the model, and for data without
    batches.
    """
    check_type("plans", plans, Mapping)
    check_type("compute", compute, Compute)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    check_data(data, checkpoint)
    predicted = {batch.domain for batch in data.batches if batch.input_ids[:, 1:].numel()}
    for domain in data.tokens or ["of no name"]:
        if domain not in predicted:
            raise InputError(f"evaluate: domain {domain}: no sequence of two tokens, so none is predicted", kind="data")
    if ORIGINAL in plans:
        raise InputError(f"evaluate: a plan is named {ORIGINAL!r}, as the unpruned model is; give it another name")
    checkpoint, constants, made_of = _with_constants(checkpoint, plans, statistics)
    layout = find_layout(checkpoint)
    tasks = [  # of each batch the original first: the others are held against it
        Task(name, number, plan, batch, place)
        for place, batch in enumerate(data.batches)
        for number, (name, plan) in enumerate({ORIGINAL: None, **plans}.items())
    ]
    compute = settled(compute, checkpoint, layout)
    team = compute.team
    team.together(evaluate, checkpoint.folder, data, plans, compute, statistics=statistics)
    team.check_alike(facts_of(checkpoint, compute))
    owners = dealt([batch.input_ids.numel() for batch in data.batches], team.size)
    own = [task for task in tasks if owners[task.place] == team.rank]
    key = _key(checkpoint, data, plans, compute) | made_of
    if resume is not None:
        resume = replace(resume, folder=resume.folder / f"{STATE}{digest(key)[:16]}")
    with (
        opened(resume, key, ("evaluating",), team) as journal,
        open_layerwise(checkpoint, layout, compute, team) as layerwise,
    ):
        found = _Compare(layerwise, own, progress, constants).run(
            None if journal is None else journal.stage("evaluating")
        )
    whole = {place: sums for each in team.gather(found) for place, sums in each.items()}
    if journal is not None and team.first:
        removed(journal.folder)
    own = tasks if team.first else []  # in this order whatever ranks there are
    return means((ORIGINAL, *plans), ((t.name, t.batch.domain, whole[t.place, t.number]) for t in own))


def _with_constants(
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
    found = {ORIGINAL: stored_constants(original, layers)} if layers else dict[str, Live]()
    made_of: dict[str, Any] = {"constants": constants_digest(original, layers)} if layers else {}
    for name, plan in plans.items():
        check_plan(plan, layout, checkpoint, replaced=True)
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


def means(names: Iterable[str], found: Iterable[tuple[str, str, Tensor]]) -> dict[str, dict[str, Loss]]:
    """Name -> domain -> what batches' sums, as `compared` gives them for a name and a domain, come to."""
    sums: dict[tuple[str, str], Tensor] = {}
    for name, domain, one in found:
        sums[name, domain] = sums[name, domain] + one if (name, domain) in sums else one
    table: dict[str, dict[str, Loss]] = {name: {} for name in names}
    for (name, domain), total in sums.items():
        nll, kl, top1, count = total.tolist()
        table[name][domain] = Loss(nll / count, kl / count, top1 / count, int(count))
    return table


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


class _Compare(Pass[Task]):
    """Every task with its plan applied, one plan after another in each layer; logits are held against the original's.

    A plan stays applied to the layer that runs for as many tasks in a row as are of that plan.
    """

    def __init__(
        self,
        layerwise: LayerwiseModel,
        tasks: list[Task],
        progress: Callable[[float, int], None],
        constants: Mapping[str, Live],
    ) -> None:
        self.layerwise, self.tasks, self.progress, self.constants = layerwise, tasks, progress, constants
        self.plans = 1 + max((task.number for task in tasks), default=0)  # the original among them
        self.pruner, self.applied = LivePruner(layerwise.loader, layerwise.layout), ExitStack()
        self.now: tuple[int, int] | None = None  # layer, plan number
        self.through = 0  # tasks that have left the layer
        self.original: Tensor | None = None  # log probabilities of the batch that its plans are compared on
        self.sums: dict[tuple[int, int], Tensor] = {}  # batch and plan, by number -> as `compared` gives them

    def run(self, stage: Stage | None = None) -> dict[tuple[int, int], Tensor]:
        """The whole pass, or what a stopped run has left of it; (batch, plan) -> sums over its tokens."""
        self.layerwise.expect(sum(task.batch.input_ids.numel() for task in self.tasks))
        with self.applied:
            self.layerwise.run(self.tasks, self, stage)
        return self.sums

    def kept(self) -> Any:
        every = [each for sums in self.layerwise.team.gather(self.sums) for each in sums.items()]
        return [(place, number, total.tolist()) for (place, number), total in every]

    def restored(self, layer: int, kept: Any) -> None:
        self.sums = {
            (place, number): torch.tensor([float(x) for x in total], dtype=torch.float64)
            for place, number, total in kept
        }

    def started(self) -> None:
        self.sums.clear()

    def label(self, number: int, task: Task) -> int:
        return task.place * self.plans + task.number

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
        self.sums[task.place, task.number] = found

    @contextmanager
    def entering(self, task: Task, layer: int) -> Iterator[None]:
        key = self.layerwise.moe_keys.get(layer)
        if key is not None and self.now != (layer, task.number):
            self.applied.close()
            self.now = layer, task.number
            if task.name in self.constants:
                experts, given = self.layerwise.layout.layers[key].num_experts, self.constants[task.name](key)
                module = self.layerwise.layers[layer]
                self.applied.enter_context(substituted_layer(module, key, experts, given))
            elif task.plan is not None:
                own = task.plan.layers[key]
                self.applied.enter_context(self.pruner.pruned(key, own.keep, live_channels(own)))
        yield
        self.through += 1
        total = len(self.tasks) * self.layerwise.visits(layer)
        if layer >= 0 and self.through < total:
            self.progress(layer + self.through / total, len(self.layerwise.layers))

    def loaded(self, layer: int) -> None:
        self.through = 0
        self.progress(layer, len(self.layerwise.layers))

    def group(self, task: Task) -> int:
        return task.number

    def name(self, task: Task) -> str:
        plan = "the original" if task.plan is None else f"plan {task.name}"
        return f"{plan}, domain {task.batch.domain}"

    def held(self, layer: int) -> Sequence[int] | None:
        return self.pruner.held.get(self.layerwise.moe_keys.get(layer, ""))

    def done(self, layer: int) -> None:
        self.applied.close()  # before the layer's weights go
        self.progress(layer + 1, len(self.layerwise.layers))


def compared(predicted: Tensor, original: Tensor, wanted: Tensor) -> Tensor:
    """Sums over a batch's tokens, float64: -log p of those wanted [B, S], KL, equal likeliest tokens, tokens.

    predicted and original are log probabilities [B, S, V]; a sequence is looked at at a time.
    """
    classes = predicted.shape[-1]
    if wanted.numel() and int(wanted.max()) >= classes:
        raise InputError(
            f"its head predicts {classes} classes, and the text has token {int(wanted.max())}: no loss of it"
        )
    total = torch.zeros(4, dtype=torch.float64)
    for mine, theirs, ids in zip(predicted, original, wanted, strict=True):
        total[0] -= float(mine.gather(1, ids[:, None]).double().sum())
        divergence = F.kl_div(mine, theirs, reduction="none", log_target=True)
        impossible = theirs == -torch.inf  # tokens that a head masks add nothing
        total[1] += float(divergence.masked_fill_(impossible, 0).sum(1).double().sum())
        total[2] += int((mine.argmax(1) == theirs.argmax(1)).sum())
        total[3] += len(ids)
    return total


def mean_loss(row: Mapping[str, float]) -> float:
    """Mean over domains, each counting the same."""
    return sum(row.values()) / len(row)


def losses_document(table: Evaluation) -> dict[str, Any]:
    """The same as JSON."""
    return {name: row_document(row) for name, row in table.items()}


def row_document(row: Mapping[str, Loss]) -> dict[str, Any]:
    """Losses by domain as JSON."""
    return {domain: asdict(loss) for domain, loss in row.items()}


def row_of(document: Mapping[str, Mapping[str, Any]]) -> dict[str, Loss]:
    """The inverse. Raises TypeError for what is none."""
    return {domain: Loss(**loss) for domain, loss in document.items()}

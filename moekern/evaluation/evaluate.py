"""Held-out loss of a checkpoint and of plans applied to it on the fly, in one pass over its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moekern.architectures import find_layout
from moekern.architectures.substitution import as_whole
from moekern.calibration.sharing import facts_of
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.data.text import check_data
from moekern.data.token_bytes import token_bytes
from moekern.errors import InputError, check_type, memory_for
from moekern.evaluation.buckets import AXES, bucket_sums
from moekern.evaluation.layers import CHOICE, STREAM, Watch, apart, layer_figures
from moekern.evaluation.losses import ORIGINAL, Evaluation, LayerFigures, Loss, means
from moekern.evaluation.predictions import NLL, summed, token_figures
from moekern.evaluation.tally import Tally
from moekern.evaluation.under_plans import Task, UnderPlans, check_plans
from moekern.model.compute import Compute
from moekern.model.finite import NotFinite, all_finite
from moekern.model.journal import Resume, Stage, opened
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.position import text_key
from moekern.model.precision import settled
from moekern.model.state_folder import removed
from moekern.model.states import States
from moekern.model.stepwise import Tangled
from moekern.plan.constants import Live, constants_digest, live_constants, measured, stored_constants
from moekern.plan.document import Plan
from moekern.statistics.file import Statistics
from moekern.version import versions

LOG = logging.getLogger(__name__)
STATE = "moekern-evaluate-"  # and a digest: the folder of a run that is not done


def evaluate(
    source: str | Path | Checkpoint,
    data: TokenData,
    plans: Mapping[str, Plan],
    compute: Compute = Compute(),
    *,
    statistics: str | Path | None = None,
    layers: bool = False,
    resume: Resume | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> Evaluation:
    """Loss per domain of the original and of every plan: layers are pruned in memory, with the bits of the checkpoint
    that the plan makes. With it come figures by position and by the original's entropy (`Loss.buckets`), and with
    `layers` those of each decoder layer (`Loss.layers`). Where a plan replaces dropped experts, they return their
    constants, which `statistics` give where they are no zeros; the original may be a checkpoint whose experts are such
    constants.

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
    team.together(evaluate, checkpoint.folder, data, plans, compute, statistics=statistics, layers=layers)
    team.check_alike(facts_of(checkpoint, compute))
    key = _key(checkpoint, data, plans, compute) | made_of | {"--layers": layers}
    resume = None if resume is None else resume.keyed(STATE, key)
    with (
        opened(resume, key, ("evaluating",), team) as journal,
        open_layerwise(checkpoint, layout, compute, team) as layerwise,
    ):
        stage = None if journal is None else journal.stage("evaluating")
        run = _Compare(layerwise, data.batches, plans, progress, constants, token_bytes(checkpoint.folder), layers)
        found = run.run(stage)
        tally = Tally.of_all(team.gather(run.tally))
        run.tell()
    if journal is not None and team.first:
        removed(journal.folder)
    names = (ORIGINAL, *plans)
    places = enumerate(data.batches if team.first else ())  # in this order whatever ranks and passes there were
    table = means(names, ((name, b.domain, found[p, n]) for p, b in places for n, name in enumerate(names)))
    return _detailed(table, tally, run.plans, run.keys)


def _detailed(
    table: Mapping[str, Mapping[str, Loss]], tally: Tally, plans: Mapping[str, Plan | None], keys: Sequence[str | None]
) -> Evaluation:
    """The same with what was added up of buckets and layers. keys: of decoder layers, None without experts."""
    names, buckets, layers = tuple(plans), dict[tuple[str, str], Any](), dict[tuple[str, str], Any]()
    for number, domain, what, sums in tally.totals():
        name = names[number]
        (buckets if what in AXES else layers).setdefault((name, domain), {})[what] = sums
    return {
        name: {
            domain: replace(
                loss,
                buckets=buckets.get((name, domain)),
                layers=_of_layers(layers.get((name, domain), {}), plans[name], keys),
            )
            for domain, loss in row.items()
        }
        for name, row in table.items()
    }


def _of_layers(
    sums: Mapping[str, Tensor], plan: Plan | None, keys: Sequence[str | None]
) -> dict[str, LayerFigures] | None:
    """By key, or the number of a decoder layer without experts, in their order; None where nothing was added up."""
    found = {}
    for i, key in enumerate(keys):
        parts = sums.get(f"{STREAM}{i}"), sums.get(f"{CHOICE}{i}")
        if any(part is not None for part in parts):
            found[key or str(i)] = layer_figures(*parts, plan, key)
    return found or None


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
    """Logits of every plan are held against the original's: sums of each batch, and a tally of buckets and layers."""

    def __init__(
        self,
        layerwise: LayerwiseModel,
        batches: Sequence[Batch],
        plans: Mapping[str, Plan],
        progress: Callable[[float, int], None],
        constants: Mapping[str, Live],
        sizes: Tensor | None,
        layers: bool,
    ) -> None:
        """sizes: bytes of each token id."""
        super().__init__(layerwise, batches, plans, progress, constants)
        more = 0 if sizes is None else max(0, layerwise.vocab_size - len(sizes))
        self.sizes, self.tally = None if sizes is None else pad(sizes, (0, more)), Tally()
        self.keys = [layerwise.moe_keys.get(i) for i in range(len(layerwise.layers))]
        experts = {i: layerwise.layout.layers[key].num_experts for i, key in layerwise.moe_keys.items()}
        self.watch = Watch(layerwise.layers, experts) if layers else None
        self.states = States(0)  # of all tasks, in front of the layer that runs or behind it
        self.original: Tensor | None = None  # logits of the batch that its plans are compared on
        self.behind: Tensor | None = None  # what the last layer has made of it

    def written(self, found: Tensor) -> Any:
        return found.tolist()

    def read(self, written: Any) -> Tensor:
        return torch.tensor(written, dtype=torch.float64)

    def started(self) -> None:
        super().started()
        self.tally.forget(self.part.start)

    def kept(self) -> Any:
        tally = Tally.of_all(self.layerwise.team.gather(self.tally))
        return super().kept() | {"tally": tally.document()}

    def restored(self, layer: int, kept: Any) -> None:
        super().restored(layer, kept)
        self.tally = Tally.read(kept["tally"]) if self.layerwise.team.first else Tally()

    def forward(self, task: Task) -> None:
        logits = self.layerwise.compute(task.batch).logits[:, :-1]
        wanted = task.batch.input_ids[:, 1:]
        if task.name == ORIGINAL:
            self.original = logits
        assert self.original is not None
        what = f"log probabilities of {logits.shape[0]} x {logits.shape[1]} tokens, {logits.shape[2]} for each"
        with memory_for(what, "fewer sequences at a time take less (--batch-size), and so do shorter ones"):
            figures = token_figures(logits, self.original, wanted.to(logits.device))
        if not all_finite(figures):
            if not bool(figures[..., NLL].isnan().any()):
                raise InputError(f"{self.name(task)}: a token of the text has a logit of -inf: its loss is infinite")
            raise NotFinite(len(self.layerwise.layers))
        self.found[task.place, task.number] = summed(figures, None if self.sizes is None else self.sizes[wanted])
        for axis, sums in bucket_sums(figures).items():
            self._add(task, axis, sums)

    def _add(self, task: Task, what: str, sums: Tensor) -> None:
        self.tally.add((self.part.start, task.number, task.batch.domain, what), sums)

    def _through(self, stage: Stage | None) -> None:
        if self.watch is None:
            super()._through(stage)
            return
        try:
            with self.watch.hung(), self.layerwise.states() as states:
                self.states = states
                self.layerwise.run_stepwise(self.tasks, self, states, stage)
        except Tangled as found:
            why = "and the streams of such are not held side by side"
            raise InputError(f"--layers: {found}, {why}; leave this out") from None

    def changed(self, layer: int) -> None:
        if self.watch is not None:
            self.applied.callback(self.watch.choosing(layer))

    @contextmanager
    def entering(self, task: Task, layer: int) -> Iterator[None]:
        with super().entering(task, layer):
            if self.watch is not None:
                self.watch.at = layer
            yield
        if self.watch is not None and layer >= 0:
            self._seen(self.watch, task, layer)

    def tell(self) -> None:
        """Say which figures of layers are not known, and why."""
        unseen = [self.keys[i] for i in sorted(self.watch.unseen)] if self.watch is not None else []
        if unseen:
            what = f"layers {', '.join(map(str, unseen))}: their experts are called without ids"
            LOG.info(f"{what}: orphans, load and the router's choice are not told")
        merged = [name for name, plan in self.plans.items() if plan is not None and plan.merges]
        if merged and self.watch is not None:
            what = f"{', '.join(merged)}: experts are merged, which no number of the original stands for"
            LOG.info(f"{what}: orphans and the router's choice are not told")

    def _seen(self, watch: Watch, task: Task, layer: int) -> None:
        """Add up the choice of experts in a layer; behind the last one, where no state of the task waits, its stream
        too, which there comes right behind the original's."""
        last, output = layer == len(self.layerwise.layers) - 1, watch.output
        choice = watch.taken(task.place, task.plan, self.keys[layer])
        if choice is not None:
            self._add(task, f"{CHOICE}{layer}", choice)
        if not last or output is None:
            return
        if task.plan is None:
            self.behind = output
        elif self.behind is not None:
            self._add(task, f"{STREAM}{layer}", apart(output, self.behind, self.layerwise.device))
        watch.output = None

    def done(self, layer: int) -> None:
        super().done(layer)
        if self.watch is None:
            return
        self.watch.done()
        for task in self.tasks if layer < len(self.layerwise.layers) - 1 else ():
            if task.plan is not None:
                first = task.place * len(self.plans)
                mine, theirs = (self.states.look(first + n).hidden for n in (task.number, 0))
                self._add(task, f"{STREAM}{layer}", apart(mine, theirs, self.layerwise.device))

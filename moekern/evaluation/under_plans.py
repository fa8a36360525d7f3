"""A pass over the original's weights in which tasks are computed under plans: layers are pruned in memory.

Where neither memory nor disk have room for the hidden states of all text under all plans, one group of batches after
another takes a pass of its own. What a batch is found to be does not depend on the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from moekern.architectures import Layout
from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import Batch, dealt
from moekern.errors import InputError
from moekern.evaluation.losses import ORIGINAL
from moekern.model.batch_groups import batch_groups
from moekern.model.journal import Stage, undamaged
from moekern.model.layerwise import LayerwiseModel
from moekern.model.pruned_layers import LivePruner
from moekern.model.substituted import substituted_layer
from moekern.model.walk import Pass
from moekern.plan.constants import Live
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.groups import is_merged
from moekern.plan.live import live_channels, live_merging
from moekern.plan.refit import refit_of

NONE: Mapping[str, Live] = {}

LOG = logging.getLogger(__name__)
Found = TypeVar("Found")


def check_plans(plans: Mapping[str, Plan], layout: Layout, checkpoint: Checkpoint, *, replaced: bool = False) -> None:
    """Raise InputError for plans that cannot be applied to the original's weights: one with the name of the original,
    one that does not fit the model, or that replaces dropped experts (unless `replaced`), and one whose layers were
    refitted, whose weights lie elsewhere."""
    if ORIGINAL in plans:
        raise InputError(f"a plan is named {ORIGINAL!r}, as the unpruned model is; give it another name")
    for name, plan in plans.items():
        check_plan(plan, layout, checkpoint, name, replaced=replaced)
        merged = is_merged(plan) or is_merged(plan, checkpoint.fingerprint)
        if refit_of(plan) is not None and not merged:
            what = "its layers were refitted, and here it is applied to the original's weights"
            raise InputError(f"{name}: {what}; take the checkpoint that was written, or the plan from before the refit")


def pruned_by(pruner: LivePruner, plan: Plan, key: str) -> AbstractContextManager[None]:
    """A layer whose weights are loaded is what a plan makes of it while the context is open."""
    own = plan.layers[key]
    return pruner.pruned(key, own.keep, live_channels(own), live_merging(plan, key))


@contextmanager
def all_pruned(layerwise: LayerwiseModel, plan: Plan) -> Iterator[None]:
    """The same of a model whose layers are all in memory."""
    pruner = LivePruner(layerwise.loader, layerwise.layout)
    with ExitStack() as applied:
        for key in plan.layers:
            applied.enter_context(pruned_by(pruner, plan, key))
        yield


@dataclass(frozen=True)
class Task:
    name: str
    number: int  # of the plan, the original first
    plan: Plan | None
    batch: Batch
    place: int  # of the batch


class UnderPlans(Pass[Task], Generic[Found]):
    """Every batch under the original and under each plan, with the bits of the checkpoint that the plan makes.

    Of each batch the original comes first. A plan stays applied to the layer that runs for as many tasks in a row as
    are of that plan. Ranks of the model's team share the batches. A subclass puts what it finds of a task into `found`.
    """

    def __init__(
        self,
        layerwise: LayerwiseModel,
        batches: Sequence[Batch],
        plans: Mapping[str, Plan],
        progress: Callable[[float, int], None],
        constants: Mapping[str, Live] = NONE,
    ) -> None:
        """constants: by the name of a plan or of the original, what its experts return that are constants."""
        self.layerwise, self.batches, self.progress, self.constants = layerwise, batches, progress, constants
        self.plans: Mapping[str, Plan | None] = {ORIGINAL: None, **plans}
        self.pruner, self.applied = LivePruner(layerwise.loader, layerwise.layout), ExitStack()
        self.found: dict[tuple[int, int], Found] = {}  # batch and plan, by number; of several ranks, its own
        self.part = range(len(batches))  # the batches of this pass
        self.tasks: list[Task] = []  # of this pass and rank
        self.passes, self.passed = 1, 0  # of the text that a stopped run has left
        self.now: tuple[int, int] | None = None  # layer, plan number
        self.through = 0  # tasks that have left the layer

    def written(self, found: Found) -> Any:
        """What was found of a task, as JSON."""
        raise NotImplementedError

    def read(self, written: Any) -> Found:
        """The inverse."""
        raise NotImplementedError

    def run(self, stage: Stage | None = None) -> dict[tuple[int, int], Found]:
        """Batch and plan, by number -> what was found, at rank 0 that of all ranks. With a `stage`, what a stopped run
        has left is done. Raises NoRoomForText where there is no room for a single batch."""
        left, rest = None if stage is None else stage.left, range(len(self.batches))
        with self.applied:
            if stage is not None and left is not None:
                with undamaged(stage.journal.folder):
                    self.part = self._begun(left.kept)
                self._pass(stage)
                rest = rest[self.part.stop :]
            while rest:
                groups = self._groups(rest)  # anew for each: there may be less room by now
                self.passes, self.part = self.passed + len(groups), groups[0]
                self._pass(None if stage is None else stage.again())
                rest = rest[len(self.part) :]
        return self._whole()

    def _pass(self, stage: Stage | None) -> None:
        """The batches of a part, or what a stopped run has left of them."""
        self.tasks = self._own(self.part)
        if stage is None or stage.left is None or not stage.left.complete:
            self.layerwise.expect(sum(task.batch.input_ids.numel() for task in self.tasks))
        self._through(stage)
        self.passed += 1

    def _through(self, stage: Stage | None) -> None:
        self.layerwise.run(self.tasks, self, stage)

    def _whole(self) -> dict[tuple[int, int], Found]:
        """What all ranks have found, at rank 0."""
        return {place: found for each in self.layerwise.team.gather(self.found) for place, found in each.items()}

    def _begun(self, kept: Any) -> range:
        """The batches of the pass that a stopped run was in. Raises ValueError for what cannot be."""
        start, stop = (int(place) for place in kept["batches"])
        if not 0 <= start < stop <= len(self.batches):
            raise ValueError("batches that the text does not have")
        return range(start, stop)

    def _groups(self, rest: range) -> list[range]:
        """The fewest groups of these batches for which every rank has room."""
        sizes = [self.batches[place].input_ids.numel() * len(self.plans) for place in rest]
        groups, found = batch_groups(self.layerwise, sizes)
        if found is not None and self.passed + len(groups) != self.passes:
            LOG.info(f"{found}: the text is taken in {len(groups)} groups, each a pass over the weights")
        return [rest[group.start : group.stop] for group in groups]

    def _own(self, group: range) -> list[Task]:
        """This rank's tasks of a group."""
        owners = dealt([self.batches[place].input_ids.numel() for place in group], self.layerwise.team.size)
        return [
            Task(name, number, plan, self.batches[place], place)
            for place, owner in zip(group, owners, strict=True)
            if owner == self.layerwise.team.rank
            for number, (name, plan) in enumerate(self.plans.items())
        ]

    def started(self) -> None:
        self.applied.close()
        self.found = {place: found for place, found in self.found.items() if place[0] not in self.part}

    def kept(self) -> Any:
        found = [(*place, self.written(each)) for place, each in self._whole().items()]
        return {"batches": [self.part.start, self.part.stop], "found": found}

    def restored(self, layer: int, kept: Any) -> None:
        self.found = {(int(place), int(number)): self.read(found) for place, number, found in kept["found"]}

    def label(self, number: int, task: Task) -> int:
        return task.place * len(self.plans) + task.number

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
                self.applied.enter_context(pruned_by(self.pruner, task.plan, key))
            self.changed(layer)
        yield
        self.through += 1
        total = len(self.tasks) * self.layerwise.visits(layer)
        if layer >= 0 and self.through < total:
            self._tell(layer + self.through / total)

    def changed(self, layer: int) -> None:
        """A layer with experts is what a plan makes of it, until `applied` is closed."""

    def _tell(self, layers: float) -> None:
        of = len(self.layerwise.layers)
        self.progress(self.passed * of + layers, self.passes * of)

    def loaded(self, layer: int) -> None:
        self.through, self.now = 0, None
        self._tell(layer)

    def group(self, task: Task) -> int:
        return task.number

    def name(self, task: Task) -> str:
        plan = "the original" if task.plan is None else f"plan {task.name}"
        return f"{plan}, domain {task.batch.domain}"

    def held(self, layer: int) -> Sequence[int] | None:
        return self.pruner.held.get(self.layerwise.moe_keys.get(layer, ""))

    def done(self, layer: int) -> None:
        self.applied.close()  # before the layer's weights go
        self._tell(layer + 1)

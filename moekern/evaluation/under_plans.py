"""A pass over the original's weights in which tasks are computed under plans: layers are pruned in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from moekern.data.batches import Batch
from moekern.model.journal import Stage
from moekern.model.layerwise import LayerwiseModel
from moekern.model.pruned_layers import LivePruner
from moekern.model.substituted import substituted_layer
from moekern.model.walk import Pass
from moekern.plan.constants import Live
from moekern.plan.document import Plan
from moekern.plan.live import live_channels, live_merging

NONE: Mapping[str, Live] = {}


@dataclass(frozen=True)
class Task:
    name: str
    number: int  # of the plan, the original first
    plan: Plan | None
    batch: Batch
    place: int  # of the batch


class UnderPlans(Pass[Task]):
    """Every task with its plan applied, one plan after another in each layer, with the bits of the checkpoint that the
    plan makes.

    A plan stays applied to the layer that runs for as many tasks in a row as are of that plan.
    """

    def __init__(
        self,
        layerwise: LayerwiseModel,
        tasks: list[Task],
        progress: Callable[[float, int], None],
        constants: Mapping[str, Live] = NONE,
    ) -> None:
        """constants: by the name of tasks, what their experts return that are no experts any longer."""
        self.layerwise, self.tasks, self.progress, self.constants = layerwise, tasks, progress, constants
        self.plans = 1 + max((task.number for task in tasks), default=0)  # the original among them
        self.pruner, self.applied = LivePruner(layerwise.loader, layerwise.layout), ExitStack()
        self.now: tuple[int, int] | None = None  # layer, plan number
        self.through = 0  # tasks that have left the layer

    def through_all(self, stage: Stage | None = None) -> None:
        """The whole pass, or what a stopped run has left of it."""
        self.layerwise.expect(sum(task.batch.input_ids.numel() for task in self.tasks))
        with self.applied:
            self.layerwise.run(self.tasks, self, stage)

    def label(self, number: int, task: Task) -> int:
        return task.place * self.plans + task.number

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
                own, merging = task.plan.layers[key], live_merging(task.plan, key)
                self.applied.enter_context(self.pruner.pruned(key, own.keep, live_channels(own), merging))
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

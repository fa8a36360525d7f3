"""What `merge-experts` does: the stages joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moekern.architectures import Layout, find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.cli import console, pipeline
from moekern.cli.earlier import earlier_statistics
from moekern.cli.prune import prune_to
from moekern.data.batches import TokenData
from moekern.data.text import Text
from moekern.errors import InputError
from moekern.estimation.overview import overview
from moekern.files import check_work, is_folder, standing, work_path, working
from moekern.merging.groups import METHODS, check_count, merging_plan
from moekern.merging.merge import merge_experts, merged_bytes
from moekern.merging.routers import plan_with_routers
from moekern.model.compute import Compute
from moekern.plan.budgets import Budget
from moekern.plan.document import Mtp, Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.groups import check_mergeable, check_plain, merged_into
from moekern.plan.router_rows import DOMINANT, check_routers
from moekern.pruning.copying import Copy, room_needed
from moekern.pruning.preflight import check_space
from moekern.pruning.prune import PruneReport
from moekern.pruning.refitted import SUFFIX
from moekern.pruning.work_folder import check_target
from moekern.router import kept_count
from moekern.statistics.file import Statistics

STATISTICS, PLAN, LAYERS = "statistics.safetensors", "plan.json", "refit"  # in the work folder; layers until it is done

Make = Callable[[Checkpoint, Path], Plan]  # of a checkpoint, with a work folder: what is to be merged


@dataclass(frozen=True)
class Grouping:
    """How experts are grouped by statistics, and what their router rows are fitted to."""

    method: str
    keep: float | int
    align: str
    domains: tuple[str, ...] | None
    budget: Budget
    router: str = DOMINANT

    def check(self, layout: Layout, data: TokenData) -> None:
        """Raise InputError for what a plan would be refused for when the text was measured."""
        for layer in layout.layers.values() if self.budget.kind == "uniform" else ():
            check_count(self.method, kept_count(self.keep, layout.router.of(layer.num_experts)), layer.num_experts)
        for name in self.domains or ():
            if name not in data.tokens:
                raise InputError(f"--domain {name}: the text has no such domain; it has {', '.join(data.tokens)}")

    def plan(self, statistics: Statistics) -> Plan:
        return merging_plan(
            statistics, self.method, self.keep, align=self.align, budget=self.budget, domains=self.domains
        )


@dataclass(frozen=True)
class Merged:
    """What was made, and where. `plan` is that which was carried out, in the file `path`."""

    plan: Plan
    path: Path
    pruned: PruneReport
    verdict: pipeline.Verdict

    @property
    def good(self) -> bool:
        return self.verdict.good

    def document(self) -> dict[str, Any]:
        return {
            "plan": str(self.path),
            "merged": {key: merged_into(layer) for key, layer in self.plan.layers.items()},
            "pruned": {**asdict(self.pruned), "out": str(self.pruned.out)},
            "verify": self.verdict.document(),
        }


def check_out(out: Path) -> bool:
    """Whether the target is there already, of a command that was stopped while it verified. Raises InputError where it
    can be neither made nor gone on with."""
    check_work(out)
    again = is_folder(out) and is_folder(work_path(out) / LAYERS)
    if not again:
        check_target(out)
    return again


def by_text(text: Text, compute: Compute, grouping: Grouping, *, restart: bool) -> Make:
    """Statistics are measured first, and stay in the work folder: another command with the same text uses them."""

    def make(checkpoint: Checkpoint, side: Path) -> Plan:
        layout = find_layout(checkpoint)
        check_mergeable(checkpoint, layout, layout.layers)
        if grouping.router != DOMINANT:
            check_routers(checkpoint, layout, layout.layers, grouping.router)
        settled = pipeline.told_compute(compute, checkpoint, layout)
        data, path = text.read(checkpoint, trust_remote_code=settled.trust_remote_code), side / STATISTICS
        grouping.check(layout, data)
        tiers = METHODS[grouping.method].tiers
        found = earlier_statistics(path, checkpoint, data, settled, tiers, restart=restart)
        if found is None:
            path.unlink(missing_ok=True)
            found = pipeline.measured(checkpoint, data, settled, tiers=tiers, out=path, restart=restart)
        plan = grouping.plan(found)
        if grouping.router == DOMINANT:
            return plan
        with console.progress("fitting routers", tokens=sum(data.tokens.values())) as step:
            return plan_with_routers(
                checkpoint, data, settled, plan, grouping.router, domains=grouping.domains, progress=step
            )

    return make


def merge_stages(folder: Path, make: Make, out: Path, *, mtp: Mtp | None = None, copy: Copy = "auto") -> Merged:
    """Plan, merge, prune, verify. What an earlier run with the same model and plan left is used again."""
    again = check_out(out)
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    with working(out) as side:
        plan, layers = make(checkpoint, side), side / LAYERS
        console.hint(check_plan(plan, layout, checkpoint))
        check_plain(checkpoint, layout, plan)
        if not again:
            kept = [len(plan.layers[key].keep) / layer.num_experts for key, layer in layout.layers.items()]
            mean = layout.num_experts * sum(kept) / len(kept)
            room = room_needed(checkpoint, standing(out.parent), overview(checkpoint).bytes_at(mean))
            check_space(out, room, len(checkpoint.shards) + len(kept), {layers: merged_bytes(checkpoint, plan)})
        with console.progress("merging") as step:
            whole = merge_experts(checkpoint, plan, layers, step)
        whole.save(side / PLAN)
        report = prune_to(checkpoint, whole, out, mtp=mtp, copy=copy, again=again, refitted=layers)
        verdict = pipeline.verify_both(folder, whole, out, forward=False, mtp=mtp)
        for path in layers.glob(f"*{SUFFIX}"):
            path.unlink()
        layers.rmdir()
    return Merged(whole, work_path(out) / PLAN, report, verdict)

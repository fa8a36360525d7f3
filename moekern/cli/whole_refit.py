"""What `refit` does: the stages joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moekern.architectures import Layout, find_layout
from moekern.architectures.widths import narrow_problem
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.cli import console, pipeline
from moekern.cli.prune import prune_to
from moekern.cli.refitting import DROPPED, REFITTED, Place, refit_document, refitted
from moekern.cli.refitting import show_refit as show_refit
from moekern.data.batches import TokenData
from moekern.data.text import Text
from moekern.errors import InputError
from moekern.evaluation.held_out import held_back
from moekern.files import check_work, working
from moekern.model.compute import AUTO, Compute
from moekern.model.journal import Resume
from moekern.plan.document import Mtp, Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.several import Planning, make_plans
from moekern.pruning.prune import Copy, PruneReport
from moekern.refit import Refine, Ridge
from moekern.refit.refit import Refitting, refit
from moekern.refit.shapes import best, candidates, parse_shape, some_of, trials
from moekern.refit.variants import Variant
from moekern.router import kept_count
from moekern.statistics.file import Statistics


@dataclass(frozen=True)
class Asked:
    """How experts are refitted, and the result written."""

    width: int | None = None
    refine: bool = False
    mtp: Mtp | None = None
    copy: Copy = "auto"
    forward: bool = True
    restart: bool = False

    def variant(self, plan: Plan, folder: Path) -> Variant:
        """What is made of a plan."""
        refine = Refine() if self.refine else None
        return Variant(REFITTED, plan, self.width, Ridge(), refine, folder)


@dataclass(frozen=True)
class Found:
    """What `refit` made, and where."""

    plan: Path
    refit: Refitting
    pruned: PruneReport
    verdict: pipeline.Verdict

    @property
    def good(self) -> bool:
        return self.verdict.good

    def document(self) -> dict[str, Any]:
        return {
            "plan": str(self.plan),
            "refit": refit_document(self.refit),
            "pruned": {**asdict(self.pruned), "out": str(self.pruned.out)},
            "verify": self.verdict.document(),
        }


def shaped(
    checkpoint: Checkpoint,
    layout: Layout,
    statistics: Statistics,
    planning: Planning,
    shape: str,
    data: TokenData,
    compute: Compute,
    resume: Resume,
) -> tuple[Plan, int | None]:
    """The plan of `run --keep --shape`, and how many channels its experts keep (None: all). "auto" tries shapes of the
    same bytes on a part of the text, and takes the one that is nearest to the original on text held back from it."""
    whole = layout.width
    if whole is None:
        raise InputError(f"--shape {shape}: {narrow_problem(checkpoint, layout) or 'widths of layers differ'}")
    share = kept_count(planning.keeps[0], layout.router) / layout.num_experts
    keep = planning.keeps[0] if isinstance(planning.keeps[0], float) else share

    def plan_of(experts: int) -> Plan:
        return next(iter(make_plans(statistics, replace(planning, keeps=(experts,))).values()))

    chosen = parse_shape(shape)
    if chosen is None:
        tried = candidates(layout.router, whole, keep)
        rest, judged = held_back(data)
        with console.progress("trying shapes") as step:
            found = refit(
                checkpoint, some_of(rest), trials(tried, plan_of, whole), compute,
                judged=judged, resume=resume, progress=step,
            )  # fmt: skip
        chosen, kl = best(tried, found.losses)
        table = {str(each): {"kl": kl[str(each)], "experts": each.experts, "width": each.width} for each in tried}
        rows = [(name, f"{row['kl']:.4f}", "taken" if name == str(chosen) else "") for name, row in table.items()]
        console.show("shapes of the same bytes", ("experts x channels", "KL to original", ""), rows)
    else:
        table = {}
    if chosen.width > whole:
        raise InputError(f"--shape {shape}: experts have {whole} channels")
    plan = plan_of(chosen.experts)
    said = {"shape": str(chosen), "keep": keep, **({"tried": table} if table else {})}
    return replace(plan, provenance={**plan.provenance, "shape": said}), None if chosen.width == whole else chosen.width


def refit_stages(folder: Path, plan: Plan, text: Text, compute: Compute, out: Path, asked: Asked) -> Found:
    """Refit, prune, verify. What an earlier run with the same model, plan and data left is used again."""
    check_work(out)
    if not text.data:
        raise InputError("refit: it is fitted to text: give --data", kind="option")
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    console.hint(check_plan(plan, layout, checkpoint))
    compute = pipeline.told_compute(compute, checkpoint, layout)
    data = text.read(checkpoint, trust_remote_code=compute.trust_remote_code)
    data, judged = held_back(data)
    with working(out) as side:
        place, path = Place(side), side / "plan.json"
        variants: Sequence[Variant] = (Variant(DROPPED, plan), asked.variant(plan, place.folder))
        made = refitted(checkpoint, data, judged, variants, compute, place, restart=asked.restart)
        made.plans[REFITTED].save(path)
        report = prune_to(checkpoint, made.plans[REFITTED], out, mtp=asked.mtp, copy=asked.copy, refitted=place.folder)
        verdict = pipeline.verify_both(
            folder, made.plans[REFITTED], out, replace(compute, dtype=AUTO), forward=asked.forward, mtp=asked.mtp
        )
        place.clear()
    return Found(path, made, report, verdict)

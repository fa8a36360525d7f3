"""What `refit` does: the stages joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli import console, pipeline
from moekern.cli.prune import prune_to
from moekern.cli.refitting import DROPPED, REFITTED, Place, refit_document, refitted
from moekern.cli.refitting import show_refit as show_refit
from moekern.data.text import Text
from moekern.errors import InputError
from moekern.evaluation.held_out import held_back
from moekern.files import check_work, working
from moekern.model.compute import AUTO, Compute
from moekern.plan.document import Mtp, Plan
from moekern.plan.fits_model import check_plan
from moekern.pruning.prune import Copy, PruneReport
from moekern.refit import Refine, Ridge
from moekern.refit.refit import Refitting
from moekern.refit.variants import Variant


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

"""What `refit` does: the stages joined."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli import console, pipeline
from moekern.cli.prune import prune_to
from moekern.cli.refitter import Refitter
from moekern.cli.refitting import DROPPED, REFITTED, Place, refit_document, refitted
from moekern.data.text import Text
from moekern.errors import InputError
from moekern.evaluation.held_out import held_back
from moekern.files import check_work, is_folder, is_plain, work_path, working
from moekern.model.compute import AUTO, Compute
from moekern.plan.document import Mtp, Plan
from moekern.plan.fits_model import check_plan
from moekern.pruning.prune import Copy, PruneReport
from moekern.refit.refine import check_alone
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


def has_run(out: Path) -> bool:
    """Whether `refit` has made this target before it was stopped, and was not done with it. What is left of one that
    was done is removed."""
    place = Place(work_path(out))
    if not out.name or not is_folder(out):
        return False
    if not is_plain(place.document):
        place.clear()
        return False
    return True


def refit_stages(folder: Path, plan: Plan, text: Text, compute: Compute, out: Path, asked: Asked) -> Found:
    """Refit, prune, verify. What an earlier run with the same model, plan and data left is used again."""
    check_work(out)
    if not text.data:
        raise InputError("refit: it is fitted to text: give --data", kind="option")
    if asked.refine:
        check_alone(compute.team)
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    console.hint(check_plan(plan, layout, checkpoint))
    compute = pipeline.told_compute(compute, checkpoint, layout)
    data, judged = held_back(text.read(checkpoint, trust_remote_code=compute.trust_remote_code))
    with working(out) as side:
        place, path = Place(side), side / "plan.json"
        variants = Variant(DROPPED, plan), Refitter(asked.refine).variant(plan, asked.width, place.folder)
        made = refitted(checkpoint, data, judged, variants, compute, place, restart=asked.restart)
        whole = made.plans[REFITTED]
        whole.save(path)
        report = prune_to(
            checkpoint, whole, out, mtp=asked.mtp, copy=asked.copy, again=is_folder(out), refitted=place.folder
        )
        plain = replace(compute, dtype=AUTO)
        verdict = pipeline.verify_both(folder, whole, out, plain, forward=asked.forward, mtp=asked.mtp)
        place.clear()
    return Found(path, made, report, verdict)

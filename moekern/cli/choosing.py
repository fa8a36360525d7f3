"""`--criterion auto`: candidates held against the original on text that is held back, and the best one taken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moekern.cli import console, pipeline
from moekern.cli.judged import show_choice
from moekern.cli.refitter import Work
from moekern.criteria.needs import NotForLayer
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.evaluation.choice import CHOICE, alike, choice_document
from moekern.evaluation.held_out import LEAST, held_back
from moekern.evaluation.losses import ORIGINAL, Evaluation
from moekern.model.journal import Resume
from moekern.model.kept import read_kept, write_kept
from moekern.plan.document import Plan
from moekern.plan.several import Planning, make_plans
from moekern.refit.refit import refit
from moekern.refit.shapes import RIDGE, trial_text
from moekern.refit.variants import Variant

FLAG = "--criterion auto"


@dataclass(frozen=True)
class Choice:
    """The criterion of one --keep, and how the candidates did: what its plan's provenance says."""

    criterion: str
    told: Mapping[str, Any]

    def of(self, planning: Planning) -> Planning:
        return replace(planning, criteria=(self.criterion,))

    def marked(self, plan: Plan) -> Plan:
        return replace(plan, provenance={**plan.provenance, CHOICE: dict(self.told)})


def held_for_choice(data: TokenData, domains: Sequence[str] | None) -> tuple[TokenData, TokenData]:
    """The text to measure, and what is held back from it to choose by, of the domains that count (None: all). Raises
    InputError where there is too little."""
    rest, held = held_back(data)
    held = replace(held, batches=tuple(b for b in held.batches if domains is None or b.domain in domains))
    missing = [name for name in rest.tokens if name not in held.tokens and (domains is None or name in domains)]
    if not held.batches:
        few = f"no domain has the {LEAST} sequences of which one is held back to choose by"
        raise InputError(f"{FLAG}: {few}; give more text, a shorter --sequence-length, or name a criterion", "data")
    if missing:
        console.say(f"{FLAG}: too little text of {', '.join(missing)}: it has no say in the choice")
    return rest, held


def choose(
    work: Work,
    keeps: Sequence[float | int],
    choosing: TokenData,
    side: Path,
    *,
    refitted: bool,
    constants_of: Path | None = None,
) -> dict[float | int, Choice]:
    """Keep -> the criterion, among those of the planning, whose plan is nearest to the original.

    All plans are held against it in one pass, those that replace experts with constants of the statistics at
    `constants_of`; with `refitted`, once what stays is fitted (ridge alone) to a part of the
    text. What an earlier run chose from the same plans and text is taken from `side`/choice.json.
    """
    plans: dict[float | int, dict[str, Plan]] = {}
    for keep in keeps:
        plans[keep] = _candidates(work, keep)
    same = {keep: alike(of) for keep, of in plans.items()}
    path, key = side / "choice.json", _key(work, choosing, plans, refitted=refitted)
    left = read_kept(path, restart=work.restart)
    if left.get("made_from") == key:
        told = dict(zip(keeps, left["choices"], strict=True))
    else:
        named = {_name(c, k): plan for k, of in plans.items() for c, plan in of.items() if same[k][c] == c}
        losses = (
            _refitted(work, choosing, named, side) if refitted else _dropped(work, choosing, named, side, constants_of)
        )
        told = {keep: _told(losses, keep, same[keep], refitted) for keep in keeps}
        write_kept(path, {"made_from": key, "choices": list(told.values())})
    for keep, document in told.items():
        what = "criteria" + (", refitted," if refitted else "") + (f" at --keep {keep:g}" if len(keeps) > 1 else "")
        show_choice(f"{what} on {document['tokens']} tokens that are held back to choose by", document, "criterion")
    return {keep: Choice(document["chosen"], document) for keep, document in told.items()}


def _candidates(work: Work, keep: float | int) -> dict[str, Plan]:
    """Criterion -> plan; without those that have nothing to say of a layer, which is said."""
    found: dict[str, Plan] = {}
    for criterion in work.planning.criteria:
        planning = replace(work.planning, criteria=(criterion,), keeps=(keep,), fit=None)
        try:
            (found[criterion],) = make_plans(work.statistics, planning).values()
        except NotForLayer as why:
            console.say(f"{FLAG}: {why}: it is not tried")
    if not found:
        raise InputError(f"{FLAG}: none of {', '.join(work.planning.criteria)} can be tried; name other candidates")
    return found


def _name(criterion: str, keep: float | int) -> str:
    return f"{criterion} at {keep:g}"


def _told(losses: Evaluation, keep: float | int, same: Mapping[str, str], refitted: bool) -> dict[str, Any]:
    own = {c: losses[_name(c, keep)] for c, first in same.items() if c == first}
    return {**choice_document({ORIGINAL: losses[ORIGINAL], **own}, same), "refitted": refitted}


def _dropped(
    work: Work, choosing: TokenData, plans: Mapping[str, Plan], side: Path, constants_of: Path | None
) -> Evaluation:
    resume, what = Resume(side, work.restart, console.say), "choosing a criterion"
    return pipeline.losses_of(work.checkpoint, choosing, work.compute, plans, resume, what, statistics=constants_of)


def _refitted(work: Work, choosing: TokenData, plans: Mapping[str, Plan], side: Path) -> Evaluation:
    variants = [Variant(name, plan, None, RIDGE) for name, plan in plans.items()]
    with console.progress("choosing a criterion") as step:
        return refit(
            work.checkpoint, trial_text(work.data), variants, work.compute,
            judged=choosing, resume=Resume(side, work.restart, console.say), progress=step,
        ).losses  # fmt: skip


def _key(
    work: Work, choosing: TokenData, plans: Mapping[float | int, Mapping[str, Plan]], *, refitted: bool
) -> dict[str, Any]:
    """All that a choice depends on, as JSON gives it back."""
    key = {
        "model": work.checkpoint.fingerprint,
        "config": work.checkpoint.config_sha256,
        "data": choosing.recipe,
        "tokens": choosing.tokens,
        "dtype": work.compute.dtype_name,
        "plans": [[keep, {name: plan.digest for name, plan in of.items()}] for keep, of in plans.items()],
        "refitted": refitted,
    }
    found: dict[str, Any] = json.loads(json.dumps(key))
    return found

"""A refit as a stage of commands: made, or taken over from a run that was stopped, and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.checkpoint.folder import Checkpoint
from moekern.cli import console
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.evaluation.held_out import LEAST
from moekern.evaluation.losses import METRICS, ORIGINAL, losses_document, mean_of, row_of
from moekern.files import is_folder
from moekern.model.compute import Compute
from moekern.model.journal import ANEW, Resume
from moekern.model.kept import read_kept, write_kept
from moekern.plan.document import Plan
from moekern.plan.refit import REFIT
from moekern.pruning.refitted import SUFFIX, check_refitted, open_refitted
from moekern.refit.refit import Refitting, key_of, recipe_of, refit
from moekern.refit.variants import HELD, Split, Variant

DROPPED, REFITTED = "dropped", "refitted"


@dataclass(frozen=True)
class Place:
    """Where a refit of a target lies in its work folder, until the target is made."""

    side: Path
    suffix: str = ""  # of one target among several

    @property
    def folder(self) -> Path:
        """The layers."""
        return self.side / f"refit{self.suffix}"

    @property
    def before(self) -> Path:
        """The plan that is refitted: it stays, since `refit --verify` asks for it."""
        return self.side / f"plan{self.suffix}.before-refit.json"

    @property
    def document(self) -> Path:
        """Its plans and losses: there when it is done."""
        return self.side / f"refitted{self.suffix}.json"

    def clear(self) -> None:
        """The target is made: nothing of this is needed any longer."""
        self.document.unlink(missing_ok=True)
        if is_folder(self.folder):
            for path in self.folder.glob(f"*{SUFFIX}"):
                path.unlink()
            self.folder.rmdir()


def refitted(
    checkpoint: Checkpoint,
    data: TokenData,
    judged: TokenData,
    variants: Sequence[Variant],
    compute: Compute,
    place: Place,
    *,
    restart: bool,
) -> Refitting:
    """Refit, and say how it goes; or take what an earlier run has left. The last variant is the one that is written."""
    split = Split.of(data, judged)
    if not split.tokens(HELD):
        few = f"no domain has the {LEAST} sequences of which one is held back: nothing chooses how strongly experts are"
        console.say(f"refit: {few} fitted, or puts back what is worse; give more text, or a shorter --sequence-length")
    recipe = recipe_of(key_of(checkpoint, split, data, variants, compute), variants[-1])
    found = read_kept(place.document, restart=restart)
    if found.get("recipe") == recipe:
        plans = {name: Plan.from_json(json.dumps(plan)) for name, plan in found["plans"].items()}
        try:
            check_refitted(open_refitted(place.folder), plans[REFITTED], checkpoint.fingerprint)
        except InputError as error:
            raise InputError(f"{error}; {ANEW}") from error
        losses = {n: row_of(row) for n, row in found["losses"].items()}
        return Refitting(plans, losses)
    place.document.unlink(missing_ok=True)
    with console.progress("refitting") as step:
        made = refit(
            checkpoint, data, variants, compute,
            judged=judged, resume=Resume(place.side, restart, console.say), progress=step,
        )  # fmt: skip
    plans = {name: json.loads(plan.to_json()) for name, plan in made.plans.items()}
    write_kept(place.document, {"recipe": recipe, "plans": plans, "losses": losses_document(made.losses)})
    return made


def refit_document(made: Refitting) -> dict[str, Any]:
    """The same as JSON: losses of all, and what is told of each layer."""
    told = made.plans[REFITTED].provenance[REFIT]
    return {"losses": losses_document(made.losses), "layers": told["layers"]}


def show_refit(made: Refitting) -> None:
    """How much each layer lacked before and after, and what the whole came to."""
    layers: Mapping[str, Any] = made.plans[REFITTED].provenance[REFIT]["layers"]
    steps = {"ridge": "down projections", "refine": "all weights"}
    rows: list[tuple[str, ...]] = []
    for key, told in layers.items():
        for step, what in steps.items():
            found = told if step == "ridge" else told.get("refine")
            if found and "fitted" in found:
                rows.append((key, what, *(_pair(found[part]) for part in ("fitted", "held")), _said(found, told)))
        for note in told.get("notes", ()):
            console.say(f"layer {key}: {note}")
    told_of = any(row[-1] for row in rows)
    columns = ("layer", "what is fitted", "text it is fitted to", "held-back text", *(("remark",) if told_of else ()))
    rows = [row[: len(columns)] for row in rows]
    console.show("what a layer's output lacks, relative to the original's, before and after", columns, rows)
    if any(made.losses.values()):
        show_quality(made)
    else:
        console.say("refit: no text was held back to judge it by; `moekern evaluate` does on text of your choice")


def _pair(values: Sequence[float | None]) -> str:
    return " -> ".join("-" if value is None else f"{value:.4f}" for value in values)


def _said(found: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """What is special about a step of a layer."""
    said = [f"{found['put_back']} experts left as they were"] if found.get("put_back") else []
    if found.get("kept_as_it_was"):
        said = ["not better on held-back text: left as it was"]
    if told.get("requantised"):
        said.append(f"quantised again, {told['requantised']:.2%} off")
    return "; ".join(said)


def show_quality(made: Refitting) -> None:
    """Losses on text that decided nothing, a row a stream."""
    rows = []
    for name, row in made.losses.items():
        means = [mean_of(row, metric) for metric in METRICS]
        rows.append((name, f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[2]:.1%}"))
    tokens = sum(loss.tokens for loss in made.losses[ORIGINAL].values())
    columns = ("model", "loss, nats a token", "KL to original", "same top-1")
    console.show(f"on {tokens} tokens that nothing was fitted to", columns, rows)
    before, after = (mean_of(made.losses[name], "kl") for name in (DROPPED, REFITTED))
    if after > before:
        console.say("refit: on this text the plan as it is, without a refit, is nearer to the original; prefer it")

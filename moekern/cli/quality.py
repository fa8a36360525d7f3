"""How good the results of `run` are on text that was held back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekern.checkpoint.folder import Checkpoint
from moekern.cli import console, pipeline
from moekern.cli.judged import models_judged
from moekern.data.batches import TokenData
from moekern.evaluation.evaluate import STATE
from moekern.evaluation.held_out import LEAST
from moekern.evaluation.losses import ORIGINAL, Evaluation, losses_document, mean_of, row_of
from moekern.files import work_path
from moekern.model.compute import Compute
from moekern.model.journal import Resume
from moekern.model.kept import read_kept, write_kept
from moekern.model.state_folder import removed
from moekern.plan.document import Plan


def quality_of(
    checkpoint: Checkpoint,
    held: TokenData,
    compute: Compute,
    plans: Mapping[str, Plan],
    out: Path,
    restart: bool,
    constants_of: Path | None = None,
) -> Evaluation | None:
    """Losses on the text that was held back, kept in the work folder's quality.json; None where none was."""
    if not held.batches:
        return None
    path = work_path(out) / "quality.json"
    digests = {name: plan.digest for name, plan in plans.items()}
    made_from = {
        "model": checkpoint.fingerprint,
        "config": checkpoint.config_sha256,
        "data": json.loads(json.dumps(held.recipe)),
        "tokens": held.tokens,
        "dtype": compute.dtype_name,
    }
    earlier = read_kept(path, restart=restart)
    rows: dict[str, Mapping[str, Any]] = {}
    if earlier.get("made_from") == made_from:
        rows = earlier["losses"]  # original, and plans by their digests
    if not {ORIGINAL, *digests.values()} <= rows.keys():
        resume = Resume(work_path(out), restart, console.say)
        what = "evaluating held-out text"
        found = pipeline.losses_of(checkpoint, held, compute, plans, resume, what, statistics=constants_of)
        rows = {digests.get(name, name): row for name, row in losses_document(found).items()}
        models = models_judged(checkpoint.fingerprint, {digests[name]: plan for name, plan in plans.items()})
        write_kept(path, {"made_from": made_from, "losses": rows, "models": models})
        for left in work_path(out).glob(f"{STATE}*"):  # of runs that were stopped, with other plans
            removed(left)
    names = {ORIGINAL: ORIGINAL, **digests}
    return {name: row_of(rows[key]) for name, key in names.items()}


def quality_lines(found: Evaluation | None, asked: bool) -> list[str]:
    """What pruning costs, in words; where it was `asked` for and not measured, why."""
    if found is None:
        why = f" (no domain has the {LEAST} sequences of which one is held back)" if asked else ""
        return [f"quality: not measured{why}; `moekern evaluate` measures it on text of your choice"]
    whole = found[ORIGINAL]
    tokens = sum(loss.tokens for loss in whole.values())
    before = mean_of(whole, "nll")
    lines = []
    for name, row in found.items():
        if name != ORIGINAL:
            after = mean_of(row, "nll")
            same = mean_of(row, "top1")
            where = f"{name}: " if len(found) > 2 else ""
            lines.append(
                f"quality: {where}loss {before:.3f} -> {after:.3f} nats a token, likeliest token the same for "
                f"{same:.1%} (a rough figure: {tokens} tokens of the same text, held back from calibration)"
            )
    return lines

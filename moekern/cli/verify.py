"""The command `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli.console import say
from moekern.cli.given import compute_of, folder_of, result
from moekern.cli.options import Device, GpuMemory, Json, Memory, Model, Revision, Spill, TrustRemoteCode
from moekern.cli.replacing import ConstantsOf, Replace, replaced_plan
from moekern.errors import InputError
from moekern.files import sized

if TYPE_CHECKING:
    from moekern.cli.pipeline import Verdict
    from moekern.verification.tensors import VerifyReport


def verify(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="The plan the checkpoint was pruned with.")],
    pruned: Annotated[Path, typer.Argument(help="The pruned checkpoint.")],
    forward: Annotated[
        bool, typer.Option("--forward", help="Also stream both models and compare logits with the masked original.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Compute merged experts of all layers again, not of two; refused where none are."),
    ] = False,
    replace: Replace = None,
    statistics: ConstantsOf = None,
    device: Device = "auto",
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    spill: Spill = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Compare the pruned checkpoint with the original, byte for byte; exit code 1 on any difference."""
    from moekern.cli import pipeline
    from moekern.plan.document import Plan

    made_by = replaced_plan(Plan.load(plan), replace, statistics)
    compute = compute_of(
        device=device,
        memory=memory,
        gpu_memory=gpu_memory,
        spill=spill,
        trust_remote_code=trust_remote_code,
        tell=forward,
    )
    if not pruned.is_dir():
        raise InputError(f"{pruned}: no such folder")
    verdict = pipeline.verify_both(
        folder_of(model, revision), made_by, pruned, compute, forward=forward, full=full, statistics=statistics
    )
    result(verdict.document(), lambda: show_verdict(verdict), good=verdict.good)


def show_verdict(found: Verdict) -> None:
    """Problems, or what was compared; what of the original belongs to no pruned checkpoint."""
    from moekern.checkpoint.contents import lines_left_out
    from moekern.checkpoint.recovery import RECOVERY
    from moekern.verification.tensors import MAX_PROBLEMS

    for problem in found.report.problems:
        say(f"wrong: {problem}")
    if len(found.report.problems) == MAX_PROBLEMS:
        say(f"only the first {MAX_PROBLEMS} are listed")
    if not found.report.problems:
        say(f"bytes: {found.report.tensors_compared} tensors, {sized(found.report.bytes_compared)} equal")
    if found.report.computed:
        say(_computed_line(found.report))
    if found.report.constants:
        say(_constants_line(found.report))
    if found.report.trained:
        held = f"and have no original: they are held against {RECOVERY}"
        say(f"recovered: {found.report.trained} tensors were trained after pruning, {held}")
    if found.report.left_out:
        say(f"not taken from the original: {lines_left_out(found.report.left_out)}")
    if found.forward is not None:
        f = found.forward
        say(
            f"logits ({f.dtype}, {f.tokens} tokens): largest difference {f.max_difference:.3g} at a standard deviation "
            f"of {f.logit_std:.3g}, same top-1 for {f.top1_agreement:.2%}: {'equal' if f.equal else 'NOT equal'} "
            f"to the {_oracle(found.report)}"
        )
    if found.skipped:
        say(f"logits: not compared: {found.skipped}")
    right = "verified: the bytes are right (how good the model is, evaluate tells)"
    say(right if found.good else "NOT verified: do not use this checkpoint")


def _oracle(report: VerifyReport) -> str:
    if report.constants:
        return "original, whose dropped experts return the constants"
    return "original, pruned and refitted in memory" if report.computed else "masked original"


def _constants_line(report: VerifyReport) -> str:
    """What is known of the constants of replaced experts."""
    held = "and are what the plan makes them" if report.constants_known else "finite and as they were written"
    more = "" if report.constants_known else "; --statistics compares them with what they are made of"
    return f"replaced: {report.constants} constants stand for dropped experts, {held}{more}"


def _computed_line(report: VerifyReport) -> str:
    """What is known of tensors that stand in no source."""
    n = report.computed
    checked = f"{n - report.unchecked} of {n}" if report.unchecked else "all"
    again = f"{report.recomputed} of them were" if report.recomputed else "NONE of them was"
    return (
        f"refitted or merged: {n} tensors are computed, and have no original; the checksums of {checked} are those "
        f"of that time, {again} computed again"
    )

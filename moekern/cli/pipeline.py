"""What the commands do, with progress and reuse of what an earlier run left: stages joined, nothing measured here."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moekern.architectures import Layout, find_layout
from moekern.architectures.quantisation import inputs_line
from moekern.architectures.substitution import as_whole
from moekern.calibration.calibrate import REPLAY_TOKENS, Told, calibrate
from moekern.calibration.sharing import check_tiers_of
from moekern.calibration.stable import Stable, until_stable
from moekern.calibration.text_groups import check_unwritten
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.cli import console
from moekern.cli.earlier import earlier_statistics, left_whole
from moekern.cli.parts_left import check_no_parts, check_no_position, part_path, remove_parts
from moekern.cli.replacing import vectors_of
from moekern.data.batches import TokenData
from moekern.data.text import Text
from moekern.errors import InputError, NoRoomForText
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL, Evaluation
from moekern.files import (
    check_new,
    check_work,
    is_folder,
    is_plain,
    name_left,
    remove_left,
    state_path,
    temporary_path,
    work_path,
    working,
)
from moekern.iteration.rounds import Method, iterate, needs_text
from moekern.measurement.tiers import at_once, backends_of, wanted_tiers
from moekern.model.budget import budget_of
from moekern.model.compute import Compute, check_device
from moekern.model.journal import ANEW, Resume
from moekern.model.precision import precision
from moekern.model.state_folder import clean_up, removed
from moekern.plan.document import Mtp, Plan
from moekern.plan.fits_model import check_plan
from moekern.pruning.preflight import check_space
from moekern.statistics.file import Statistics
from moekern.statistics.layer import TIERS
from moekern.team import Part
from moekern.verification.computed import Recompute
from moekern.verification.logits import ForwardVerdict, compare_forward, not_compared
from moekern.verification.tensors import VerifyReport, verify

PLANNED = 40  # bytes of a plan for each expert, at the most: its number and its score


@dataclass(frozen=True)
class Verdict:
    """Bytes compared, and logits too where asked for."""

    report: VerifyReport
    forward: ForwardVerdict | None
    skipped: str | None = None  # why logits were not compared, though asked for

    @property
    def good(self) -> bool:
        return not self.report.problems and (self.forward is None or self.forward.equal)

    def document(self) -> dict[str, Any]:
        forward = None if self.forward is None else {**asdict(self.forward), "equal": self.forward.equal}
        return {"good": self.good, **asdict(self.report), "forward": forward, "forward_skipped": self.skipped}


def calibrate_to(
    folder: Path,
    text: Text,
    compute: Compute,
    out: Path,
    *,
    tiers: Collection[str] = (),
    replay_tokens: int = REPLAY_TOKENS,
    part: Part | None = None,
    first: Path | None = None,
    stable: Stable | None = None,
    restart: bool = False,
    told: Told = lambda layer: None,
) -> Statistics:
    """Measure and save. Everything that can be wrong with the input is found before the model is touched."""
    check_new(out)
    check_work(out)
    wanted = wanted_tiers(tiers, TIERS, "calibrate")
    backends_of(compute.device, compute.backend, wanted)
    check_tiers_of(wanted, part, first)
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    if stable is not None:
        stable.check(layout.router)
    compute = told_compute(compute, checkpoint, layout)
    data = text.read(checkpoint, trust_remote_code=compute.trust_remote_code)
    return measured(
        checkpoint, data, compute,
        tiers=tiers, replay_tokens=replay_tokens, out=out, part=part, first=first, stable=stable, restart=restart,
        told=told,
    )  # fmt: skip


def told_compute(compute: Compute, checkpoint: Checkpoint, layout: Layout) -> Compute:
    """The same with its type settled. Device, type and memory are the first line of what the command says."""
    found = precision(compute, checkpoint, layout)
    compute = replace(compute, dtype=found.name)
    console.open_with(f"{compute.described}, {found.described}, {budget_of(compute).described}")
    console.hint(inputs_line(checkpoint.tensors))
    return compute


def _measured_until(
    checkpoint: Checkpoint,
    data: TokenData,
    compute: Compute,
    stable: Stable,
    tiers: Collection[str],
    replay_tokens: int,
    out: Path,
    restart: bool,
) -> Statistics:
    """As `measured`, of as much of the text as it takes. Parts stay in OUT.moekern/ until all are measured. For tiers
    that are measured of all text at once, parts are measured without any, and what they are in one pass more."""
    wanted = wanted_tiers(tiers, TIERS, "calibrate")
    again = bool(at_once(wanted))
    with working(out) as side:
        check_no_position(out, restart)
        if restart:
            remove_parts(side)

        def measure(part: TokenData, number: int, tiers: Collection[str] = () if again else tiers) -> Statistics:
            path = part_path(side, number)
            if "replay" in tiers and is_plain(path):
                path.unlink()  # nothing in the file says of how many tokens
            found = earlier_statistics(path, checkpoint, part, compute, tiers, restart=False)
            return found or measured(checkpoint, part, compute, tiers=tiers, replay_tokens=replay_tokens, out=path)

        ready: Callable[[Path], bool] = lambda left: left_whole(left, checkpoint, stable.asked(data), compute, tiers)  # noqa: E731
        if restart or not name_left(out, ready):
            check_unwritten(out)
            whole = (lambda part, number: measure(part, number, wanted)) if again else None
            until_stable(data, stable, measure, console.say, whole).save(out, new=True)
        remove_parts(side)
    return Statistics.load(out)


def measured(
    checkpoint: Checkpoint,
    data: TokenData,
    compute: Compute,
    *,
    tiers: Collection[str],
    replay_tokens: int = REPLAY_TOKENS,
    out: Path,
    part: Part | None = None,
    first: Path | None = None,
    stable: Stable | None = None,
    restart: bool = False,
    told: Told = lambda layer: None,
) -> Statistics:
    """Calibrate, and say how it goes; or go on where an earlier run was stopped, or take what it has measured and could
    not give its name. The type that is computed in is settled. With `stable`, as much of the text as it takes; `told`
    is as `calibrate` has it. Text that there is no room for is measured in groups."""
    if stable is not None:
        return _measured_until(checkpoint, data, compute, stable, tiers, replay_tokens, out, restart)
    check_no_parts(out, restart)
    resume = Resume(state_path(out), restart, console.say)
    if not restart and name_left(out, lambda left: left_whole(left, checkpoint, data, compute, tiers)):
        removed(resume.folder)
        return Statistics.load(out)
    with console.progress("calibrating", tokens=sum(data.tokens.values())) as step:
        statistics = calibrate(
            checkpoint,
            data,
            compute,
            tiers=tiers,
            replay_tokens=replay_tokens,
            out=out,
            resume=resume,
            part=part,
            first=first,
            progress=step,
            told=told,
        )
    console.say(backend_line(statistics.header["runs"][0]["backend"]))
    return statistics


def backend_line(backends: Mapping[str, str]) -> str:
    """Which backend served which ops: "kernels: native (router_stats, sort_by_expert)"."""
    ops: dict[str, list[str]] = {}
    for op, backend in backends.items():
        ops.setdefault(backend, []).append(op)
    return "kernels: " + "; ".join(f"{backend} ({', '.join(served)})" for backend, served in ops.items())


def verify_both(
    folder: Path,
    plan: Plan,
    pruned: Path,
    compute: Compute = Compute(),
    *,
    forward: bool,
    mtp: Mtp | None = None,
    recompute: Recompute | None = None,
    full: bool = False,
    statistics: Path | None = None,
) -> Verdict:
    """Bytes first, of refitted layers those that `recompute` gives too, and of constants those that `statistics` give;
    logits only of a checkpoint whose bytes are right, and of which none were trained."""
    check_device(compute.device)
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    console.hint(check_plan(plan, layout, checkpoint, replaced=True))
    vectors = vectors_of(plan, statistics, checkpoint, layout)
    with console.progress("verifying", "bytes") as step:
        report = verify(
            checkpoint, plan, pruned, mtp=mtp, recompute=recompute, full=full, vectors=vectors, progress=step
        )
    if not forward or report.problems:
        return Verdict(report, None)
    if report.trained:
        return Verdict(report, None, not_compared(str(pruned), report.trained))
    console.hint(inputs_line(checkpoint.tensors))
    with console.progress("comparing logits") as step:
        compared = compare_forward(checkpoint, plan, pruned, compute=compute, progress=step)
    return Verdict(report, compared)


def evaluate_plans(
    folder: Path,
    text: Text,
    compute: Compute,
    plans: Mapping[str, Plan],
    what: str = "evaluating",
    *,
    statistics: Path | None = None,
    layers: bool = False,
    restart: bool = False,
) -> Evaluation:
    """Held-out loss of the original and of plans applied on the fly; `statistics` give the constants of experts that
    plans replace, `layers` asks for what becomes of each layer."""
    if ORIGINAL in plans:
        raise InputError(f"a plan is named {ORIGINAL!r}, which is the name of the whole model's row; rename it")
    check_device(compute.device)
    checkpoint = open_checkpoint(folder)
    place = place_of_state(checkpoint, compute)
    whole, _ = as_whole(checkpoint)
    compute = told_compute(compute, whole, find_layout(whole))
    data = text.read(checkpoint, trust_remote_code=compute.trust_remote_code)
    resume = Resume(place, restart, console.say)
    return losses_of(checkpoint, data, compute, plans, resume, what, statistics=statistics, layers=layers)


def place_of_state(checkpoint: Checkpoint, compute: Compute) -> Path:
    """Where commands without a target write down how far they are. Raises InputError for a place in the model."""
    place = compute.spill or Path(tempfile.gettempdir())
    if place.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise InputError(f"--spill {place}: lies inside the model {checkpoint.folder}; name a folder elsewhere")
    return place


def losses_of(
    checkpoint: Checkpoint,
    data: TokenData,
    compute: Compute,
    plans: Mapping[str, Plan],
    resume: Resume | None,
    what: str = "evaluating",
    *,
    statistics: Path | None = None,
    layers: bool = False,
) -> Evaluation:
    """Evaluate, and say how it goes."""
    layout = find_layout(checkpoint) if plans else None
    for name, plan in plans.items():
        assert layout is not None
        console.hint(check_plan(plan, layout, checkpoint, name, replaced=True))
    with console.progress(what) as step:
        return evaluate(
            checkpoint, data, plans, compute, statistics=statistics, layers=layers, resume=resume, progress=step
        )


def check_iterated(out: Path) -> None:
    """Raise InputError unless `iterate` can make the plan `out`."""
    check_work(out)
    clean_up(out)
    if os.path.lexists(out) and is_folder(work_path(out)):
        with working(out) as side:
            if _made_from(side, out):  # by a run that was killed when it had saved the plan
                _remove_rounds(side)
    check_new(out)


def iterate_to(folder: Path, text: Text, compute: Compute, method: Method, out: Path, *, restart: bool = False) -> Plan:
    """Choose experts and save the plan. Rounds that are done, and how far the next one is, stay in OUT.moekern/ until
    the last one is."""
    check_iterated(out)
    backends_of(compute.device, compute.backend)
    measured = needs_text(method.criterion)
    if measured and not text.data:
        raise InputError(f"--criterion {method.criterion}: it is measured on text: give --data")
    if not measured and (text.data or method.domains):
        raise InputError(f"--data, --domain: {method.criterion} looks at weights alone; leave the text out")
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    compute = told_compute(compute, checkpoint, layout) if measured else compute
    data = text.read(checkpoint, trust_remote_code=compute.trust_remote_code) if measured else None
    experts = sum(layer.num_experts for layer in layout.layers.values())
    check_space(out, PLANNED * experts * method.rounds, method.rounds + 2)
    with working(out) as side, console.progress("measuring and planning") as step:
        try:
            plan = iterate(
                checkpoint,
                data,
                method,
                compute,
                earlier=[] if restart else _left(side, method.rounds),
                finished=lambda done: done.save(_round(side, len(done.provenance["earlier_rounds"]) + 1)),
                resume=Resume(state_path(out), restart, console.say),
                progress=step,
            )
        except NoRoomForText as found:
            why = "all of it is needed at each layer, so that it is not measured in groups"
            raise InputError(f"{found}; {why}", found.kind) from None
        check_plan(plan, layout, checkpoint.fingerprint)
        plan.save(out, new=True)
        removed(state_path(out))
        _remove_rounds(side)
    return plan


def _left(side: Path, rounds: int) -> list[Plan]:
    """The plans of rounds 1, 2, ... that a stopped run has left, as far as they are there. Raises InputError for what
    else stands at the name of a file that is to be written."""
    paths = [_round(side, number) for number in range(1, rounds)]
    for path in paths:
        is_plain(temporary_path(path))
    try:
        found = [Plan.load(path) if is_plain(path) else None for path in paths]
    except InputError as error:
        raise InputError(f"{error}; {ANEW}") from error
    return [plan for plan in itertools.takewhile(lambda plan: plan is not None, found) if plan is not None]


def _made_from(side: Path, out: Path) -> bool:
    """Whether the rounds that are left are all of those, or some, that the plan at `out` was made from."""
    try:
        rounds = Plan.load(out).provenance.get("earlier_rounds")
        left = {path.name: Plan.load(path) for path in side.glob("round-*.json") if is_plain(path)}
    except InputError:
        return False
    kept = {} if not isinstance(rounds, list) else {_round(side, n).name: keep for n, keep in enumerate(rounds, 1)}
    return all(
        {key: list(layer.keep) for key, layer in plan.layers.items()} == kept.get(name) for name, plan in left.items()
    )


def _round(side: Path, number: int) -> Path:
    return side / f"round-{number}.json"


def _remove_rounds(side: Path) -> None:
    """Remove the rounds of this run and of others that were stopped, and the folder when nothing else is in it."""
    with suppress(OSError):
        for path in side.glob(".round-*.json.moekern.tmp"):
            with suppress(InputError):  # a link, say, is not this program's
                remove_left(path)
        for path in side.glob("round-*.json"):
            with suppress(InputError):  # nor is what is no plan
                if is_plain(path) and Plan.load(path):
                    path.unlink()
        side.rmdir()

"""What the commands do, with progress and reuse of what an earlier run left: stages joined, nothing measured here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.calibration.options import Calibration, read_tokens
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.cli import console
from moekern.criteria import criterion_named, score_layer
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.estimation.overview import overview
from moekern.evaluation.losses import ORIGINAL, Evaluation, evaluate
from moekern.files import check_new, check_work, work_path
from moekern.iteration.rounds import Method, iterate, needs_text
from moekern.measurement.tiers import wanted_tiers
from moekern.measurement.weights import weigh
from moekern.model.compute import Compute, check_device, dtype_hint
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.plan.make import make_plan
from moekern.pruning.copying import room_needed
from moekern.pruning.preflight import check_space
from moekern.pruning.prune import Mtp, PruneReport, prune
from moekern.pruning.work_folder import check_target
from moekern.router import kept_count
from moekern.statistics.file import Statistics
from moekern.statistics.layer import TIERS
from moekern.verification.logits import ForwardVerdict, compare_forward
from moekern.verification.tensors import VerifyReport, verify


@dataclass(frozen=True)
class Verdict:
    """Bytes compared, and logits too where asked for."""

    report: VerifyReport
    forward: ForwardVerdict | None

    @property
    def good(self) -> bool:
        return not self.report.problems and (self.forward is None or self.forward.equal)

    def document(self) -> dict[str, Any]:
        forward = None if self.forward is None else {**asdict(self.forward), "equal": self.forward.equal}
        return {"good": self.good, **asdict(self.report), "forward": forward}


@dataclass(frozen=True)
class Run:
    """What `run` made, and where."""

    statistics: Path
    plan: Path
    pruned: PruneReport
    verdict: Verdict

    def document(self) -> dict[str, Any]:
        pruned = {**asdict(self.pruned), "out": str(self.pruned.out)}
        return {
            "statistics": str(self.statistics),
            "plan": str(self.plan),
            "pruned": pruned,
            "verify": self.verdict.document(),
        }


def calibrate_to(folder: Path, options: Calibration, out: Path) -> Statistics:
    """Measure and save. Everything that can be wrong with the input is found before the model is touched."""
    check_new(out)
    check_device(options.device)
    wanted_tiers(options.tiers, TIERS, "calibrate")
    if options.spill is not None and not os.access(options.spill, os.W_OK | os.X_OK):
        raise InputError(f"--spill {options.spill}: no folder that can be written to")
    checkpoint = open_checkpoint(folder)
    find_layout(checkpoint)
    return _measure(checkpoint, read_tokens(checkpoint, options), options, out)


def _measure(checkpoint: Checkpoint, data: TokenData, options: Calibration, out: Path) -> Statistics:
    console.hint(dtype_hint(checkpoint, options.device, options.dtype))
    with console.progress("calibrating") as step:
        statistics = calibrate(
            checkpoint,
            data,
            device=options.device,
            dtype=options.torch_dtype,
            tiers=options.tiers,
            replay_tokens=options.replay_tokens,
            spill=options.spill,
            backend=options.backend,
            trust_remote_code=options.trust_remote_code,
            progress=step,
        )
    console.say(backend_line(statistics.header["runs"][0]["backend"]))
    out.parent.mkdir(exist_ok=True)  # `run` keeps its own in a new folder, made when there is something to keep
    statistics.save(out)
    return Statistics.load(out)


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
    *,
    forward: bool,
    mtp: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Verdict:
    """Bytes first; logits only of a checkpoint whose bytes are right."""
    check_device(device)
    with console.progress("verifying", "bytes") as step:
        report = verify(folder, plan, pruned, mtp=mtp, progress=step)
    if not forward or report.problems:
        return Verdict(report, None)
    with console.progress("comparing logits") as step:
        compared = compare_forward(
            folder, plan, pruned, device=device, trust_remote_code=trust_remote_code, progress=step
        )
    return Verdict(report, compared)


def evaluate_plans(folder: Path, options: Calibration, plans: Mapping[str, Plan]) -> Evaluation:
    """Held-out loss of the original and of plans applied on the fly."""
    if ORIGINAL in plans:
        raise InputError(f"a plan is named {ORIGINAL!r}, which is the name of the whole model's row; rename it")
    check_device(options.device)
    checkpoint = open_checkpoint(folder)
    find_layout(checkpoint)
    data = read_tokens(checkpoint, options)
    console.hint(dtype_hint(checkpoint, options.device, options.dtype))
    with console.progress("evaluating") as step:
        return evaluate(
            checkpoint,
            data,
            plans,
            device=options.device,
            dtype=options.torch_dtype,
            trust_remote_code=options.trust_remote_code,
            progress=step,
        )


def run_stages(
    folder: Path,
    options: Calibration,
    out: Path,
    *,
    criterion: str,
    keep: float | int,
    protect_super: bool,
    mtp: Mtp,
    forward: bool,
) -> Run:
    """Calibrate, plan, prune, verify. Statistics of an earlier run with the same model and data are used again."""
    check_device(options.device)
    wanted_tiers(options.tiers, TIERS, "calibrate")
    checkpoint = open_checkpoint(folder)
    kept = kept_count(keep, find_layout(checkpoint))
    check_target(out, checkpoint.folder)
    check_space(out, room_needed(checkpoint, out.parent, overview(checkpoint).bytes_at(kept)), len(checkpoint.shards))
    data = read_tokens(checkpoint, options)
    work = work_path(out)
    statistics_path, plan_path = work / "statistics.safetensors", work / "plan.json"
    statistics = earlier_statistics(statistics_path, checkpoint, data, options)
    if statistics is None:
        statistics = _measure(checkpoint, data, options, statistics_path)
    plan = make_plan(statistics, criterion, keep, seed=options.seed, protect_super=protect_super)
    plan.save(plan_path)
    with console.progress("pruning", "bytes") as step:
        report = prune(checkpoint, plan, out, mtp=mtp, progress=step)
    verdict = verify_both(
        folder, plan, out, forward=forward, mtp=mtp, device=options.device, trust_remote_code=options.trust_remote_code
    )
    return Run(statistics_path, plan_path, report, verdict)


def earlier_statistics(path: Path, checkpoint: Checkpoint, data: TokenData, options: Calibration) -> Statistics | None:
    """Statistics an earlier run left, if they measured the same tokens of the same model; else None."""
    if not path.exists():
        return None
    found = Statistics.load(path)
    runs = found.header["runs"]
    same = (
        found.header["fingerprint"] == checkpoint.fingerprint
        and len(runs) == 1
        and runs[0].get("dtype") == options.dtype
        and runs[0].get("data") == json.loads(json.dumps(data.recipe))
        and all(set(options.tiers) <= {"routed", *s.tiers} for parts in found.layers.values() for s in parts.values())
    )
    if same:
        console.say(f"using the statistics of an earlier run: {path}")
    return found if same else None


def statistics_of(source: Path, criteria: Sequence[str], as_json: bool = False) -> Statistics:
    """A statistics file; or, for criteria of the weights alone, a checkpoint folder, whose shards are read once.

    Raises InputError for a folder and a criterion that needs text.
    """
    for text in criteria:
        if criterion_named(text).family != "weight" and source.is_dir():
            raise InputError(f"{source}: --criterion {text} needs text: calibrate first, and give the statistics file")
    if not source.is_dir():
        return Statistics.load(source)
    costly = any(re.search(r"\b(ews|wsr)\b", text) for text in criteria)
    with console.progress("weighing", "layers", as_json) as step:
        return weigh(source, costly=costly, progress=step)


def scores_of(
    statistics: Statistics, criterion: str, domains: Sequence[str] | None, seed: int
) -> dict[str, list[float]]:
    """Layer key -> the scores of its experts."""
    chosen = criterion_named(criterion)
    return {key: score_layer(chosen, statistics.layer(key, domains), key, seed).tolist() for key in statistics.layers}


def iterate_to(folder: Path, options: Calibration, method: Method, out: Path) -> Plan:
    """Choose experts and save the plan. Rounds that are done stay in OUT.moekern/ until the last one is."""
    check_new(out)
    check_work(out)
    check_device(options.device)
    text = needs_text(method.criterion)
    if text and not options.data:
        raise InputError(f"--criterion {method.criterion}: it is measured on text: give --data")
    if not text and (options.data or method.domains):
        raise InputError(f"--data, --domain: {method.criterion} looks at weights alone; leave the text out")
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    data = read_tokens(checkpoint, options) if text else None
    if text:
        console.hint(dtype_hint(checkpoint, options.device, options.dtype))
    side = work_path(out)
    earlier = _left(side)

    def finished(plan: Plan) -> None:
        side.mkdir(exist_ok=True)
        plan.save(_round(side, len(plan.provenance["earlier_rounds"]) + 1))

    with console.progress("measuring and planning") as step:
        plan = iterate(
            checkpoint,
            data,
            method,
            compute=Compute(options.device, options.torch_dtype, options.backend, options.trust_remote_code),
            earlier=earlier,
            finished=finished,
            progress=step,
        )
    check_plan(plan, layout, checkpoint.fingerprint)
    plan.save(out)
    for number in range(1, method.rounds):
        _round(side, number).unlink(missing_ok=True)
    if side.is_dir() and not any(side.iterdir()):
        side.rmdir()
    return plan


def _left(side: Path) -> list[Plan]:
    """The plans of rounds 1, 2, ... that a stopped run has left, as far as they are there."""
    plans: list[Plan] = []
    while _round(side, len(plans) + 1).exists():
        plans.append(Plan.load(_round(side, len(plans) + 1)))
    return plans


def _round(side: Path, number: int) -> Path:
    return side / f"round-{number}.json"

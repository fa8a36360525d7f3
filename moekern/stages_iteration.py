"""What `moekern iterate` does: the plan, and the rounds that a run which was stopped has left beside it."""

from __future__ import annotations

from pathlib import Path

from moekern import console
from moekern.architectures import find_layout
from moekern.calibration.options import Calibration, read_tokens
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.iteration.rounds import Method, iterate, needs_text
from moekern.model.compute import Compute, check_device, dtype_hint
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.stages import check_new_file


def iterate_to(folder: Path, options: Calibration, method: Method, out: Path) -> Plan:
    """Choose experts and save the plan. Rounds that are done stay in OUT.moekern/ until the last one is."""
    check_new_file(out)
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
    side = out.with_name(out.name + ".moekern")
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

"""One layer of one variant: its experts fitted to what the layer should make, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern.estimation.refit import REFINE, RIDGE
from moekern.refit.live import LiveExperts
from moekern.refit.refine import Refined, refine_experts
from moekern.refit.ridge import Refit, refit_down
from moekern.refit.rows import RowStore
from moekern.refit.target import Target
from moekern.refit.units import Unit
from moekern.refit.variants import Variant
from moekern.team import Team


@dataclass(frozen=True)
class Fitting:
    """`lacks` float32 [N, H]: of what the layer should make, what it does not without experts."""

    experts: LiveExperts
    lacks: RowStore
    target: Target
    held: Tensor  # bool [N]
    units: Sequence[Unit]
    team: Team
    memory: int | None
    folder: Path | None
    backend: str | None  # of the kernels
    told: Callable[[float], None]  # how much of it is done


def fitted(work: Fitting, variant: Variant, key: str) -> dict[str, Any]:
    """Fit the experts of layer `key`, in place; what is told of it, as JSON."""
    outputs, ridge, refine = _steps(work, variant)
    work.experts.subtract_from(work.lacks, work.units, outputs)
    record: dict[str, Any] = {"target": "block" if work.target.scale is None else "stream"}
    if variant.ridge is not None and not work.experts.known.linear:
        record["notes"] = ["a norm lies behind its experts: their down projections are not fitted by least squares"]
    elif variant.ridge is not None:
        found = refit_down(
            work.experts, work.lacks, work.held, variant.ridge,
            units=work.units, team=work.team, memory=work.memory, folder=work.folder, backend=work.backend, step=ridge,
        )  # fmt: skip
        record |= _of_ridge(found, work.target)
    if variant.refine is not None:
        with torch.enable_grad():
            refined = refine_experts(
                work.experts, work.lacks, work.held, variant.refine,
                name=key, team=work.team, memory=work.memory, folder=work.folder, step=refine,
            )  # fmt: skip
        record |= {"refine": _of_refine(refined, work.target)}
    error = None if work.experts.stored is None else work.experts.stored.error()
    return record if error is None else {**record, "requantised": error}


def forwards(variant: Variant) -> int:
    """Of all text through the experts, what fitting them is worth: their outputs once, and what follows."""
    return 1 + RIDGE * (variant.ridge is not None) + REFINE * (variant.refine is not None) if variant.fits else 0


def _steps(work: Fitting, variant: Variant) -> tuple[Callable[[], None], ...]:
    """To be called behind each expert of the three parts, they tell how much of all is done."""
    ridge, refine, count = variant.ridge, variant.refine, work.experts.count
    sizes = [
        (1, count),
        (RIDGE if ridge else 0, count * (1 + ridge.sweeps if ridge else 0)),
        (REFINE if refine else 0, count * (refine.sweeps if refine else 0)),
    ]
    done = 0.0

    def step_of(part: float) -> Callable[[], None]:
        def step() -> None:
            nonlocal done
            done += part
            work.told(min(done, 1.0))

        return step

    return tuple(step_of(weight / forwards(variant) / max(1, calls)) for weight, calls in sizes)


def _of_ridge(found: Refit, target: Target) -> dict[str, Any]:
    return {
        "ridge": found.ridge,
        "fitted": [target.relative(x, held=False) for x in (found.fitted.before, found.fitted.after)],
        "held": [target.relative(x, held=True) for x in (found.held.before, found.held.after)],
        "kept_as_it_was": found.kept_as_it_was,
        "alone": list(found.alone),
        "notes": list(found.notes),
    }


def _of_refine(found: Refined, target: Target) -> dict[str, Any]:
    return {
        "fitted": [target.relative(x, held=False) for x in found.fitted],
        "held": [target.relative(x, held=True) for x in found.held],
        "improved": found.improved,
        "put_back": found.put_back,
        "alone": list(found.alone),
    }

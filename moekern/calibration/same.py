"""Whether statistics are those that a calibration would measure."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from moekern.calibration.sharing import recipe_of
from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.measurement.tiers import backends_of, wanted_tiers
from moekern.model.compute import Compute
from moekern.model.journal import ANEW
from moekern.model.position import differences
from moekern.statistics.file import Statistics
from moekern.statistics.layer import TIERS


def check_same(
    path: Path,
    found: Statistics,
    checkpoint: Checkpoint,
    data: TokenData,
    compute: Compute,
    tiers: Collection[str],
    exactly: bool = False,
    then: str = f"of an earlier run, with another %s; give the same again and it is used, or {ANEW}",
) -> None:
    """Raise InputError unless statistics are what this calibration would measure, or (but for `exactly`) more: `then`
    is what is said of them, %s being what differs."""
    runs, wanted = found.header["runs"], wanted_tiers(tiers, TIERS, "calibrate")
    backends = backends_of(compute.device, compute.backend, wanted)
    run = runs[0] if len(runs) == 1 else {}
    served = {op: name for op, name in dict(run.get("backend") or {}).items() if op in backends}
    has = [tier for tier in found.tiers if exactly or tier in wanted]
    differing = differences(
        {
            "model": found.header["fingerprint"],
            "config.json": run.get("config"),
            "text": run.get("data"),
            "--tier": " ".join(has),
            "--dtype": run.get("dtype"),
            "kernels": served,
        },
        {
            "model": checkpoint.fingerprint,
            "config.json": checkpoint.config_sha256,
            "text": json.loads(json.dumps(recipe_of(data, compute, wanted))),
            "--tier": " ".join(wanted),
            "--dtype": compute.dtype_name,
            "kernels": backends,
        },
    )
    if differing:
        raise InputError(f"{path}: {then % differing}", kind="option")

"""Statistics that an earlier run left: used where they are what this one would measure, else refused by name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from moekern.calibration.same import check_same
from moekern.checkpoint.folder import Checkpoint
from moekern.cli import console
from moekern.cli.parts_left import remove_parts_of
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.files import is_plain
from moekern.measurement.tiers import wanted_tiers
from moekern.model.compute import Compute
from moekern.model.journal import ANEW
from moekern.model.state_folder import clean_up
from moekern.statistics.file import Statistics
from moekern.statistics.layer import TIERS


def earlier_statistics(
    path: Path, checkpoint: Checkpoint, data: TokenData, compute: Compute, tiers: Collection[str], *, restart: bool
) -> Statistics | None:
    """Statistics that an earlier run left; None where there are none, or all is measured anew.

    Raises InputError for those of another model, config or text, or that were measured otherwise.
    """
    if not is_plain(path) or restart:
        return None
    try:
        found = Statistics.load(path)
    except InputError as error:
        raise InputError(f"{error}; {ANEW}", error.kind) from error
    check_same(path, found, checkpoint, data, compute, tiers)
    remove_parts_of(path)
    clean_up(path)
    console.say(f"using the statistics of an earlier run: {path}")
    return found


def left_whole(left: Path, checkpoint: Checkpoint, data: TokenData, compute: Compute, tiers: Collection[str]) -> bool:
    """Whether the unnamed file of a stopped calibration is whole. Raises InputError for that of another one."""
    try:
        found = Statistics.load(left)
    except InputError:  # its header is written last
        return False
    wanted = wanted_tiers(tiers, TIERS, "calibrate")
    check_same(left, found, checkpoint, data, compute, wanted, exactly=True)
    if "replay" in wanted:  # nothing in the file says of how many tokens
        return False
    console.say(f"using what an earlier run has measured: {left}")
    return True

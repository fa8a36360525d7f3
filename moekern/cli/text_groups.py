"""Text whose hidden states fit neither memory nor disk: some whole segments of it at a time, a pass over the weights
each.

What a group measures is a part of the calibration (`statistics.parts`), in a file of the work folder that stays until
all are there; together they make the bytes of one pass. How many groups there are stands in the files' names: a run
that was stopped goes on with as many, in the one that it was in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from moekern.calibration.calibrate import Told, calibrate
from moekern.calibration.sharing import share_of
from moekern.checkpoint.folder import Checkpoint
from moekern.cli import console
from moekern.cli.earlier import check_same
from moekern.cli.parts_left import check_unwritten, group_path, groups_of, remove_groups_of
from moekern.data.batches import TokenData
from moekern.errors import InputError, NoRoomForText
from moekern.files import is_plain, state_path, working
from moekern.measurement.tiers import TABLE
from moekern.model.compute import Compute
from moekern.model.journal import Resume, clean_up
from moekern.statistics.file import Statistics
from moekern.statistics.parts import load_part, merge_parts, open_part
from moekern.team import Part


def divided(data: TokenData, found: NoRoomForText, tiers: Collection[str]) -> tuple[Part, ...]:
    """The fewest groups of which each has no more tokens than there is room for.

    Raises InputError where a segment has more, and for a tier that needs all of the text at once.
    """
    whole = data.by_chunk()
    for tier in tiers:
        if TABLE[tier].by in ("backward", "second pass", "replay"):
            raise InputError(f"{found}; without --tier {tier} it would be measured in groups of text", found.kind)
    for number in range(2, len(whole.units()) + 1):
        groups = groups_of(number)
        if all(sum(unit.tokens for unit in share_of(whole, group)) <= found.tokens for group in groups):
            return groups
    raise found


def measured_in_groups(
    checkpoint: Checkpoint,
    data: TokenData,
    compute: Compute,
    groups: Sequence[Part],
    tiers: Collection[str],
    out: Path,
    told: Told,
) -> Statistics:
    """As `pipeline.measured`, a group of segments after another; each stays in OUT.moekern/ until all are measured."""
    with working(out) as side:
        paths = [group_path(side, group) for group in groups]
        for group, path in zip(groups, paths, strict=True):
            if _is_measured(path, group, checkpoint, data, compute, tiers):
                continue
            what = f"calibrating, group {group.number} of {group.of}"
            resume = Resume(state_path(path), tell=console.say)
            with console.progress(what, tokens=sum(data.tokens.values()) // group.of) as step:
                calibrate(checkpoint, data, compute, tiers=tiers, out=path, resume=resume, part=group, progress=step)
        check_unwritten(out)
        merge_parts(paths).save(out, new=True)
    remove_groups_of(out)
    statistics = Statistics.load(out)
    for key in statistics.layers:
        told(Statistics(statistics.header, {key: statistics.layers[key]}))
    return statistics


def _is_measured(
    path: Path, group: Part, checkpoint: Checkpoint, data: TokenData, compute: Compute, tiers: Collection[str]
) -> bool:
    """Whether a group's file is there. Raises InputError for that of another calibration."""
    if not is_plain(path):
        return False
    check_same(path, load_part(path), checkpoint, data, compute, tiers, exactly=True)
    if open_part(path).part != group:
        raise InputError(f"{path}: holds another part of the text than its name says; move it away")
    clean_up(path)
    return True

"""Text whose hidden states fit neither memory nor disk: some whole segments of it at a time, a pass over the weights
each.

What a group measures is a part of the calibration (`statistics.parts`), in a file that stays until all are there;
together they make the bytes of one pass. How many groups there are stands in the files' names: a calibration that was
stopped goes on with as many, in the one that it was in.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from moekern.calibration.sharing import share_of
from moekern.data.batches import TokenData, loads
from moekern.errors import InputError, NoRoomForText
from moekern.files import is_folder, is_plain, remove_left, scratch, state_path, temporary_path, work_path, working
from moekern.measurement.tiers import not_by_segments
from moekern.model.state_folder import clean_up, removed
from moekern.statistics.file import Statistics
from moekern.statistics.parts import merge_parts, open_part
from moekern.team import Part

SPARE = 16  # of the room that was found, one part in so many is left: there may be less for the next group
_GROUP = re.compile(r"\.?group-([0-9]{1,4})-of-([0-9]{1,4})\.safetensors(\.moekern|\.moekern\.tmp)?")


def divided(data: TokenData, found: NoRoomForText, tiers: Collection[str], ranks: int) -> tuple[Part, ...]:
    """The fewest groups of which no rank has more tokens than there is room for.

    Raises InputError where a segment has more, and for a tier that needs all of the text at once.
    """
    whole = data.by_chunk()
    for tier in not_by_segments(tiers):
        raise InputError(f"{found}; without --tier {tier} it would be measured in groups of text", found.kind)
    for most in (found.tokens - found.tokens // SPARE, found.tokens):
        for number in range(2, len(whole.units()) + 1):
            groups = groups_of(number)
            shares = ([unit.tokens for unit in share_of(whole, group)] for group in groups)
            if all(max(loads(share, ranks)) <= most for share in shares):
                return groups
    raise found


Measure = Callable[[Path, Part], object]  # a group into a new file
Check = Callable[[Path], object]  # raises InputError for the file of another calibration


def measured_in_groups(
    groups: Sequence[Part], out: Path | None, spill: Path | None, measure: Measure, check: Check
) -> Statistics:
    """What all groups make together, in the file `out`; None: held, and what groups measure lies in `spill` meanwhile
    (None: the system's folder for such)."""
    if out is None:
        with scratch(spill or tempfile.gettempdir(), "groups") as folder:
            made = merge_parts(_measured(folder, groups, measure, check))
            return Statistics(made.header, {key: {d: layer[d] for d in layer} for key, layer in made.layers.items()})
    with working(out) as side:
        paths = _measured(side, groups, measure, check)
        check_unwritten(out)
        merge_parts(paths).save(out, new=True)
    remove_groups_of(out)
    return Statistics.load(out)


def _measured(folder: Path, groups: Sequence[Part], measure: Measure, check: Check) -> list[Path]:
    """The files of all groups, those that are there among them."""
    paths = [group_path(folder, group) for group in groups]
    for group, path in zip(groups, paths, strict=True):
        if not is_plain(path):
            measure(path, group)
            continue
        check(path)
        if open_part(path).part != group:
            raise InputError(f"{path}: holds another part of the text than its name says; move it away")
        clean_up(path)
    return paths


def check_unwritten(out: Path) -> None:
    """Remove what a killed process has left of a file. Raises InputError where another process is writing it."""
    if not remove_left(temporary_path(out)):
        raise InputError(f"{out}: another process is writing it, in {temporary_path(out)}; wait for it or stop it")


def group_path(side: Path, group: Part) -> Path:
    """The statistics of a group, in the work folder of those of the whole."""
    return side / f"group-{group.number}-of-{group.of}.safetensors"


def groups_left(out: Path) -> tuple[Part, ...]:
    """The groups of a stopped run, measured or not; none where no such run is kept there."""
    side = work_path(out)
    found = [match for match in map(_GROUP.fullmatch, os.listdir(side) if is_folder(side) else ()) if match]
    return groups_of(max(int(match[2]) for match in found)) if found else ()


def groups_of(number: int) -> tuple[Part, ...]:
    return tuple(Part(i, number) for i in range(1, number + 1))


def remove_groups(out: Path) -> None:
    """Remove them, and how far they are, unless another process is at work on them; what is no part of statistics is
    not this program's."""
    if not groups_left(out):
        return
    with working(out) as side:
        for name in sorted(os.listdir(side)):
            if match := _GROUP.fullmatch(name):
                remove_measured(group_path(side, Part(int(match[1]), int(match[2]))), open_part)


def remove_measured(path: Path, load: Callable[[Path], object]) -> None:
    """Remove a file that `load` takes, what a killed process has left of it, and how far that was."""
    removed(state_path(path))
    with suppress(InputError, OSError):
        remove_left(temporary_path(path))
    with suppress(InputError, OSError):
        if is_plain(path) and load(path):
            path.unlink()


def remove_groups_of(out: Path) -> None:
    """Remove the groups that the statistics at `out` were made from, by a run that was killed before it did that."""
    with suppress(InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
        paths = [group_path(work_path(out), group) for group in groups_left(out)]
        if paths and is_plain(out):
            runs = Statistics.load(out).header["runs"]
            if all(open_part(path).whole["runs"] == runs for path in paths if is_plain(path)):
                remove_groups(out)

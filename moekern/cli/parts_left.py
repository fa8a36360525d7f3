"""What is kept beside statistics that are not done: of each part of the text a file of its own, by `--until-stable`.

A calibration of the whole text keeps its position there instead, or groups of it (`calibration.text_groups`): neither
takes the other's for its own.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from moekern.calibration.text_groups import (
    check_unwritten,
    groups_left,
    remove_groups,
    remove_groups_of,
    remove_measured,
)
from moekern.errors import InputError
from moekern.files import is_folder, is_plain, state_path, work_path, working
from moekern.model.journal import ANEW
from moekern.model.state_folder import POSITION, removed
from moekern.statistics.file import Statistics

_PART = re.compile(r"(part-[0-9]{1,4}\.safetensors)(\.moekern)?")  # measured, or begun


def part_path(side: Path, number: int) -> Path:
    """The statistics of a part, in the work folder of those of the whole."""
    return side / f"part-{number}.safetensors"


def parts_left(side: Path) -> list[Path]:
    """The parts that are measured, or begun."""
    found = map(_PART.fullmatch, os.listdir(side) if is_folder(side) else ())
    return [side / name for name in sorted({each[1] for each in found if each})]


def remove_parts(side: Path) -> None:
    """Remove them, and how far they are; what is no statistics file is not this program's."""
    for path in parts_left(side):
        remove_groups(path)
        remove_measured(path, Statistics.load)


def remove_parts_of(out: Path) -> None:
    """Remove what the statistics at `out` were made from, by a run that was killed before it did that."""
    remove_groups_of(out)
    with suppress(InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
        parts = parts_left(work_path(out))
        if parts and is_plain(out):
            made = _text_of(out)
            if "until_stable" in made and all(_text_of(path) == made for path in parts if is_plain(path)):
                with working(out) as side:
                    remove_parts(side)


def _text_of(path: Path) -> dict[str, object]:
    (run,) = Statistics.load(path).header["runs"]
    return {name: value for name, value in run["data"].items() if name != "part"}


def check_no_parts(out: Path, restart: bool) -> None:
    """Raise InputError where parts are left, and all of the text is to be measured at once; to begin anew removes them,
    unless another process is at work on them."""
    if parts_left(work_path(out)):
        with working(out) as side:
            if not restart:
                raise _kept(side, "with --until-stable")
            remove_parts(side)


def check_no_position(out: Path, restart: bool) -> None:
    """Raise InputError where a run of the whole text was stopped, and it is to be measured in parts; to begin anew
    removes its position."""
    if restart:
        remove_groups(out)
    elif groups_left(out):
        raise _kept(work_path(out), "without --until-stable")
    folder = state_path(out)
    if is_folder(folder) and is_plain(folder / POSITION):
        if not restart:
            raise _kept(folder, "without --until-stable")
        check_unwritten(out)
        removed(folder)


def _kept(folder: Path, how: str) -> InputError:
    text = f"{folder}: a stopped run {how} is kept there; give the same again and it goes on, or {ANEW}"
    return InputError(text, kind="option")

"""Tensors that were trained after pruning, and settings: what a recovered checkpoint claims of them.

They stand in no source, as refitted ones do: what is known is that their bytes are those that training left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moekern.architectures import Layout
from moekern.checkpoint.folder import MANIFEST
from moekern.checkpoint.recovery import RECOVERY, read_recovery
from moekern.checkpoint.strict_json import shown
from moekern.errors import InputError
from moekern.verification.computed import Claim
from moekern.verification.record import without_folder

TRAINED = ("training leaves", "trained", RECOVERY)


def trained_claims(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    expected: Collection[str],
    plain: Collection[str],
    problems: list[str],
) -> dict[str, Claim]:
    """Name -> claim, for each of the `expected` tensors that moekern_recovery.json, or a line of the manifest, says was
    trained. plain: those that a refit may have written in another dtype. Where the two files do not name the same, or
    the record is no good, a line is added to `problems`, and what the manifest alone names has no checksum."""
    named = _named(lines, problems)
    try:
        record = read_recovery(folder)
    except InputError as error:
        problems.append(without_folder(folder, error))
        return {name: Claim(None, None, None, name in plain, TRAINED) for name in named if name in expected}
    tensors = {} if record is None else record["tensors"]
    problems += _more(RECOVERY, tensors.keys() - named, f"as trained, which {MANIFEST} does not")
    problems += _more(MANIFEST, named - tensors.keys(), f"as trained, which {RECOVERY} does not")
    problems += _more(RECOVERY, (tensors.keys() & named) - {*expected}, "which the plan leaves no place for")
    return {
        name: Claim(None, "xxh3-128", tensors.get(name), name in plain, TRAINED)
        for name in tensors.keys() | named
        if name in expected
    }


def trained_settings(folder: Path, layout: Layout, problems: list[str]) -> dict[tuple[str, ...], int]:
    """Config path -> number, of what moekern_recovery.json says that config.json has got since: how many experts a
    token chooses, which is no more than before. Whatever else it names is a line in `problems`."""
    try:
        record = read_recovery(folder)
    except InputError:
        return {}  # told before
    paths, found = {".".join(path): path for path in layout.top_k_paths}, {}
    for name, number in ({} if record is None else record.get("settings", {})).items():
        if name not in paths:
            problems.append(f"{RECOVERY}: settings: {shown(name)} is nothing that training changes")
        elif number > layout.router.top_k:
            most = f"no more than {layout.router.top_k}"
            problems.append(f"{RECOVERY}: settings: {name} is {shown(number)}, expected {most}")
        else:
            found[paths[name]] = number
    return found


def _named(lines: Sequence[Mapping[str, Any]], problems: list[str]) -> set[str]:
    """The tensors that the manifest says were trained."""
    found: set[str] = set()
    for line in lines:
        said = line.get("recover")
        names = said.get("tensors") if isinstance(said, dict) else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found.update(names)
        elif said is not None:
            problems.append(f"{MANIFEST}: {line.get('shard')}: recover: expected names of tensors")
    return found


def _more(file: str, names: Iterable[str], what: str) -> list[str]:
    """A line on names that only one file has, if there are any."""
    listed = sorted(names)
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return [f"{file}: names {shown(listed[0])}{more} {what}"] if listed else []

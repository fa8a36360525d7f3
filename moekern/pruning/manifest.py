"""moekern_manifest.jsonl: a line for each shard of a pruned checkpoint, as it was written."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.checkpoint.folder import MANIFEST
from moekern.checkpoint.strict_json import read_json_lines, shown
from moekern.errors import InputError
from moekern.plan.refit import is_sha256
from moekern.pruning.side_files import SideFile, side_file
from moekern.pruning.work_folder import Record

HEX = {"xxh3-128": 16, "blake3": 32}  # bytes of a checksum


@dataclass(frozen=True)
class RefittedBefore:
    """What a manifest says of a tensor that a refit computed: by which recipe, and its checksum, where it has one."""

    recipe: str
    kind: str | None
    checksum: bytes | None


def manifest(records: Sequence[Record], plan: str | None, told: Mapping[str, Mapping[str, Any]]) -> SideFile:
    """plan: its sha256. told: shard -> what else is to stand in its line: of a refit, of training."""
    text = ""
    for record in records:
        line = {
            "shard": record.shard,
            "size": record.size,
            "plan": plan,
            "checksum": record.checksum,
            "tensors": dict(record.tensors),
            "computed": list(record.computed),
            **told.get(record.shard, {}),
        }
        text += json.dumps(line, ensure_ascii=False) + "\n"
    return side_file(MANIFEST, text.encode())


def read_manifest(folder: Path) -> tuple[set[str], dict[str, RefittedBefore]]:
    """Of the manifest in a folder: names of the tensors that were computed, and what it says of those among them that a
    refit computed. Empty where there is none. Raises InputError for a file that holds no such lines."""
    path = folder / MANIFEST
    computed: set[str] = set()
    refitted: dict[str, RefittedBefore] = {}
    for line in read_json_lines(path) if os.path.lexists(path) else ():
        try:
            names, refits = _computed(line)
        except (AttributeError, KeyError, TypeError, ValueError):
            what = "expected checksums of tensors, names of those that were computed, a refit's recipe and names"
            wrong = f"shard {shown(line.get('shard'))}: {what}; it is no manifest that moekern wrote"
            raise InputError(f"{path}: {wrong}") from None
        computed.update(names)
        refitted.update(refits)
    if len({each.recipe for each in refitted.values()}) > 1:
        raise InputError(f"{path}: names two recipes of a refit; it is no manifest that moekern wrote")
    return computed, refitted


def _computed(line: Mapping[str, Any]) -> tuple[list[str], dict[str, RefittedBefore]]:
    """Of one line. Raises AttributeError, KeyError, TypeError and ValueError for what no line holds."""
    kind, checksums, refit = line["checksum"], line["tensors"], line.get("refit") or {"tensors": [], "recipe": None}
    computed, of = _names(line.get("computed", [])), _names(refit["tensors"])
    if of and not is_sha256(refit["recipe"]):
        raise ValueError
    found = {}
    for name in of:
        value = checksums.get(name)
        checksum = None if value is None else bytes.fromhex(value)
        if checksum is not None and len(checksum) != HEX[kind]:
            raise ValueError
        found[name] = RefittedBefore(refit["recipe"], kind, checksum)
    return computed, found


def _names(found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise TypeError
    return found

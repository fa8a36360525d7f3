"""moekern_recovery.json: which tensors of a pruned checkpoint were trained afterwards, and what they are then."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from moekern.checkpoint.strict_json import read_json, shown
from moekern.errors import InputError

RECOVERY = "moekern_recovery.json"
FORMAT = "moekern.recovered/1"
CHECKSUM = re.compile(r"[0-9a-f]{32}")  # XXH3-128
SHA256 = re.compile(r"[0-9a-f]{64}")


def read_recovery(folder: Path) -> dict[str, Any] | None:
    """What the file in `folder` says, checked; None where there is none. Its "tensors" are those whose bytes training
    has changed: name -> XXH3-128 of them, hex. "settings", where it is there, are the numbers of config.json that are
    others since, by dotted path. "source_fingerprint" is that of the model that was trained last.

    Raises InputError.
    """
    path = folder / RECOVERY
    if not os.path.lexists(path):
        return None
    found = read_json(path)

    def refuse(what: str) -> InputError:
        return InputError(f"{path}: {what}; it is no record of a recovery that moekern wrote")

    if found.get("format") != FORMAT:
        raise refuse(f'expected "format": "{FORMAT}", got {shown(found.get("format"))}')
    model, tensors = found.get("source_fingerprint"), found.get("tensors")
    if not isinstance(model, str) or not SHA256.fullmatch(model):
        raise refuse(f"source_fingerprint: expected a sha256, got {shown(model)}")
    if not isinstance(tensors, dict) or not tensors:
        raise refuse(f"tensors: expected an object of names and checksums, got {shown(tensors)}")
    for name, value in tensors.items():
        if not isinstance(value, str) or not CHECKSUM.fullmatch(value):
            raise refuse(f"checksum of {shown(name)}: expected 32 hexadecimal digits, got {shown(value)}")
    settings = found.get("settings", {})
    if not isinstance(settings, dict) or not all(type(number) is int and number > 0 for number in settings.values()):
        raise refuse(f"settings: expected an object of numbers above 0, got {shown(settings)}")
    return found

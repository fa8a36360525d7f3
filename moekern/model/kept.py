"""Documents that a run keeps in its work folder, each with a digest of itself: what was changed since is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekern.checkpoint.strict_json import read_json
from moekern.errors import InputError
from moekern.files import is_plain, write_bytes
from moekern.model.journal import ANEW

DIGEST = "sha256"  # of all other keys


def write_kept(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, in the place of an earlier one."""
    write_bytes(path, json.dumps({**document, DIGEST: _digest(document)}, indent=1).encode())


def read_kept(path: Path, *, restart: bool = False) -> dict[str, Any]:
    """What a run has kept; empty where it has not, where an older version has, and with `restart`. Raises InputError
    for a file that is none, or that somebody has changed."""
    if restart or not is_plain(path):
        return {}
    try:
        found = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; {ANEW}") from error
    digest = found.pop(DIGEST, None)
    if digest not in (None, _digest(found)):
        raise InputError(f"{path}: was changed since an earlier run has left it there; give it back, or {ANEW}")
    return {} if digest is None else found


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

"""JSON of a hostile file: sizes checked first, duplicates and deep nesting refused."""

from __future__ import annotations

import json
import re
import reprlib
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from moekern.checkpoint.pointers import check_no_pointer
from moekern.errors import InputError

HEADER_CAP = 100_000_000  # bytes of JSON: a million tensors in a header or an index
LINES_CAP = 1 << 28  # bytes of JSON lines; a manifest of 140,000 tensors has 20 MB
DEPTH_CAP = 64  # levels of a config, where real ones have six


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, such as config.json; duplicate keys and nesting beyond DEPTH_CAP are refused."""
    value = parse_json(read_file(path, HEADER_CAP), str(path))
    check_depth(value, str(path))
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file with one a line."""
    return [parse_json(line, str(path)) for line in read_file(path, LINES_CAP).splitlines()]


def check_depth(value: Any, source: str) -> None:
    """Raise InputError for JSON whose lists and objects are nested more than DEPTH_CAP deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEPTH_CAP):
        holders = (list(holder.values()) if isinstance(holder, dict) else holder for holder in level)
        level = [item for holder in holders for item in holder if isinstance(item, (dict, list))]
    if level:
        raise InputError(f"{source}: not valid JSON: nested more than {DEPTH_CAP} deep")


def parse_json(data: bytes, source: str, strict: bool = False) -> dict[str, Any]:
    """A JSON object. Refused: duplicate keys, strings that are not Unicode, too deep nesting. strict: also NaN and
    Infinity, which Python writes into configs, and minus zero, which is no integer of JSON."""

    def number(text: str) -> int:
        if text in ("-0", "NaN", "Infinity", "-Infinity"):
            raise ValueError(f"{text} is not a number here")
        return int(text)

    constant, whole = (number, number if b"-0" in data else None) if strict else (None, None)
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_int=whole)
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be encoded
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON parser's pairs. Raises ValueError, naming it, for a key that comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        count = Counter(key for key, _ in pairs)
        raise ValueError(f"duplicate key {shown(next(key for key in count if count[key] > 1))}")
    return found


def read_file(path: Path, cap: int) -> bytes:
    """A whole regular file of at most `cap` bytes; devices and pipes, which may never end, are refused."""
    check_no_pointer(path)
    if (size := regular_size(path)) > cap:
        raise InputError(f"{path}: {size} bytes, more than the limit of {cap}")
    return read_start(path, size)[0]


def regular_size(path: Path) -> int:
    """Size in bytes of a regular file, or of the one a symbolic link leads to; devices and pipes are refused."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file")
    return status.st_size


def read_start(path: Path, *sizes: int) -> list[bytes]:
    """The first bytes of a file in parts of these sizes, all of which the file was seen to have."""
    try:
        with path.open("rb") as file:
            parts = [file.read(size) for size in sizes]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if tuple(map(len, parts)) != sizes:
        raise InputError(f"{path}: the file has shrunk to {sum(map(len, parts))} bytes")
    return parts


def shown(value: Any) -> str:
    """repr of anything that JSON holds, cut to 80 printable characters; short work however large the value."""
    return f"{repr(value[:80]) if isinstance(value, str) else reprlib.repr(value):.80}"


def short(value: Any) -> str:
    """The same, cut to 40 characters."""
    text = shown(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

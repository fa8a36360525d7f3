"""Files and folders of text, as a person names them, and the token ids in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moekern import files
from moekern.checkpoint.pointers import check_no_pointer
from moekern.data.batches import DEFAULT_DOMAIN
from moekern.data.tokenizer import Tokenizer
from moekern.errors import InputError, first_line

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".rs", ".go", ".java", ".html", ".tex")
DATA_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".npy")


def sources_of(specs: Sequence[str]) -> dict[str, Path]:
    if not specs:
        raise InputError("--data: expected at least one NAME=PATH")
    sources: dict[str, Path] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        path = Path(rest if equals else spec)
        if not (rest if equals else spec):
            raise InputError(f"--data {spec}: no path is given; expected NAME=PATH")
        if not equals:
            name = DEFAULT_DOMAIN if len(specs) == 1 else path.stem
        if not name or "/" in name or not name.isprintable():
            raise InputError(f"--data {spec}: expected NAME=PATH with a plain name")
        if name in sources:
            raise InputError(f"--data {spec}: the domain {name!r} is named twice; put both into one folder")
        if not path.exists():
            raise InputError(f"--data {spec}: no such file or folder: {path}")
        sources[name] = path
    return sources


def files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"--data: {path} is a pipe or a device; give a file or a folder")
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in DATA_SUFFIXES)
    if not found:
        raise InputError(f"--data: {path} holds no file ending in {', '.join(DATA_SUFFIXES)}")
    return found


def digest_of(path: Path) -> str | dict[str, str]:
    if path.is_file():
        return files.sha256(path)
    return {str(p.relative_to(path)): files.sha256(p) for p in files_of(path)}


def documents_of(path: Path, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The token ids of each document: a text file, a line of JSONL, a row of an array."""
    return [np.asarray(ids, dtype=np.int64) for file in files_of(path) for ids in _documents(file, tokenizer)]


def _documents(file: Path, tokenizer: Tokenizer) -> Iterator[Sequence[int] | np.ndarray]:
    check_no_pointer(file)
    if file.suffix == ".npy":
        yield from _npy(file)
    elif file.suffix == ".jsonl":
        yield from _jsonl(file, tokenizer)
    else:
        text = _text(file)
        if text.strip():
            yield tokenizer.encode(text)


def _npy(file: Path) -> np.ndarray:
    try:
        ids = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, OverflowError, MemoryError) as error:  # its header may say any size
        raise InputError(f"{file}: not a readable .npy file of token ids") from error
    if not isinstance(ids, np.ndarray):
        raise InputError(f"{file}: not a readable .npy file of token ids")
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise InputError(f"{file}: expected integer token ids of shape [N] or [rows, N], got {ids.dtype} {ids.shape}")
    return np.atleast_2d(ids).astype(np.int64)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start})") from error


def _jsonl(file: Path, tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    try:
        for number, line in enumerate(_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}:{number}: not JSON ({error})") from error
            yield _row(row, tokenizer, f"{file}:{number}")
    finally:
        tokenizer.close()


def _row(row: Any, tokenizer: Tokenizer, where: str) -> Sequence[int]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with text, messages or input_ids")
    ids = row.get("input_ids")
    if isinstance(ids, list) and all(type(i) is int and abs(i) < 1 << 63 for i in ids):
        return ids
    if isinstance(row.get("text"), str):
        try:
            row["text"].encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: text holds half a surrogate pair, which is no character") from error
        return tokenizer.encode(row["text"])
    if isinstance(row.get("messages"), list):
        tokenizer.get()
        try:
            return tokenizer.chat(row["messages"])
        except InputError as error:
            raise InputError(f"{where}: messages: the chat template cannot render them: {first_line(error)}") from error
    raise InputError(f"{where}: expected text (a string), messages or input_ids (a list of integers)")

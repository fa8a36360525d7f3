"""What a file is made of: ranges of source files, columns of matrices in them, literal bytes, and bytes that are
computed when they are written."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from moekern.errors import InputError

RECIPES = 1  # version of all recipes: raise it when the same recipe gives other bytes


class Computed(NamedTuple):
    """Bytes that stand in no file. `make` is called once, when all before them is written, and what it gave is let go
    before the next piece is made: gigabytes of them are never held together."""

    recipe: str  # sha256 of what the bytes are made from and how: see `recipe`
    length: int
    make: Callable[[], bytes | memoryview]


class Columns(NamedTuple):
    """Columns of so many bytes that stay of a matrix [rows, width] in a file; rows that stay are columns of one row."""

    file: str
    offset: int
    rows: int
    width: int
    column_bytes: int
    kept: bytes  # their numbers, rising, int64


Range: TypeAlias = tuple[str, int, int]  # file, offset, length
Piece: TypeAlias = Range | bytes | Computed | Columns


def recipe(action: str, sources: Iterable[Range], **details: Any) -> str:
    """sha256 of what is done to which ranges of which files, as they are now: their sizes and times are part of it.

    `details` are all else that decides the bytes, of types whose repr says their value.
    """
    steps: list[Any] = [RECIPES, action, sorted(details.items())]
    for source in sources:
        steps.append((source, *_state_of(source[0])))
    return hashlib.sha256(repr(steps).encode()).hexdigest()


def made_from(pieces: Sequence[Piece]) -> str:
    """sha256 of all that decides a file's bytes: the pieces, and name, size and time of each file they come from.
    Nothing is computed for it: a computed piece counts by its recipe."""
    digest = hashlib.sha256()
    sources: set[str] = set()
    for piece in pieces:
        if isinstance(piece, bytes):
            digest.update(piece)
        elif isinstance(piece, Computed):
            digest.update(repr((piece.recipe, piece.length)).encode())
        elif isinstance(piece, Columns):
            digest.update(repr(piece[:-1]).encode())
            digest.update(piece.kept)
            sources.add(piece.file)
        else:
            digest.update(repr(piece).encode())
            sources.add(piece[0])
        digest.update(b"\0")
    for source in sorted(sources):
        digest.update(repr((source, *_state_of(source))).encode())
    return digest.hexdigest()


def computed(name: str, recipe: str, length: int, make: Callable[[], bytes | memoryview]) -> Computed:
    """The piece of tensor `name`. What `make` gives must have the length that the header says: InputError, else."""

    def checked() -> bytes | memoryview:
        made = make()
        found = made.nbytes if isinstance(made, memoryview) else len(made)
        if found != length:
            raise InputError(f"{name}: {found} bytes were computed, and its place in the file is {length} bytes long")
        return made

    return Computed(recipe, length, checked)


def _state_of(source: str | Path) -> tuple[int, int]:
    status = os.stat(source)
    return status.st_size, status.st_mtime_ns

"""From a domain to documents: which files it is of, and which parts of them a number of tokens is drawn from."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from moekern.checkpoint.pointers import A_POINTER, is_pointer
from moekern.data.hub import hub_rows
from moekern.data.left_out import LeftOut, Notes, Unreadable, counted
from moekern.data.mixes import Domain
from moekern.data.readers import FORMATS, File, Item, file_of, groups_of, plain_suffix, read_all, read_block
from moekern.data.rows import Document, Passage, document_of
from moekern.errors import InputError

# A domain is read whole up to so many bytes of text, and more for each token of its budget; parts of larger ones.
WHOLE = 1 << 20
WHOLE_PER_TOKEN = 8
BLOCK = (1 << 11, 1 << 18)  # bytes of the parts that are drawn, at least and at most
MOST_BLOCKS = 1 << 20
TOKEN_BYTES = 4  # of text, about
PAPERS = ("readme", "license", "licence", "copying", "notice", "changelog", "citation", "dataset_card", "datasheet")


@dataclass(frozen=True)
class Reading:
    """How a domain is read. budget: tokens wanted; None for all."""

    domain: Domain
    budget: int | None
    sequence_length: int
    column: str | None
    seed: tuple[int, ...]
    pack: bool = True
    prompts: int | None = None  # so many beginnings of texts, in the place of sequences

    @property
    def most(self) -> int | None:
        """Bytes up to which everything is read."""
        return None if self.budget is None else WHOLE + WHOLE_PER_TOKEN * self.budget

    @property
    def block(self) -> int:
        """Bytes of a part: about a sequence of tokens, and more where then 64 of them give all that is wanted."""
        wanted = max(TOKEN_BYTES * (self.budget or 0) // 64, TOKEN_BYTES * self.sequence_length)
        return min(max(wanted, BLOCK[0]), BLOCK[1])

    def generator(self) -> np.random.Generator:
        return np.random.default_rng([*self.seed, 1])


@dataclass(frozen=True)
class Documents:
    """The documents of a domain. drawn: they are parts of it in a random order, of which as many are read as needed."""

    items: Iterator[tuple[str, Item]]  # with the name of the file
    drawn: bool
    size: int = 0  # bytes of the files


def files_of(domain: Domain, left: LeftOut, notes: Notes) -> list[File]:
    """The files of text in a file or a folder, sorted. Raises InputError where there is none."""
    path = Path(domain.path)
    if path.is_file():
        candidates = [path]
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file())
        candidates = [p for p in found if plain_suffix(p) in FORMATS]
        others = Counter(p.suffix or "without suffix" for p in found if plain_suffix(p) not in FORMATS)
        if not candidates:
            raise InputError(f"--data {domain.name}={path} holds no file ending in {', '.join(FORMATS)}")
        if others:
            notes.say(f"{domain.name}: left out: {others.total():,} files of other kinds ({counted(others)})")
        candidates = _without_papers(domain, candidates, notes)
    else:
        raise InputError(f"--data: {path} is a pipe or a device; give a file or a folder")
    files = []
    left.files = len(candidates)
    for each in candidates:
        name = each.name if each == path else str(each.relative_to(path))
        try:
            if is_pointer(each):
                raise Unreadable(A_POINTER)
            file = file_of(each, name)
            _ = file.size, groups_of(file)  # what cannot be opened is known before anything is read
            files.append(file)
        except (Unreadable, OSError) as error:
            left.file(name, error if isinstance(error, Unreadable) else Unreadable(error.strerror or str(error)))
    return files


def _without_papers(domain: Domain, files: list[Path], notes: Notes) -> list[Path]:
    """Without what describes a folder of rows, which is none of its text."""
    papers = [path for path in files if path.stem.lower() in PAPERS and FORMATS[plain_suffix(path)] == "text"]
    if not papers or all(FORMATS[plain_suffix(path)] == "text" for path in files):
        return files
    named = ", ".join(str(path.relative_to(domain.path)) for path in papers[:3])
    more = f" and {len(papers) - 3:,} more" if len(papers) > 3 else ""
    notes.say(f"{domain.name}: left out: {named}{more}: beside files of rows; to read such a file, name it by itself")
    return [path for path in files if path not in papers]


def documents_of(reading: Reading, left: LeftOut, notes: Notes) -> Documents:
    """Rows, passages and ids of a domain: all of them in their order, or those that a budget is drawn from.

    A domain larger than `most` bytes is not read whole. Of text, JSON lines and ids, blocks are drawn from all over the
    files. The others, and what is compressed, can be read from their starts only: of each as many rows as its part of
    `most`, in a random order with the blocks.
    """
    if reading.domain.on_hub:
        left.files = 1
        seed = None if reading.budget is None else int(reading.generator().integers(1 << 31))
        rows = hub_rows(reading.domain, seed)
        return Documents(((reading.domain.shown, item) for item in rows), seed is not None)
    files = files_of(reading.domain, left, notes)
    if reading.most is None or _is_small(files, reading):
        return Documents(_everything(files, reading.column), False)
    return Documents(_drawn(files, reading, left, notes), True, sum(file.path.stat().st_size for file in files))


def _everything(files: list[File], column: str | None) -> Iterator[tuple[str, Item]]:
    for file in files:
        yield from _guarded(file, read_all(file, column))


def _guarded(file: File, items: Iterator[Item]) -> Iterator[tuple[str, Item]]:
    """Items, until the file turns out to be unreadable; then why."""
    try:
        for item in items:
            yield file.name, item
    except Unreadable as error:
        yield file.name, Item("", error)


def _is_small(files: list[File], reading: Reading) -> bool:
    most = reading.most or 0
    most -= sum(file.size for file in files if file.seekable)
    for file in files:
        if most < 0:
            return False
        if not file.seekable:
            most -= sum(item.size for item in _start(file, reading.column, most))
    return most >= 0


def _start(file: File, column: str | None, most: int, group: int | None = None) -> Iterator[Item]:
    """The items of a file, or of a row group, up to the one that goes beyond `most` bytes."""
    for _, item in _guarded(file, read_all(file, column, group)):
        yield item
        most -= item.size
        if most < 0:
            return


def _drawn(files: list[File], reading: Reading, left: LeftOut, notes: Notes) -> Iterator[tuple[str, Item]]:
    generator = reading.generator()
    rows = list(_from_starts([f for f in files if not f.seekable], reading, generator, left, notes))
    blocked = [file for file in files if file.seekable]
    size = max(reading.block, sum(file.size for file in blocked) // MOST_BLOCKS)
    ends = list(accumulate(-(-file.size // size) for file in blocked))
    bad: set[str] = set()
    for number in map(int, generator.permutation(len(rows) + (ends[-1] if ends else 0))):
        if number < len(rows):
            yield rows[number]
            continue
        place = bisect_right(ends, number - len(rows))
        file, block = blocked[place], number - len(rows) - (ends[place - 1] if place else 0)
        if file.name in bad:
            continue
        start = block * size
        for name, item in _guarded(file, read_block(file, start, min(start + size, file.size))):
            if is_file(item):
                bad.add(name)
            yield name, item


def _from_starts(
    files: list[File], reading: Reading, generator: np.random.Generator, left: LeftOut, notes: Notes
) -> Iterator[tuple[str, Item]]:
    """Rows of files that cannot be read from the middle."""
    most = reading.most or 0
    starts = [(file, group) for file in files for group in groups_of(file)]
    share = max(most // max(len(starts), 1), reading.block)
    seen = cut = 0
    for n in map(int, generator.permutation(len(starts))):
        if most < 0:
            break
        file, group = starts[n]
        got = 0
        for item in _start(file, reading.column, min(share, most), group):
            if is_file(item):  # said though the place that it was drawn for may not be reached
                left.file(file.name, item.value)
            got += item.size
            yield file.name, item._replace(value=Passage(item.value.text)) if isinstance(item.value, Passage) else item
        most -= got
        seen += 1
        cut += got > share
    if cut or seen < len(starts):
        notes.say(
            f"{reading.domain.name}: compressed files, JSON, CSV and row groups of parquet are drawn from their "
            f"starts: up to {share / 1e6:,.2f} MB each of {seen:,} of {len(starts):,}"
        )


def is_file(item: Item) -> bool:
    """Whether an item says that the rest of its file cannot be read."""
    return isinstance(item.value, Unreadable) and not item.where


def document_in(item: Item, column: str | None) -> Document | Unreadable | InputError:
    """The document of an item, or why there is none."""
    value: Any = item.value
    if isinstance(value, (Passage, np.ndarray, Unreadable, InputError)):
        return value
    try:
        return document_of(value, column)
    except Unreadable as error:
        return error

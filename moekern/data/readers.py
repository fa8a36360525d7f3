"""Files of text and of rows, read piece by piece: nothing holds a file.

A file is of one format. Text, JSON lines and arrays of ids can be read from any place, in blocks; the others, and what
is compressed, from the start only.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moekern.data.csv_rows import csv_rows
from moekern.data.json_rows import BLANK_LIMIT, json_rows, not_json
from moekern.data.left_out import Unreadable
from moekern.data.rows import Passage
from moekern.errors import InputError, first_line

TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".js", ".ts", ".rs", ".go", ".java", ".kt",
    ".cs", ".rb", ".php", ".swift", ".scala", ".sh", ".sql", ".html", ".css", ".tex",
)  # fmt: skip
FORMATS = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".npy": "ids",
}  # fmt: skip
COMPRESSED = (".gz", ".zst")
PIECE = 1 << 16  # bytes of text read, and characters tokenised, at a time
ROW_LIMIT = 1 << 26  # bytes of a row
PASSED_LIMIT = 1 << 30  # bytes of a longer row, behind which the rest of a file is not read
ID_BYTES = 4  # of text that a token id stands for, where files are compared by size
DAMAGED = (OSError, EOFError, zlib.error)  # what a broken compressed file raises


class Item(NamedTuple):
    """A row, a Passage or an array of ids; or why there is none."""

    where: str
    value: Any
    size: int = 0  # bytes or characters, roughly


@dataclass(frozen=True)
class File:
    """A file, its name in messages, and its format: text, lines, json, csv, parquet or ids."""

    path: Path
    name: str
    format: str

    @property
    def packed(self) -> str:
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSED else ""

    @property
    def seekable(self) -> bool:
        """Whether it can be read in blocks."""
        return self.format in ("text", "lines", "ids") and not self.packed

    @property
    def size(self) -> int:
        """In bytes; of ids, as many as their text may have had."""
        if self.format == "ids" and not self.packed:
            return len(_ids(self)) * ID_BYTES
        return self.path.stat().st_size


def plain_suffix(path: Path) -> str:
    """The suffix in lower case, without that of a compression."""
    return (Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix).lower()


def file_of(path: Path, name: str) -> File:
    """A file with its format: by its suffix; by its content where that says nothing, or JSON, which is often lines."""
    known = FORMATS.get(plain_suffix(path))
    if known in (None, "json"):
        with opened(File(path, name, "text")) as stream:
            known = _sniffed(stream, known)
    return File(path, name, known)


def _sniffed(stream: BinaryIO, known: str | None) -> str:
    head = stream.read(PIECE)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\x93NUMPY"):
        return "ids"
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] not in (b"{", b"["):
        return known or "text"
    line, _, rest = start.partition(b"\n")
    if _is_json(line) and rest.lstrip()[:1] in (b"{", b"["):
        return "lines"
    if known == "json":
        return known
    # What goes on behind a piece is told by how it begins: [section] or {% if %} are no JSON.
    is_json = _is_json(start) if len(head) < PIECE else re.match(rb'[\[{]\s*(\{\s*)?"', start)
    return "json" if is_json else "text"


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return False


@contextmanager
def opened(file: File) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed. Raises Unreadable for what cannot be opened or is damaged."""
    try:
        with file.path.open("rb") as raw:
            yield _unpacked(raw, file.packed, file.name)
    except DAMAGED as error:
        raise Unreadable(f"cannot be read: {first_line(error)}") from error


def _unpacked(raw: BinaryIO, packed: str, name: str) -> Any:
    if packed == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if packed == ".zst":
        zstandard = needed("zstandard", f"{name}: a .zst file")
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(_Raw(reader, zstandard.ZstdError))
    return raw


class _Raw(io.RawIOBase):
    """A decompressor as a file of the standard library, with its errors."""

    def __init__(self, reader: Any, error: type[Exception]) -> None:
        self.reader, self.error = reader, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self.reader.readinto(buffer)
        except self.error as error:
            raise OSError(first_line(error)) from error


def needed(library: str, what: str) -> Any:
    """A library of the extra `data`. Raises InputError where it is not installed."""
    from importlib import import_module

    try:
        return import_module(library)
    except ImportError as error:
        raise InputError(
            f"--data {what} needs the library {library.partition('.')[0]}: pip install 'moekern[data]'"
        ) from error


def read_all(file: File, column: str | None = None, group: int | None = None) -> Iterator[Item]:
    """Everything in a file, or in one of its row groups, in its order.

    Raises Unreadable for a file that is damaged or of another format.
    """
    if file.format == "ids":
        yield from _all_ids(file)
    elif file.format == "parquet":
        yield from _parquet(file, group)
    else:
        with opened(file) as stream:
            if file.format == "text":
                yield from _passages(stream)
            elif file.format == "lines":
                yield from _lines(stream)
            else:
                yield from _of_text(file, stream, column)


def read_block(file: File, start: int, stop: int) -> Iterator[Item]:
    """What begins between two bytes of a file that is `seekable`: lines, text up to the ends of lines, or ids."""
    if file.format == "ids":
        yield Item("", np.array(_ids(file)[start // ID_BYTES : stop // ID_BYTES], dtype=np.int64), stop - start)
        return
    with opened(file) as stream:
        if file.format == "lines":
            stream.seek(max(start - 1, 0))
            before = stream.readline(stop - start + 1) if start else b"\n"
            if not before.endswith(b"\n"):  # the block lies within a line
                _check_bytes(before)
                return
            yield from _lines(stream, stop)
        else:
            yield from _text_block(stream, start, stop)


def _lines(stream: BinaryIO, stop: int | None = None) -> Iterator[Item]:
    """Rows of JSON lines; with `stop`, those that begin before that byte."""
    number = blank = 0
    while stop is None or stream.tell() < stop:
        number += 1
        where = f"line {number}" if stop is None else f"byte {stream.tell()}"
        line = stream.readline(ROW_LIMIT + 1)
        if not line:
            return
        blank = 0 if line.strip() else blank + len(line)
        if blank > BLANK_LIMIT:
            raise Unreadable(f"more than {BLANK_LIMIT >> 20} MiB of blank lines; the rest of the file is not read")
        if len(line) > ROW_LIMIT:
            yield Item(where, Unreadable(f"a row of more than {ROW_LIMIT >> 20} MiB"))
            _pass_over(stream, line)
        elif line.strip():
            yield Item(where, _parsed(line), len(line))


def _pass_over(stream: BinaryIO, line: bytes) -> None:
    """Read up to the end of a line."""
    passed = 0
    while line and not line.endswith(b"\n"):
        _check_bytes(line)
        line = stream.readline(PIECE)
        passed += len(line)
        if passed > PASSED_LIMIT:
            raise Unreadable(f"a row of more than {PASSED_LIMIT >> 20} MiB; the rest of the file is not read")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8).strip())
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except (ValueError, RecursionError) as error:
        return Unreadable(not_json(error))


def _passages(stream: BinaryIO) -> Iterator[Item]:
    """A text in pieces that end where lines do."""
    held, begins = "", True
    for piece in _pieces(stream):
        if held:
            yield Item("", Passage(held, begins, ends=False), len(held))
            begins = False
        held = piece
    if held:
        yield Item("", Passage(held, begins, ends=True), len(held))


def _pieces(stream: BinaryIO) -> Iterator[str]:
    utf8 = codecs.getincrementaldecoder("utf-8")("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    held, seen = "", 0
    while True:
        chunk = stream.read(PIECE)
        at = seen - len(utf8.getstate()[0])
        seen += len(chunk)
        try:
            text = utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise Unreadable(f"not UTF-8 text (byte {at + error.start})") from error
        if at <= 0:
            text = text.removeprefix("\ufeff")
        held += newlines.decode(text, final=not chunk)
        _check_bytes(chunk)
        if not chunk:
            break
        if len(held) > 2 * PIECE:
            cut = cut_of(held)
            yield held[:cut]
            held = held[cut:]
    if held.strip():
        yield held


def _check_bytes(data: bytes) -> None:
    if b"\0" in data:
        raise Unreadable("holds NUL bytes: not text")


def cut_of(text: str) -> int:
    """The last place where a cut leaves the tokens of a text as they are: behind an end of line, else before a space.

    Tokenizers take spaces and ends of lines together, so an end of line that stands alone is looked for first.
    """
    for alone in (True, False):
        stop = len(text)
        while (stop := text.rfind("\n", 0, stop)) > 0:
            inside = stop + 1 < len(text) and not text[stop + 1].isspace()
            if inside and not (alone and text[stop - 1].isspace()):
                return stop + 1
    places = (text.rfind(space, 1) for space in "\n ")
    return next((place for place in places if place > 0), len(text))


def _text_block(stream: BinaryIO, start: int, stop: int) -> Iterator[Item]:
    """The lines that begin in a block; of a line that is longer than it, what lies in the block."""
    before = max(start - 1, 0)
    stream.seek(before)
    inside = stop - before  # bytes up to the end of the block, of which the first may be the one before it
    # No further than into the next block: where no line begins in that one, it is read as it lies.
    data = stream.read(inside + stop - start)
    begin = 0 if not start else data.find(b"\n", 0, inside - 1) + 1
    end = data.find(b"\n", inside - 1, max(inside, len(data) - 1)) + 1
    begin, end = begin or min(start, 1), end or inside
    # A character is of the block that its first byte is in.
    begin += _rest_of_character(data[begin:]) if start else 0
    end += _rest_of_character(data[end:])
    piece = data[begin:end]
    try:
        text = codecs.getincrementaldecoder("utf-8-sig" if not start else "utf-8")("strict").decode(piece)
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 text (byte {before + begin + error.start})") from error
    _check_bytes(piece)
    if text.strip():
        yield Item("", Passage(text.replace("\r\n", "\n").replace("\r", "\n")), len(piece))


def _rest_of_character(data: bytes) -> int:
    return len(data[:3]) - len(data[:3].lstrip(bytes(range(0x80, 0xC0))))


def _of_text(file: File, stream: BinaryIO, column: str | None) -> Iterator[Item]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        delimiter = "\t" if plain_suffix(file.path) == ".tsv" else ","
        is_json = file.format == "json"
        rows: Iterator[Any] = json_rows(text, ROW_LIMIT, column) if is_json else csv_rows(text, ROW_LIMIT, delimiter)
        for number, (row, size) in enumerate(rows, start=1):
            yield Item(f"row {number}", row, size)
    except UnicodeDecodeError as error:
        raise Unreadable("not UTF-8") from error
    finally:
        text.detach()


def groups_of(file: File) -> list[int | None]:
    """The row groups of a parquet file, each of which can be read alone; [None] for other files."""
    if file.format != "parquet":
        return [None]
    with _parquet_file(file) as parquet:
        return list(range(parquet.num_row_groups))


def _parquet(file: File, group: int | None) -> Iterator[Item]:
    where = "row" if group is None else f"row group {group}, row"
    number = 0
    with _parquet_file(file) as parquet:
        for batch in parquet.iter_batches(batch_size=64, row_groups=None if group is None else [group]):
            for row in batch.to_pylist():
                number += 1
                yield Item(f"{where} {number}", row, batch.nbytes // batch.num_rows)


@contextmanager
def _parquet_file(file: File) -> Iterator[Any]:
    parquet = needed("pyarrow.parquet", f"{file.name}: a .parquet file")
    try:
        with parquet.ParquetFile(file.path) as opened_file:
            yield opened_file
    except Exception as error:  # pyarrow's are of many kinds
        raise Unreadable(f"not a readable .parquet file ({first_line(error)})") from error


def _all_ids(file: File) -> Iterator[Item]:
    for row in np.atleast_2d(_array(file)):
        yield Item("", np.array(row, dtype=np.int64), len(row) * ID_BYTES)


def _ids(file: File) -> np.ndarray:
    return _array(file).reshape(-1)


def _array(file: File) -> np.ndarray:
    """Token ids [N] or [rows, N] of a .npy file, which stay on the disk."""
    if file.packed:
        raise Unreadable("a compressed .npy file; decompress it")
    try:
        ids = np.load(file.path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # its header is a program's text, of any size, and Python's parser reads it
        raise Unreadable("not a readable .npy file of token ids") from error
    if not isinstance(ids, np.ndarray):
        raise Unreadable("not a readable .npy file of token ids")
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise Unreadable(f"expected integer token ids of shape [N] or [rows, N], got {ids.dtype} {ids.shape}")
    if not ids.size:  # of any number of rows
        raise Unreadable(f"holds no token ids (shape {ids.shape})")
    return ids

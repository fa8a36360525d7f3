"""The rows of a JSON document of any size, one by one: a list of rows, an object that holds one, or a row."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from typing import Any, TextIO

from moekern.data.left_out import Unreadable
from moekern.data.rows import ROW_KEYS
from moekern.errors import first_line

STEP = 1 << 16  # characters read at a time
BLANK_LIMIT = 1 << 20  # characters of blank lines, or of spaces between values
MOST_KEYS = 1 << 16  # of an object that is a row or holds rows
BESIDE = frozenset({"tools", "images"})  # lists of a row that are no rows
DELIMITERS = " \t\r\n,]}"  # behind a number
_SPACE = " \t\r\n\ufeff"


def not_json(error: Exception) -> str:
    """What is wrong with JSON, without the place, which is one in a part of the document."""
    known = error.msg.removesuffix(" at").removesuffix(" starting") if isinstance(error, json.JSONDecodeError) else ""
    return f"not JSON ({known or first_line(error)})"


class Cursor:
    """A place in a JSON document, of which no more is held than the value that is being read."""

    def __init__(self, file: TextIO, most: int) -> None:
        self.file, self.most = file, most  # characters of one value
        self.held, self.at, self.ended = "", 0, False
        self.decoder = json.JSONDecoder()

    def _fill(self) -> bool:
        """Read more, at least as much again as is held, so that long values are not parsed often."""
        self.held, self.at = self.held[self.at :], 0
        if len(self.held) > self.most:
            raise Unreadable(f"not JSON, or a value of more than {self.most >> 20} MiB")
        more = "" if self.ended else self.file.read(max(STEP, len(self.held)))
        self.ended = not more
        self.held += more
        return bool(more)

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        blank = 0
        while True:
            start = self.at
            while self.at < len(self.held) and self.held[self.at] in _SPACE:
                self.at += 1
            blank += self.at - start
            if blank > BLANK_LIMIT:
                raise Unreadable(f"more than {BLANK_LIMIT >> 20} MiB of spaces; the rest of the file is not read")
            if self.at < len(self.held):
                return self.held[self.at]
            if not self._fill():
                return ""

    def skip(self, wanted: str) -> str:
        """Go beyond the next character, which must be one of `wanted`."""
        found = self.peek()
        if not found or found not in wanted:
            raise Unreadable(f"not JSON (expected one of {wanted}, found {found or 'the end'})")
        self.at += 1
        return found

    def value(self) -> tuple[Any, int]:
        """The next value, and how many characters it is written with."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.held, self.at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._fill():
                    raise Unreadable(not_json(error)) from error
                continue
            number = isinstance(value, (int, float))
            if number and self.held[end : end + 1] not in tuple(DELIMITERS) and self._fill():  # it may go on
                continue
            size, self.at = end - self.at, end
            return value, size


def json_rows(file: TextIO, most: int, column: str | None = None) -> Iterator[tuple[Any, int]]:
    """(row, characters); no row may have more than `most`. An object with `column` is a row, and others may follow it.

    Raises Unreadable where the document is not JSON, or holds no rows or several lists.
    """
    cursor = Cursor(file, most)
    start = cursor.peek()
    if start == "[":
        yield from _items(cursor)
    elif start == "{":
        while cursor.peek() == "{" and (yield from _in_object(cursor, ROW_KEYS | {column})):
            pass
    else:
        raise Unreadable("expected a JSON list of rows, or an object that holds one")
    if cursor.peek():
        raise Unreadable("not JSON (more behind its end)")


def _items(cursor: Cursor) -> Iterator[tuple[Any, int]]:
    cursor.skip("[")
    if cursor.peek() == "]":
        cursor.skip("]")
        return
    while True:
        yield cursor.value()
        if cursor.skip(",]") == "]":
            return


def _in_object(cursor: Cursor, row_keys: frozenset[str | None]) -> Generator[tuple[Any, int], None, bool]:
    """The rows of the one list of an object; or the object itself, where it has a key of a row, and then True."""
    row: dict[str, Any] = {}
    size, lists, keys = 0, 0, 0
    cursor.skip("{")
    while cursor.peek() != "}":
        key, more = cursor.value()
        size, keys = size + more, keys + 1
        cursor.skip(":")
        if not isinstance(key, str):
            raise Unreadable("not JSON (a key that is no string)")
        if cursor.peek() == "[" and key not in row_keys | BESIDE and not row_keys & row.keys():
            lists += 1
            if lists > 1:
                raise Unreadable(f"an object with several lists ({key!r} is another); expected one list of rows")
            yield from _items(cursor)
        else:
            row[key], more = cursor.value()
            size += more
            if size > cursor.most or keys > MOST_KEYS:
                raise Unreadable(f"an object of more than {cursor.most >> 20} MiB or {MOST_KEYS:,} keys")
        if cursor.peek() == ",":
            cursor.skip(",")
        elif cursor.peek() != "}":
            cursor.skip("},")
    cursor.skip("}")
    if row_keys & row.keys():
        yield row, size
        return True
    if not lists:
        raise Unreadable("an object that holds neither a list of rows nor text of its own")
    return False

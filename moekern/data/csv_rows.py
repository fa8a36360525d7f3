"""The rows of a CSV file of any size, one by one."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import TextIO

from moekern.data.json_rows import BLANK_LIMIT
from moekern.data.left_out import Unreadable

MOST_COLUMNS = 1 << 14


class _Lines:
    """Lines for csv, of which a row may have no more than `most` characters."""

    def __init__(self, file: TextIO, most: int) -> None:
        self.file, self.most = file, most
        self.held = self.blank = 0  # characters since the last row, and since the last line that is not blank

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(self.most + 1):
            self.held += len(line)
            self.blank = 0 if line.strip() else self.blank + len(line)
            if self.held > self.most:
                raise Unreadable(f"a row of more than {self.most >> 20} MiB; the rest of the file is not read")
            if self.blank > BLANK_LIMIT:
                raise Unreadable(f"more than {BLANK_LIMIT >> 20} MiB of blank lines; the rest of the file is not read")
            yield line


def csv_rows(file: TextIO, most: int, delimiter: str) -> Iterator[tuple[dict[str, str] | Unreadable, int]]:
    """(row by column, or why there is none; characters). Raises Unreadable where the file is not CSV, or has a row of
    more than `most` characters.
    """
    before = csv.field_size_limit(most)
    lines = _Lines(file, most)
    try:
        reader = csv.DictReader(lines, delimiter=delimiter)
        if len(reader.fieldnames or ()) > MOST_COLUMNS:
            raise Unreadable(f"more than {MOST_COLUMNS:,} columns")
        lines.held = 0
        for row in reader:
            lines.held = 0
            if None in row:
                yield Unreadable("more cells than columns"), 0
            else:
                yield row, sum(len(cell or "") for cell in row.values())
    except csv.Error as error:
        raise Unreadable(f"not CSV ({error})") from error
    finally:
        csv.field_size_limit(before)

"""What a person sees: tables and progress on a terminal, plain lines in a log, JSON when asked for."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LOG_EVERY = 10.0  # seconds between plain progress lines

Step = Callable[[int, int], None]  # (done, total)

_err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line for a person, on standard error so that standard output stays data."""
    _err.print(text, markup=False)


def emit(document: Any) -> None:
    """A JSON document on standard output; numbers that JSON lacks (NaN, infinity) become null."""
    text = json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False)
    encoding = sys.stdout.encoding or "utf-8"
    if text.encode(encoding, "replace").decode(encoding) != text:
        text = json.dumps(_finite(document), indent=1, allow_nan=False)
    sys.stdout.write(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output; the first column is text, the others are numbers."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console(highlight=False)
    # A line that a narrow terminal wraps can be read; a number cut short cannot.
    unbounded = console.options.update(width=1 << 16)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum, len(title))
    console.print(title, markup=False, style="bold")
    console.print(table)


@contextmanager
def progress(what: str, unit: str = "layers") -> Iterator[Step]:
    """A bar on a terminal, a plain line every few seconds elsewhere. Yields step(done, total)."""
    if _err.is_terminal:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=_err,
            transient=True,
        )
        with bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _plain(what, unit)


def _plain(what: str, unit: str) -> Step:
    started = last = time.monotonic()

    def step(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LOG_EVERY and done < total:
            return
        last = now
        spent = now - started
        left = f", {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
        shown = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done}/{total} {unit}"
        say(f"{what}: {shown}, {spent:.0f} s{left}")

    return step


def size(nbytes: float) -> str:
    """Bytes with a binary unit: 1536 -> "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while nbytes >= 1024 and power + 1 < len(units):
        nbytes /= 1024
        power += 1
    return f"{nbytes:.0f} {units[power]}" if power == 0 else f"{nbytes:.1f} {units[power]}"

"""What a person sees: tables and progress on a terminal, plain lines in a log.

With --json a program reads instead: one document on standard output, and on standard error an object a line:
{"stage", "done", "total", ...} for progress, {"note"} for what a person would be told, {"error", "kind"} at the end.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from moekern.errors import InputError, printable

LOG_EVERY = 10.0  # seconds between plain progress lines
JSON_EVERY = 1.0

Step = Callable[[int, int], None]  # (done, total)

_err = Console(stderr=True, highlight=False, soft_wrap=True)
_as_json = False  # of the process: greenlets and threads say things too


def as_json() -> bool:
    """Whether a program reads, not a person."""
    return _as_json


def set_json(value: bool) -> bool:
    """Set the mode for the rest of the command; the callback of --json."""
    global _as_json
    _as_json = value
    return value


@contextmanager
def output(as_json: bool) -> Iterator[None]:
    """A command's mode until its flags are parsed, when `set_json` has the word; afterwards the mode is what it was."""
    before = _as_json
    set_json(as_json)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warning(warnings.showwarning)
            yield
    finally:
        set_json(before)


def _warning(as_text: Callable[..., None]) -> Callable[..., None]:
    """Warnings of libraries must not come between JSON lines."""
    return lambda message, *where, **more: say(str(message)) if _as_json else as_text(message, *where, **more)


def say(text: str) -> None:
    """A line for a person, on standard error so that standard output stays data."""
    if _as_json:
        _line({"note": text})
    else:
        _err.print(printable(text), markup=False)


def fail(text: str, kind: str, **more: str) -> None:
    """The error that ends the command; its exit code says so even where nothing can be written."""
    with suppress(OSError):
        if _as_json:
            _line({"error": text, "kind": kind, **more})
        else:
            print(f"moekern: {printable(text)}", file=sys.stderr, flush=True)


def _line(document: dict[str, Any]) -> None:
    print(json.dumps(_finite(document), allow_nan=False), file=sys.stderr, flush=True)


def hint(text: str | None) -> None:
    """A line for a person, where there is one."""
    if text is not None:
        say(text)


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
    title = printable(title)
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console = Console(highlight=False)
    # A line that a narrow terminal wraps can be read; a number cut short cannot.
    unbounded = console.options.update(width=1 << 16)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum, len(title))
    console.print(title, markup=False, style="bold")
    console.print(table)


@contextmanager
def progress(what: str, unit: str = "layers") -> Iterator[Step]:
    """A bar on a terminal, a plain line every few seconds elsewhere, JSON lines on standard error with --json.

    Yields step(done, total).
    """
    if as_json():
        yield _lines(lambda moment: _say_json(what, unit, moment), JSON_EVERY)
    elif _err.is_terminal:
        rate = [DownloadColumn(binary_units=True), TransferSpeedColumn()] if unit == "bytes" else []
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            *rate,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=_err,
            transient=True,
        )
        with bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _lines(lambda moment: _say_plain(what, unit, moment), LOG_EVERY)


class Moment(NamedTuple):
    """How far a stage has come. rate is per second since the first step, 0 while it is not known."""

    done: int
    total: int
    seconds: float
    rate: float

    @property
    def left(self) -> float | None:
        """Seconds."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None


def _lines(tell: Callable[[Moment], None], every: float) -> Step:
    started = last = time.monotonic()
    first: int | None = None

    def step(done: int, total: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = done if first is None else first  # what an earlier run has done says nothing about the rate
        if now - last < every and done < total:
            return
        last = now
        spent = now - started
        tell(Moment(done, total, spent, (done - first) / spent if spent > 0 else 0.0))

    return step


def _say_plain(what: str, unit: str, moment: Moment) -> None:
    done, total, seconds, rate = moment
    shown = f"{size(done)} of {size(total)}" if unit == "bytes" else f"{done}/{total} {unit}"
    speed = f", {size(rate)}/s" if unit == "bytes" and rate else ""
    left = f", {moment.left:.0f} s left" if moment.left and done < total else ""
    say(f"{what}: {shown}{speed}, {seconds:.0f} s{left}")


def _say_json(what: str, unit: str, moment: Moment) -> None:
    line: dict[str, Any] = {
        "stage": what, "unit": unit, "done": moment.done, "total": moment.total,
        "seconds": round(moment.seconds, 3), "rate": round(moment.rate, 3), "seconds_left": moment.left,
    }  # fmt: skip
    _line(line)


def parsed_size(flag: str, text: str) -> int:
    """Bytes: "5GB" is 5e9, "512MiB" 512 * 2^20, "4096" itself. Raises InputError that names the flag."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not found or (found[3] and not found[2]):
        raise InputError(f"{flag} {text}: expected a size such as 5GB or 512MiB")
    power = " KMGT".index(found[2].upper() or " ")
    nbytes = float(found[1]) * (1024 if found[3] else 1000) ** power
    if nbytes >= 1 << 63:
        raise InputError(f"{flag} {text:.80}: more bytes than there are")
    return int(nbytes)


def size(nbytes: float) -> str:
    """Bytes with a binary unit: 1536 -> "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while nbytes >= 1024 and power + 1 < len(units):
        nbytes /= 1024
        power += 1
    return f"{nbytes:.0f} {units[power]}" if power == 0 else f"{nbytes:.1f} {units[power]}"

"""What a person sees: tables and progress on a terminal, plain lines in a log.

With --json a program reads instead: one document on standard output, and on standard error an object a line:
{"stage", "done", "total", ...} for progress, {"note"} for what a person would be told, {"error", "kind"} at the end.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

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
)
from rich.table import Table
from rich.text import Text

from moekern.errors import InputError, printable
from moekern.files import sized

LOG_EVERY = 10.0  # seconds between plain progress lines
JSON_EVERY = 1.0
LEAST_WIDTH = 16  # of a column of names or sentences on a terminal

Step = Callable[[float, int], None]  # (done, total)

_err = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass
class Mode:
    """What of the process's words is shown and how: of the process, since greenlets and threads say things too."""

    as_json: bool = False
    silent: bool = False  # another process of the team speaks: nothing at all
    quiet: bool = False  # nothing but results and errors
    verbose: bool = False  # where an error comes from, too
    log: TextIO | None = None  # what is said, with the time
    opening: str | None = None  # said before the first other line, and not before an error


_mode = Mode()


def as_json() -> bool:
    """Whether a program reads, not a person."""
    return _mode.as_json


def verbose() -> bool:
    """Whether a person wants to know where an error comes from."""
    return _mode.verbose


def set_json(value: bool) -> bool:
    """Set the mode for the rest of the command; the callback of --json."""
    _mode.as_json = value
    return value


def set_quiet(value: bool) -> bool:
    """The callback of --quiet."""
    _mode.quiet = value
    return value


def set_verbose(value: bool) -> bool:
    """The callback of --verbose."""
    _mode.verbose = value
    return value


def set_log(path: Path | None) -> Path | None:
    """Append what is said to a file; the callback of --log-file. Raises InputError where it cannot be opened."""
    if path is not None and not _mode.silent:
        try:
            _mode.log = path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--log-file {path}: {error.strerror}") from error
        log("moekern " + shlex.join(sys.argv[1:]))
    return path


def log(text: str) -> None:
    """A line of the log file, where there is one."""
    if _mode.log is not None:
        print(time.strftime("%Y-%m-%dT%H:%M:%S%z"), printable(text), file=_mode.log, flush=True)


def open_with(text: str) -> None:
    """What is to be said before anything else is: an error in the input is one line and needs no such words."""
    _mode.opening = text


def _open() -> None:
    opening, _mode.opening = _mode.opening, None
    if opening is not None:
        say(opening)


@contextmanager
def output(as_json: bool, silent: bool = False) -> Iterator[None]:
    """A command's mode until its flags are parsed, when `set_json` has the word; afterwards the mode is what it was."""
    global _mode
    before, _mode = _mode, Mode(as_json, silent)
    notes, words = logging.getLogger("moekern"), _Notes()
    level = notes.level
    notes.addHandler(words)
    notes.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warning(warnings.showwarning)
            if silent:
                warnings.simplefilter("ignore")
            yield
    finally:
        notes.removeHandler(words)
        notes.setLevel(level)
        if _mode.log is not None:
            _mode.log.close()
        _mode = before


class _Notes(logging.Handler):
    """Says what the parts tell of how they go."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def _warning(as_text: Callable[..., None]) -> Callable[..., None]:
    """Warnings of libraries must not come between JSON lines."""
    return lambda message, *where, **more: say(str(message)) if _mode.as_json else as_text(message, *where, **more)


def say(text: str) -> None:
    """A line for a person, on standard error so that standard output stays data."""
    _open()
    log(text)
    if _mode.quiet or _mode.silent:
        return
    if _mode.as_json:
        _line({"note": text})
    else:
        _err.print(printable(text), markup=False)


def detail(text: str) -> None:
    """A line for programs, for the log, and with --verbose for a person."""
    if _mode.as_json or _mode.verbose:
        say(text)
    else:
        log(text)


def fail(text: str, kind: str, **more: str) -> None:
    """The error that ends the command. Where nobody can read it any more, the exit code tells."""
    with suppress(OSError):
        log(f"error: {text}")
        if _mode.as_json:
            _line({"error": text, "kind": kind, **more})
        else:
            print(f"moekern: {printable(text)}", file=sys.stderr, flush=True)


def _line(document: dict[str, Any]) -> None:
    print(json.dumps(finite(document), allow_nan=False), file=sys.stderr, flush=True)


def hint(text: str | None) -> None:
    """A line for a person, where there is one."""
    if text is not None:
        say(text)


def emit(document: Any) -> None:
    """A JSON document on standard output; numbers that JSON lacks (NaN, infinity) become null."""
    text = json.dumps(finite(document), indent=1, ensure_ascii=False, allow_nan=False)
    encoding = sys.stdout.encoding or "utf-8"
    if text.encode(encoding, "replace").decode(encoding) != text:
        text = json.dumps(finite(document), indent=1, allow_nan=False)
    sys.stdout.write(text + "\n")


def finite(value: Any) -> Any:
    """The same with null in the place of numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output; columns of names, of numbers, or of sentences. Where a terminal is too narrow,
    headings and sentences are wrapped and long names folded: a number cut short cannot be read. With --json nothing:
    the one document there has all that is to be shown."""
    if as_json():
        return
    title = printable(title)
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    console = Console(highlight=False)
    # What goes elsewhere is as wide as it is.
    full = [max(map(len, (name, *(row[n] for row in cells)))) for n, name in enumerate(columns)]
    gaps = 3 * len(columns) - 1
    fits = not console.is_terminal or sum(full) + gaps <= console.width
    widths = full if fits else _narrowed(columns, cells, full, console.width - gaps)
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for n, (name, width) in enumerate(zip(columns, widths, strict=True)):
        kind = _kind(n, [row[n] for row in cells])
        heading = "\n".join(textwrap.wrap(name, width)) if kind == "number" else name
        table.add_column(Text(heading), justify="right" if kind == "number" else "left", width=width, overflow="fold")
    for row in cells:
        table.add_row(*(Text(_folded(cell, width)) for cell, width in zip(row, widths, strict=True)))
    console.width = max(console.width, sum(widths) + gaps, len(title))
    console.print(title, markup=False, style="bold")
    console.print(table)


def _narrowed(columns: Sequence[str], cells: list[list[str]], full: list[int], room: int) -> list[int]:
    """Widths of columns: numbers keep theirs, names and sentences share what these leave of `room`."""
    kinds = [_kind(n, [row[n] for row in cells]) for n in range(len(columns))]
    widths = [
        max(len(word) for word in (*name.split(), *(row[n] for row in cells))) if kind == "number" else 0
        for n, (name, kind) in enumerate(zip(columns, kinds, strict=True))
    ]
    room -= sum(widths)
    others = sorted((n for n, kind in enumerate(kinds) if kind != "number"), key=lambda n: full[n])
    for place, n in enumerate(others):  # the shortest first: what it does not need is the others'
        widths[n] = min(full[n], max(LEAST_WIDTH, room // (len(others) - place)))
        room -= widths[n]
    return widths


def _folded(cell: str, width: int) -> str:
    """A path that is too long for its column, a line of it ending with a folder where one can."""
    lines = []
    while len(cell) > width and " " not in cell:
        cut = cell.rfind("/", 0, width) + 1 or width
        lines.append(cell[:cut])
        cell = cell[cut:]
    return "\n".join([*lines, cell])


def _kind(column: int, cells: Sequence[str]) -> str:
    """ "name" for the first column and for words, "sentence" for several of them, else "number", lists of them too."""
    if column and any(map(_is_sentence, cells)):
        return "sentence"
    return "name" if not column or any(cell[:1].isalpha() for cell in cells) else "number"


def _is_sentence(cell: str) -> bool:
    """Words, as opposed to a number with its unit and to a list of numbers."""
    return sum(word.isalpha() for word in cell.split()) > 3


def columns() -> int:
    """Of the terminal; 120 where results go elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 120


@contextmanager
def progress(what: str, unit: str = "layers", tokens: int = 0) -> Iterator[Step]:
    """A bar on a terminal, a plain line every few seconds elsewhere, JSON lines on standard error with --json.

    Yields step(done, total). `tokens` of text go through each layer: their rate is told.
    """
    to_log = _lines(lambda moment: log(_plain(what, unit, tokens, moment)), LOG_EVERY)
    with ExitStack() as stack:
        if _mode.quiet or _mode.silent:
            shown: Step = lambda done, total: None  # noqa: E731
        elif as_json():
            shown = _lines(lambda moment: _say_json(what, unit, moment), JSON_EVERY)
        elif _err.is_terminal:
            shown = _bar(what, unit, tokens, stack)
        else:
            shown = _lines(lambda moment: _err.print(_plain(what, unit, tokens, moment), markup=False), LOG_EVERY)

        def step(done: float, total: int) -> None:
            _open()
            shown(done, total)
            to_log(done, total)

        yield step


def _bar(what: str, unit: str, tokens: int, stack: ExitStack) -> Step:
    sizes = [DownloadColumn(binary_units=True)] if unit == "bytes" else []
    bar = stack.enter_context(
        Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None if _err.width > 100 else 20),
            TaskProgressColumn(),
            *sizes,
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=_err,
            transient=True,
        )
    )
    task = bar.add_task(what, total=None, told="")
    counted = _Rate()

    def step(done: float, total: int) -> None:
        rate = counted.rate(done, time.monotonic())
        told = f"{rate * tokens:,.0f} tokens/s" if tokens and rate else f"{sized(rate)}/s" if sizes and rate else ""
        bar.update(task, completed=done, total=total, told=told)

    return step


class Moment(NamedTuple):
    """How far a stage has come. rate is per second since the first step, 0 while it is not known."""

    done: float
    total: int
    seconds: float
    rate: float

    @property
    def left(self) -> float | None:
        """Seconds."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None


class _Rate:
    """Counts from the first step: what an earlier run has done, and what was prepared, says nothing about the rate."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None  # done, and when

    def rate(self, done: float, now: float) -> float:
        if self.first is None:
            self.first = done, now
        spent = now - self.first[1]
        return (done - self.first[0]) / spent if spent > 0 else 0.0


def _lines(tell: Callable[[Moment], None], every: float) -> Step:
    started = last = time.monotonic()
    counted, ended = _Rate(), False

    def step(done: float, total: int) -> None:
        nonlocal last, ended
        now = time.monotonic()
        rate = counted.rate(done, now)
        if ended or (now - last < every and done < total):
            return
        last, ended = now, done >= total
        tell(Moment(round(done, 3), total, now - started, rate))

    return step


def _plain(what: str, unit: str, tokens: int, moment: Moment) -> str:
    done, total, seconds, rate = moment
    shown = f"{sized(done)} of {sized(total)}" if unit == "bytes" else f"{done:.3g}/{total} {unit}"
    speed = f", {sized(rate)}/s" if unit == "bytes" and rate else ""
    speed += f", {rate * tokens:,.0f} tokens/s a layer" if tokens and rate else ""
    left = f", {moment.left:.0f} s left" if moment.left and done < total else ""
    return f"{what}: {shown}{speed}, {seconds:.0f} s{left}"


def _say_json(what: str, unit: str, moment: Moment) -> None:
    line: dict[str, Any] = {
        "stage": what, "unit": unit, "done": moment.done, "total": moment.total,
        "seconds": round(moment.seconds, 3), "rate": round(moment.rate, 3), "seconds_left": moment.left,
    }  # fmt: skip
    _line(line)

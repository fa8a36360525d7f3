"""What a person sees: tables and progress on a terminal, plain lines in a log.

With --json a program reads instead: one document on standard output, and on standard error an object a line:
{"stage", "done", "total", ...} for progress, {"note"} for what a person would be told, {"error", "kind"} at the end.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
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


def silent() -> bool:
    """Whether another process speaks for this one."""
    return _mode.silent


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
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warning(warnings.showwarning)
            if silent:
                warnings.simplefilter("ignore")
            yield
    finally:
        if _mode.log is not None:
            _mode.log.close()
        _mode = before


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


def fail(text: str, kind: str, **more: str) -> None:
    """The error that ends the command. Where nobody can read it any more, the exit code tells."""
    with suppress(OSError):
        log(f"error: {text}")
        if _mode.as_json:
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
    """A table on standard output; the first column is text, the others are numbers, or sentences, which a terminal
    that is too narrow for them wraps."""
    title = printable(title)
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        said = [row[number] for row in cells if number and _is_sentence(row[number])]
        table.add_column(
            Text(column),
            justify="right" if number and not said else "left",
            no_wrap=not said,
            min_width=max((len(word) for text in said for word in text.split()), default=None),
        )
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    # A line that a narrow terminal wraps can be read; a number cut short cannot.
    unbounded = console.options.update(width=1 << 16)
    measured = console.measure(table, options=unbounded)
    console.width = max(console.width, measured.minimum if console.is_terminal else measured.maximum, len(title))
    console.print(title, markup=False, style="bold")
    console.print(table)


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


def parsed_reserve(text: str, limit: int) -> int:
    """Bytes: a share of `limit` ("15%"), or a size. Raises InputError that names --reserve."""
    share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", text.strip())
    if share and float(share[1]) < 100:
        return int(limit * float(share[1]) / 100)
    if share:
        raise InputError(f"--reserve {text}: expected less than 100%")
    return parsed_size("--reserve", text)

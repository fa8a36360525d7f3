"""The one exception a user sees."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What a program is told that an error is about: by the flag that the message begins with, else by who raised it.
FLAG_KINDS = {"data": "data", "device": "device", "target": "target"}  # other flags: "option"
PART_KINDS = {
    "checkpoint": "checkpoint",
    "architectures": "checkpoint",
    "model": "checkpoint",
    "measurement": "checkpoint",
    "plan": "plan",
    "statistics": "statistics",
    "criteria": "statistics",
    "data": "data",
}  # other parts of moekern: "input"


FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")
_speaks_flags = False


@contextmanager
def speaking_flags() -> Iterator[None]:
    """Errors name the command line's flags, as the command line wants it; else the arguments of the same names."""
    global _speaks_flags
    before, _speaks_flags = _speaks_flags, True
    try:
        yield
    finally:
        _speaks_flags = before


class InputError(ValueError):
    """Something the user can mend: a file, a flag, a plan or a checkpoint. One line that says what and where.

    Messages are written with the command line's flags; to who calls the library "--keep-always" is `keep_always`.
    Names of a hostile checkpoint reach the terminal without line breaks and control codes.
    """

    def __init__(self, message: str, kind: str | None = None) -> None:
        super().__init__(printable(message))
        self._kind = kind

    def __str__(self) -> str:
        text = super().__str__()
        return text if _speaks_flags else FLAG.sub(lambda flag: flag[1].replace("-", "_"), text)

    @property
    def kind(self) -> str:
        """checkpoint, plan, statistics, data, option, target, device, memory, or input for anything else."""
        if self._kind is not None:
            return self._kind
        if flag := FLAG.match(super().__str__()):
            return FLAG_KINDS.get(flag[1], "option")
        return PART_KINDS.get(_part_that_raised(self), "input")


class NoRoomForText(InputError):
    """The hidden states of a text fit neither memory nor disk; those of so many `tokens` would."""

    def __init__(self, message: str, tokens: int) -> None:
        super().__init__(message, kind="memory")
        self.message, self.tokens = message, tokens


def check_type(name: str, value: object, *expected: type) -> None:
    """Raise TypeError, which names an argument of a function of the library, unless it is of one of these types."""
    if not isinstance(value, expected):
        wanted = " or ".join(kind.__name__ for kind in expected)
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, as the next words of a message; empty where none is like it."""
    near = difflib.get_close_matches(name.lower(), list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def printable(text: str) -> str:
    """One line without control codes, which names of a hostile file would send to the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)


def _part_that_raised(error: BaseException) -> str:
    """The part of moekern an error comes from; empty for one that was not raised."""
    return (["", *_modules_passed(error)][-1]).partition(".")[2].partition(".")[0]


def _modules_passed(error: BaseException) -> list[str]:
    """The modules between the handler of an error, which comes first, and the place where it was raised."""
    step, modules = error.__traceback__, list[str]()
    while step is not None:
        modules.append(str(step.tb_frame.f_globals.get("__name__", "")))
        step = step.tb_next
    return modules


def raised_here(error: BaseException) -> bool:
    """Whether moekern's own code is anywhere between the handler and the place where the error was raised: it may be
    at fault then."""
    return any(name.partition(".")[0] == "moekern" for name in _modules_passed(error)[1:])


def first_line(error: BaseException) -> str:
    """What another library's exception says, cut to its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


MEMORY = re.compile(r"DefaultCPUAllocator|not enough memory|can't allocate memory|out of memory|ALLOC_FAILED|bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was no memory to be had: Python's, the system's, or one of torch's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and MEMORY.search(first_line(error)) is not None


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """An allocation that fails inside becomes an InputError that says what it was for, and what makes it smaller.

    The innermost of several has the word: it knows best.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(what, error, remedy) from error


def out_of_memory(what: str, error: BaseException, remedy: str) -> InputError:
    """The refusal for an allocation that failed."""
    return InputError(f"not enough memory for {what} ({first_line(error)}); {remedy}", kind="memory")


def add_note(error: BaseException, text: str) -> None:
    """What BaseException.add_note does, in Python 3.10 too."""
    error.__notes__ = [*notes(error), text]  # type: ignore[attr-defined,unused-ignore]


def notes(error: BaseException | None) -> list[str]:
    """The notes on an error, and on those that it came from."""
    if error is None:
        return []
    return [*getattr(error, "__notes__", []), *notes(error.__cause__ or error.__context__)]

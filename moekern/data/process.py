"""The checkpoint's tokenizer and chat template at work in a process of their own: both are programs of its author."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from moekern.data.left_out import Unreadable
from moekern.errors import InputError, first_line

SECONDS = 5  # of computing, for one conversation; up to one less, since the limit counts whole ones
PIECE_SECONDS = 30  # for the ids of one piece of text
MEMORY = 1 << 30  # bytes, beyond what this process has
TEXT_CAP = 1 << 24  # characters of one conversation
IDS_EACH, IDS_MORE = 64, 1 << 10  # token ids that a character may become, and a text beyond that
# Seconds of computing for all texts: so many to begin with, and what each text and each of its characters add.
AT_FIRST, EACH_TEXT, EACH_CHARACTER = 60.0, 0.1, 5e-5


class TokenizerProcess:
    """Renders conversations and tokenises text apart from us; ends where either takes too long or too much memory.

    transformers' sandbox keeps a template from files and objects, not from loops in loops or strings of terabytes; a
    tokenizer's normalizer may make gigabytes of a word, and its expressions may never come to an end.
    """

    def __init__(self, tokenizer: Any) -> None:
        ours, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")  # the tokenizer is there already
        self.connection = ours
        self.process = fork.Process(target=_serve, args=(ours, theirs, tokenizer), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child computes in one alone
            self.process.start()
        theirs.close()

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.terminate()  # another process that was forked meanwhile may hold our end of the connection
        self.process.join()

    def render(self, messages: Any, tools: Any, options: Mapping[str, Any]) -> str:
        """The text of a conversation, which names tools, with options of the template.

        Raises Unreadable with what the template raised, and InputError where it takes too much: other conversations
        would too.
        """
        return str(self._asked(SECONDS, _rendered, messages, tools, options))

    def ids(self, text: str, special: bool = False) -> list[int]:
        """The token ids of a text, with those that the tokenizer puts around it where `special`.

        Raises InputError with what the tokenizer raised, and where it takes too much.
        """
        found: list[int] = self._asked(PIECE_SECONDS, _ids, text, special).tolist()
        return found

    def _asked(self, seconds: int, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            self.connection.send((seconds, work, arguments))
            answer, problem = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise InputError(_end(self.process.exitcode, seconds)) from None
        if problem is not None:
            raise problem
        return answer


def _end(code: int | None, seconds: int) -> str:
    if code == -signal.SIGXCPU:
        return f"takes more than {seconds} s"
    if code == -signal.SIGABRT:  # what a library in Rust does where there is no memory
        return f"takes more than {MEMORY} bytes"
    return f"ends its process with {code}"


def _serve(other: Connection, connection: Connection, tokenizer: Any) -> None:
    """Answer until the other end is closed."""
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells of it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # of a panic the parent tells in one line
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a pool of threads takes address space, and does not survive a fork
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    texts, left = 0, AT_FIRST
    while True:
        try:
            seconds, work, arguments = connection.recv()
        except EOFError:
            return
        before = _spent()
        resource.setrlimit(resource.RLIMIT_CPU, (int(before) + seconds, resource.RLIM_INFINITY))
        answer, problem = _answer(tokenizer, work, arguments)
        written = arguments[0] if work is _ids else answer
        texts += 1
        left += EACH_TEXT + EACH_CHARACTER * len(written) - (_spent() - before)
        if left < 0 and problem is None:
            problem = InputError(f"is too slow: {_spent():.0f} s of computing for {texts:,} texts")
        connection.send((answer, problem))


def _spent() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _answer(tokenizer: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    """What was asked for, or why there is none. A panic of a library in Rust is no Exception."""
    try:
        return work(tokenizer, *arguments), None
    except InputError as error:
        return "", error
    except MemoryError:
        return "", InputError(f"takes more than {MEMORY} bytes")
    except BaseException as error:
        if work is _ids:
            return "", InputError(f"fails: {first_line(error)}")
        return "", Unreadable(f"the chat template cannot render it: {first_line(error)}")


def _rendered(tokenizer: Any, messages: Any, tools: Any, options: Mapping[str, Any]) -> str:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    if not isinstance(text, str) or len(text) > TEXT_CAP:
        raise InputError(f"gives no text of at most {TEXT_CAP} characters")
    return text


def _ids(tokenizer: Any, text: str, special: bool) -> np.ndarray:
    """[N] int64"""
    ids = np.asarray(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], dtype=np.int64)
    if ids.ndim != 1 or len(ids) > IDS_EACH * len(text) + IDS_MORE:
        raise InputError(f"makes {ids.size:,} token ids of {len(text):,} characters")
    return ids

"""Conversations as text, by the checkpoint's chat template, which is a program of the checkpoint's author."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import warnings
from multiprocessing.connection import Connection
from typing import Any

from moekern.data.left_out import Unreadable
from moekern.errors import InputError, first_line

SECONDS = 5  # of computing, for one conversation; up to one less, since the limit counts whole ones
MEMORY = 1 << 30  # bytes, beyond what this process has
TEXT_CAP = 1 << 24  # characters of one conversation


class Templates:
    """Renders conversations in a process of its own, which ends when a template takes too long or too much memory.

    transformers' sandbox keeps a template from files and objects, not from loops in loops or strings of terabytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        ours, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")  # the tokenizer is there already
        self.connection = ours
        self.process = fork.Process(target=_serve, args=(ours, theirs, tokenizer), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child computes in Python alone
            self.process.start()
        theirs.close()

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join()

    def render(self, messages: Any, tools: Any = None, options: Any = None) -> str:
        """The text of a conversation, which names tools, with options of the template.

        Raises Unreadable with what the template raised, and InputError where it takes too much: other conversations
        would too.
        """
        try:
            self.connection.send((messages, tools, options or {}))
            text, problem = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            late = self.process.exitcode == -signal.SIGXCPU
            reason = f"takes more than {SECONDS} s" if late else f"ends its process with {self.process.exitcode}"
            raise InputError(reason) from None
        if problem is not None:
            raise problem
        return str(text)


def _serve(other: Connection, connection: Connection, tokenizer: Any) -> None:
    """Render until the other end is closed."""
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells of it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, resource.RLIM_INFINITY))
        connection.send(_rendered(tokenizer, *asked))


def _rendered(tokenizer: Any, messages: Any, tools: Any, options: Any) -> tuple[str, Exception | None]:
    """Text, or why there is none."""
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    except MemoryError:
        return "", InputError(f"takes more than {MEMORY} bytes")
    except Exception as error:
        return "", Unreadable(f"the chat template cannot render it: {first_line(error)}")
    if not isinstance(text, str) or len(text) > TEXT_CAP:
        return "", InputError(f"gives no text of at most {TEXT_CAP} characters")
    return text, None

"""The checkpoint's tokenizer and chat template at work in processes of their own: both are programs of its author."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from moekern.data.left_out import Unreadable
from moekern.errors import InputError, first_line

SECONDS = 5  # of computing, for one conversation; up to one less, since the limit counts whole ones
PIECE_SECONDS = 30  # for the ids of one piece of text
MEMORY = 1 << 30  # bytes of each process, beyond what this one has
TEXT_CAP = 1 << 24  # characters of one conversation
IDS_EACH, IDS_MORE = 64, 1 << 10  # token ids that a character may become, and a text beyond that
# Seconds of computing for all texts: so many to begin with, and what each text and each of its characters add.
AT_FIRST, EACH_TEXT, EACH_CHARACTER = 60.0, 0.1, 5e-5

Result = TypeVar("Result")


class Account:
    """Seconds of computing that texts have taken in all processes, against what they may take together."""

    def __init__(self) -> None:
        self.lock, self.texts, self.spent, self.allowed = Lock(), 0, 0.0, AT_FIRST

    def add(self, characters: int, seconds: float) -> None:
        """Count one text. Raises InputError where all of them have taken too long."""
        with self.lock:
            self.texts += 1
            self.spent += seconds
            self.allowed += EACH_TEXT + EACH_CHARACTER * characters
            if self.spent > self.allowed:
                raise InputError(f"is too slow: {self.spent:.0f} s of computing for {self.texts:,} texts")


class TokenizerProcesses:
    """`count` processes of one tokenizer, which share the work; each does one thing at a time."""

    def __init__(self, tokenizer: Any, count: int) -> None:
        account = Account()
        self.all = [TokenizerProcess(tokenizer, account) for _ in range(count)]  # while there are no threads
        self.threads = ThreadPoolExecutor(count)
        self.idle: SimpleQueue[TokenizerProcess] = SimpleQueue()
        for process in self.all:
            self.idle.put(process)

    def submit(self, work: Callable[[TokenizerProcess], Result]) -> Future[Result]:
        """Have some work done with the next process that is idle."""
        return self.threads.submit(self._with_one, work)

    def _with_one(self, work: Callable[[TokenizerProcess], Result]) -> Result:
        process = self.idle.get()
        try:
            return work(process)
        finally:
            self.idle.put(process)

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for process in self.all:
            process.end()
        self.threads.shutdown(cancel_futures=True)
        for process in self.all:
            process.connection.close()


class TokenizerProcess:
    """Renders conversations and tokenises text apart from us; ends where either takes too long or too much memory.

    transformers' sandbox keeps a template from files and objects, not from loops in loops or strings of terabytes; a
    tokenizer's normalizer may make gigabytes of a word, and its expressions may never come to an end.
    """

    def __init__(self, tokenizer: Any, account: Account) -> None:
        self.account = account
        ours, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")  # the tokenizer is there already
        self.connection = ours
        self.process = fork.Process(target=_serve, args=(ours, theirs, tokenizer), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child computes in one alone
            self.process.start()
        theirs.close()

    def end(self) -> None:
        """End the process; a thread that waits for its answer is told so."""
        self.process.terminate()  # another process that was forked meanwhile may hold our end of the connection
        self.process.join()

    def render(self, messages: Any, tools: Any, options: Mapping[str, Any]) -> str:
        """The text of a conversation, which names tools, with options of the template.

        Raises Unreadable with what the template raised, and InputError where it takes too much: other conversations
        would too.
        """
        return str(self._asked(SECONDS, _rendered, messages, tools, options))

    def ids(self, text: str, special: bool = False) -> np.ndarray:
        """The token ids [N] int64 of a text, with those that the tokenizer puts around it where `special`.

        Raises InputError with what the tokenizer raised, and where it takes too much.
        """
        found: np.ndarray = self._asked(PIECE_SECONDS, _ids, text, special)
        return found

    def _asked(self, seconds: int, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            self.connection.send((seconds, work, arguments))
            answer, problem, spent = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise InputError(_end(self.process.exitcode, seconds)) from None
        if isinstance(problem, InputError):
            raise problem
        self.account.add(len(arguments[0] if work is _ids else answer), spent)
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
    while True:
        try:
            seconds, work, arguments = connection.recv()
        except EOFError:
            return
        before = _spent()
        resource.setrlimit(resource.RLIMIT_CPU, (int(before) + seconds, resource.RLIM_INFINITY))
        answer, problem = _answer(tokenizer, work, arguments)
        connection.send((answer, problem, _spent() - before))


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

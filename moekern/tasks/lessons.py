"""What tasks teach: their own training sets as text whose answers alone have a loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import torch

from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.data.tokenizer import Tokenizer
from moekern.errors import InputError
from moekern.tasks import harness
from moekern.tasks.questions import Question, asked_of
from moekern.tasks.settings import Asked

Lesson = tuple[str, str, str]  # domain, prompt, answer


def lessons(asked: Asked) -> tuple[Lesson, ...]:
    """Of the tasks' own training sets, as the harness puts them without examples. Raises InputError for tasks that have
    none; see `harness.opened`."""
    with harness.opened(asked, lambda line: None) as tasks:
        return tuple(tasks.lessons())


def read_lessons(path: Path) -> tuple[Lesson, ...]:
    """Rows {"prompt", "completion"} of a JSONL file, which stand one behind the other as they are.

    Raises InputError for other rows.
    """
    return tuple(_rows(path))


def _rows(path: Path) -> Iterator[Lesson]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--sft {path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row["prompt"], row["completion"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = answer = None
        if not isinstance(prompt, str) or not isinstance(answer, str) or not answer:
            raise InputError(f'--sft {path}: line {number}: expected an object with "prompt" and "completion", texts')
        yield path.stem, prompt, answer


def lesson_data(
    checkpoint: Checkpoint, some: Iterable[Lesson], length: int, *, trust_remote_code: bool = False
) -> TokenData:
    """As sequences of one lesson each, the longest first within a task; what is longer than `length` loses its front.

    Tokens are those that the harness gives to prompt and answer. Raises InputError where nothing is there.
    """
    with closing(Tokenizer(checkpoint.folder, trust_remote_code)) as tokenizer:
        book = harness.book(tokenizer, length)
        encoded = ((name, *book.encoded(prompt, answer)) for name, prompt, answer in some)
        found = [(name, asked_of(context, behind, length - 1)) for name, context, behind in encoded]
    if not found:
        raise InputError("--sft: nothing to learn from", kind="data")
    found.sort(key=lambda each: (each[0], -len(each[1].ids)))
    digest = hashlib.sha256(repr(found).encode()).hexdigest()
    return TokenData(tuple(_batch(*each) for each in found), {"lessons": len(found), "sha256": digest})


def _batch(name: str, question: Question) -> Batch:
    ids = torch.tensor([question.ids])
    marks = torch.zeros_like(ids, dtype=torch.bool)
    marks[:, -question.scored :] = True
    return Batch(name, ids, marks)

"""Documents as token ids, in their order: read as far ahead as keeps every process at work, and no further than needed.

How far that is changes nothing: what was read ahead and is not used is not counted, and no error of it is raised.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moekern.data.left_out import LeftOut, Notes, Unreadable
from moekern.data.readers import Item
from moekern.data.rows import Chat, Document, Passage
from moekern.data.sources import Documents, Reading, document_in, is_file
from moekern.data.tokenizer import Tokenizer, Tokens
from moekern.errors import InputError

GROUP = 1 << 16, 256  # characters, about, and documents that a process is given at a time


class Read(NamedTuple):
    """An item and what it holds; size: characters, about."""

    name: str  # of its file
    item: Item
    document: Document | Unreadable | InputError
    size: int


def token_documents(
    documents: Documents, reading: Reading, tokenizer: Tokenizer, left: LeftOut, notes: Notes
) -> Iterator[np.ndarray]:
    """The token ids [N] int64 of each document, its special tokens included; what cannot be read is counted in `left`.

    Where parts of a larger text are drawn they end with the one that makes up the budget. Without packing a document is
    cut to a sequence. A file of text that is not UTF-8 to its end is left out whole, unless parts of it are drawn.
    """
    needed = math.inf if reading.budget is None or not documents.drawn else reading.budget
    items, pieces = _held(documents.items), list[np.ndarray]()
    waiting: deque[tuple[list[Read], Callable[[], list[Tokens]]]] = deque()
    ahead = read = tokens = 0  # characters that are waited for, and those that have become so many tokens
    while True:
        # At first a character is taken for a token.
        while not waiting or len(waiting) < 2 * tokenizer.count:
            missing = (needed - tokens) * max(read, 1) / max(tokens, 1) - ahead
            group = _group(items, reading, missing) if missing > 0 or not waiting else []
            if not group:
                break
            ahead += _size(group)
            found = [r.document for r in group if not isinstance(r.document, (Unreadable, InputError))]
            waiting.append((group, tokenizer.start(found)))
        if not waiting:
            return
        group, result = waiting.popleft()
        ahead, read = ahead - _size(group), read + _size(group)
        for ids in _used(group, result(), pieces, reading, left, notes):
            yield (ids := ids if reading.pack or reading.prompts else ids[: reading.sequence_length])
            tokens += len(ids)
            if tokens >= needed:
                return


def _size(group: list[Read]) -> int:
    return sum(read.size for read in group)


def _held(items: Iterator[tuple[str, Item]]) -> Iterator[tuple[str, Item]]:
    """Items; an error, as of the hub, is one that is raised when it is its turn."""
    try:
        yield from items
    except InputError as error:
        yield "", Item("", error)


def _group(items: Iterator[tuple[str, Item]], reading: Reading, missing: float) -> list[Read]:
    """The next items: of as many characters as are missing, or as are worth a process's while."""
    left, most = min(GROUP[0], missing), GROUP[1]
    group: list[Read] = []
    for name, item in items:
        document = document_in(item, reading.column)
        group.append(Read(name, item, document, _characters(item, document, reading)))
        left -= group[-1].size
        if left <= 0 or len(group) == most:
            break
    return group


def _characters(item: Item, document: Document | Exception, reading: Reading) -> int:
    """About how many of them count, or token ids in their place."""
    if isinstance(document, Exception):
        return 0
    if isinstance(document, np.ndarray):
        size = len(document)
    elif isinstance(document, Passage):
        size = len(document.text)
    else:
        size = item.size or sum(len(message["content"]) for message in document.messages)
    return size if reading.pack else min(size, reading.sequence_length)


def _used(
    group: list[Read],
    results: list[Tokens],
    pieces: list[np.ndarray],
    reading: Reading,
    left: LeftOut,
    notes: Notes,
) -> Iterator[np.ndarray]:
    """The ids of whole documents, or of the prompts that they are; `pieces` are those of one that has begun."""
    given = iter(results)
    for name, item, document, _ in group:
        if isinstance(document, InputError):
            raise document
        if is_file(item):
            left.file(name, item.value)
            pieces.clear()
            continue
        if not isinstance(item.value, (Passage, np.ndarray)):
            left.rows[name] += 1
        if isinstance(document, Unreadable):
            left.row(name, item.where, document)
            pieces.clear()
            continue
        ids, said = next(given)
        said.tell(notes)
        if isinstance(ids, InputError):
            raise ids
        if isinstance(ids, Unreadable):
            left.row(name, item.where, ids)
            continue
        if isinstance(document, Chat):
            left.parts.update(document.parts)
        if isinstance(document, Passage):
            if document.begins:
                pieces.clear()
            pieces.append(ids)
            if not document.ends:
                continue
            ids = np.concatenate(pieces)
            pieces.clear()
        if reading.prompts is None:
            yield ids
        else:
            yield from _prompts(ids, document, item, reading.sequence_length)


def _prompts(ids: np.ndarray, document: Document, item: Item, length: int) -> Iterator[np.ndarray]:
    """All of a conversation, which ends where the answer would begin; the first tokens of a row; a file of text, or of
    an array's ids, piece by piece."""
    if isinstance(document, Chat):
        yield ids
    elif isinstance(item.value, (Passage, np.ndarray)):
        yield from (ids[i : i + length] for i in range(0, max(1, len(ids) - length + 1), length))
    else:
        yield ids[:length]

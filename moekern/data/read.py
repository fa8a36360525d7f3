"""Calibration and evaluation text as token batches: named domains, packed to one length or a row each, seeded."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekern.data.batches import CHUNK_TOKENS, SEGMENTS, Batch, TokenData, batched, rows_of, sequences_of
from moekern.data.hub import SHUFFLED
from moekern.data.left_out import LeftOut, Notes
from moekern.data.mixes import Amount, Domain, budgets, domains_of
from moekern.data.sources import Documents, Reading, documents_of
from moekern.data.stream import token_documents
from moekern.data.tokenizer import Tokenizer
from moekern.errors import InputError

LENGTH = 2048  # tokens of a sequence, where a model has so many positions
THINKING = ("on", "off", "row")
TELL_EVERY = 10.0  # seconds of reading
PROMPT = 512  # tokens of a conversation, about, in a file of which a part is read


def read_data(
    specs: Sequence[str],
    model: str | Path,
    *,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    chunk: int | None = None,
    pack: bool = True,
    seed: int = 0,
    columns: Sequence[str] = (),
    thinking: str = "row",
    answers: bool = False,
    strict: bool = False,
    prompts: int | None = None,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] | None = None,
) -> TokenData:
    """Read "name=source" or "source", tokenise with the model folder's tokenizer and pack to `sequence_length` (None:
    2048, or `max_positions` where these are fewer).

    A source is a file of text or rows, a folder of them, or a data set of the hub, with an amount behind a colon: see
    `data.mixes` and `data.rows`. Documents follow one another with the tokenizer's end-of-text token between; sequences
    are drawn in a seeded order. Without `pack` each document (a file of text, a row) is a sequence of its own, cut at
    `sequence_length`; those of one length are computed together, and none is padded. Statistics are taken `chunk`
    sequences at a time (None: as many of the longest as hold 2048 tokens), losses `batch_size`. `tokens` bounds what
    domains that name no amount have together; what a small one lacks is not made up for. No more is read than a budget
    needs. With `prompts` each domain gives so many beginnings for a model to continue: conversations up to where their
    last answer begins, else `sequence_length` tokens, the first ones of a row, and of a file of text from all over it.
    `columns` ("column" or "name=column") say where the text of rows is. What is left out is counted and told in
    a line, by `tell` or as a warning; `strict` makes it an error. With `answers` the last message of conversations, and
    the answers of pairs, are marked (`Batch.answers`); all of other documents is.
    Raises InputError for a source that is missing or holds no text, and for token ids outside the vocabulary.
    """
    notes = Notes(tell)
    asked, default = sequence_length, default_length(max_positions)
    sequence_length = default if asked is None else asked
    _check(sequence_length, batch_size, chunk, seed, thinking)
    domains = domains_of(specs)
    named = _columns(columns, domains)
    prompting = prompts is not None
    tokenizer = Tokenizer(
        Path(model), trust_remote_code,
        ended=pack and not prompting, thinking=thinking, answers=answers, prompting=prompting,
    )  # fmt: skip
    tokens = tokens if prompts is None else _prompting_tokens(prompts, domains, sequence_length)
    shares = budgets(domains, tokens, sequence_length)
    batches: list[Batch] = []
    sources: dict[str, Any] = {}
    found = set[str]()  # domains that have rows
    with closing(tokenizer):
        for number, (domain, budget) in enumerate(zip(domains, shares, strict=True)):
            reading = Reading(domain, budget, sequence_length, named.get(domain.name), (seed, number), pack, prompts)
            left = LeftOut(domain.name, strict)
            sequences = _sequences(reading, tokenizer, left, notes)
            sources[domain.name] = _source(reading, sequences, left)
            found |= {domain.name} if left.rows else set()
            _check_vocabulary(list(map(_ids, sequences)) if answers else sequences, vocab_size, domain)
            batches += [_batch(domain.name, rows, answers) for rows in batched(sequences, batch_size)]
    _check_columns(columns, found, notes)
    longest = max(batch.input_ids.shape[1] for batch in batches)
    _tell_positions(asked, sequence_length, longest, None if prompting else max_positions, notes)
    chunk = max(1, CHUNK_TOKENS // (sequence_length if pack else longest)) if chunk is None else chunk
    recipe = (
        {
            "sources": sources,
            "sequence_length": sequence_length,
            "chunk": chunk,
            "segments": SEGMENTS,
            "tokens": tokens,
            "seed": seed,
            "thinking": thinking,
        }
        | ({} if pack or prompting else {"pack": False})
        | ({"answers": True} if answers else {})
        | ({"prompts": prompts} if prompting else {})
    )
    return TokenData(tuple(batches), recipe, chunk, tuple(notes.lines))


def _tell_positions(asked: int | None, sequence_length: int, longest: int, most: int | None, notes: Notes) -> None:
    """Tell of a length that is the model's, where none was asked for, and warn of one that it was not made for."""
    if asked is None and sequence_length < LENGTH:
        notes.say(f"sequences of {sequence_length} tokens: as many positions as the model was made for")
    if most is not None and longest > most:
        notes.warn(
            f"--sequence-length {sequence_length}: sequences of {longest} tokens are longer than the {most} "
            f"positions that the model was made for (max_position_embeddings); give {most} at the most"
        )


def default_length(max_positions: int | None) -> int:
    """Tokens of a sequence where nobody has said how many."""
    return LENGTH if max_positions is None or max_positions < 2 else min(LENGTH, max_positions)


def _prompting_tokens(prompts: int, domains: Sequence[Domain], sequence_length: int) -> int:
    """As many tokens as so many prompts of each domain may take. Raises InputError for a domain with an amount."""
    for domain in domains:
        if domain.amount != Amount():
            raise InputError(f"--continue {domain.shown}: --prompts says how many prompts; leave the amount out")
    return prompts * max(sequence_length, PROMPT) * len(domains)


def _check(sequence_length: int, batch_size: int, chunk: int | None, seed: int, thinking: str) -> None:
    if sequence_length < 2:
        raise InputError(f"--sequence-length {sequence_length}: expected 2 or more")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: expected 1 or more")
    if chunk is not None and chunk < 1:
        raise InputError(f"--chunk {chunk}: expected 1 or more")
    if seed < 0:
        raise InputError(f"--seed {seed}: expected 0 or more")
    if thinking not in THINKING:
        raise InputError(f"--thinking {thinking}: expected one of {', '.join(THINKING)}")


def _columns(columns: Sequence[str], domains: Sequence[Domain]) -> dict[str, str]:
    """Domain -> column. One that is named for all is for those that have none of their own."""
    named = {domain.name: column for column in columns if "=" not in column for domain in domains}
    for column in columns:
        name, equals, own = column.partition("=")
        if equals and name not in {domain.name for domain in domains}:
            raise InputError(f"--column {column}: no domain is named {name!r}")
        named |= {name: own} if equals else {}
    return named


def _check_columns(columns: Sequence[str], found: Collection[str], notes: Notes) -> None:
    """Say of which columns there were no rows."""
    for column in columns:
        name, equals, _ = column.partition("=")
        if not (name in found if equals else found):
            notes.say(f"--column {column}: changes nothing, since {'it has no' if equals else 'no domain has'} rows")


def _sequences(reading: Reading, tokenizer: Tokenizer, left: LeftOut, notes: Notes) -> list[np.ndarray]:
    """The sequences of a domain. Says what was left out, and of how much text they are."""
    domain, length, budget = reading.domain, reading.sequence_length, reading.budget
    documents = documents_of(reading, left, notes)
    parts = list(_told(token_documents(documents, reading, tokenizer, left, notes), reading, notes))
    total = sum(map(len, parts))
    generator = np.random.default_rng(reading.seed)
    if reading.prompts is not None:
        sequences = rows_of(parts, None, None, generator, reading.prompts)
    elif reading.pack:
        whole = np.concatenate([np.empty(0, np.int64), *parts])
        sequences = sequences_of(whole, length, budget, generator)
    else:
        sequences = rows_of(parts, length, budget, generator, domain.amount.sequences)
    reasons = left.reasons()
    if not sequences:
        where = f"--data {domain.name}={domain.path}: holds no text"
        raise InputError(f"{where}: {reasons[0]}" if reasons else where)
    for reason in reasons:
        notes.warn(f"{domain.name}: {reason}")
    if reading.prompts is not None:
        fewer = f", fewer than the {reading.prompts:,} asked for" if len(sequences) < reading.prompts else ""
        told = f"{len(sequences):,} prompts of {len(parts):,} read{fewer}"
    else:
        told = _how_much(reading, documents, sum(map(len, sequences)), total)
    if told:
        notes.say(f"{domain.name}: {told}")
    return sequences


def _told(parts: Iterator[np.ndarray], reading: Reading, notes: Notes) -> Iterator[np.ndarray]:
    """The same; every few seconds it is told how many tokens there are. This is no note of the text."""
    last, total = time.monotonic(), 0
    for ids in parts:
        total += len(ids)
        if notes.tell is not None and time.monotonic() - last >= TELL_EVERY:
            last = time.monotonic()
            most = f", of which {reading.budget:,} are used" if reading.budget and total > reading.budget else ""
            notes.tell(f"{reading.domain.name}: reading text: {total:,} tokens{most}")
        yield ids


def _how_much(reading: Reading, documents: Documents, used: int, total: int) -> str:
    """Tokens that are used, where there are more, or fewer than were asked for; else nothing."""
    own = reading.domain.amount.tokens or reading.domain.amount.sequences
    asked = "its own amount" if own else "--tokens"
    if documents.drawn and reading.budget is not None and total >= reading.budget:
        size = f"parts of {documents.size / 1e6:,.1f} MB"
        stream = f"the stream of its rows, out of {SHUFFLED:,} at a time"
        return f"{used:,} tokens, drawn from {size if documents.size else stream} ({asked})"
    if used + 1 < total:
        return f"{used:,} tokens of {total:,} ({asked})"
    if own and reading.pack and used + 1 < (reading.budget or 0):
        return f"{used:,} tokens, fewer than the {reading.budget:,} that it was asked for"
    return ""


def _source(reading: Reading, sequences: Sequence[np.ndarray], left: LeftOut) -> Mapping[str, Any]:
    """What the recipe says of a domain. The digest is of the token ids in the order of use, as little-endian int64."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.ascontiguousarray(sequence, dtype="<i8").tobytes())
    return {
        "path": reading.domain.shown,
        "tokens": sum(map(len, sequences)),
        "ids_sha256": digest.hexdigest(),
        "left_out": left.document(),
    }


def _ids(coded: np.ndarray) -> np.ndarray:
    """What a tokenizer that tells answers apart has coded, as ids."""
    return np.where(coded < 0, ~coded, coded)


def _batch(domain: str, coded: np.ndarray, answers: bool) -> Batch:
    if not answers:
        return Batch(domain, torch.from_numpy(coded))
    return Batch(domain, torch.from_numpy(_ids(coded)), torch.from_numpy(coded >= 0))


def _check_vocabulary(sequences: Sequence[np.ndarray], vocab_size: int | None, domain: Domain) -> None:
    low = min(int(ids.min()) for ids in sequences)
    high = max(int(ids.max()) for ids in sequences)
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise InputError(
            f"--data {domain.path}: token ids {low} to {high} do not fit the model's vocabulary of {vocab_size}"
        )

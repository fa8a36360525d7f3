"""Calibration and evaluation text as token batches: named domains, packed to one length or a row each, seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from moekern.data.batches import CHUNK_TOKENS, Batch, TokenData, batched, rows_of, sequences_of
from moekern.data.sources import digest_of, documents_of, sources_of
from moekern.data.tokenizer import Tokenizer
from moekern.errors import InputError


def read_data(
    specs: Sequence[str],
    model: str | Path,
    *,
    vocab_size: int | None = None,
    tokens: int | None = None,
    sequence_length: int = 2048,
    batch_size: int = 8,
    chunk: int | None = None,
    pack: bool = True,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> TokenData:
    """Read "name=path" or "path" sources, tokenise with the model folder's tokenizer and pack to `sequence_length`.

    A source is a text file, JSONL ("text", "messages" or "input_ids" per line), a .npy of token ids, or a folder of
    them. Documents follow one another with the tokenizer's end-of-text token between; sequences are drawn in a seeded
    order. Without `pack` each document (a file, a line, a row of an array) is a sequence of its own, cut at
    `sequence_length`; those of one length are computed together, and none is padded. Statistics are taken `chunk`
    sequences at a time (None: as many of the longest as hold 2048 tokens), losses `batch_size`. `tokens` bounds the
    total and is shared evenly by the domains; what a small domain lacks is not made up for.
    Raises InputError for a source that is missing, empty or not text, and for token ids outside the vocabulary.
    """
    if sequence_length < 2:
        raise InputError(f"--sequence-length {sequence_length}: expected at least 2")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: expected at least 1")
    if chunk is not None and chunk < 1:
        raise InputError(f"--chunk {chunk}: expected at least 1")
    if seed < 0:
        raise InputError(f"--seed {seed}: expected 0 or more")
    sources = sources_of(specs)
    if tokens is not None and tokens < 2 * len(sources):
        raise InputError(f"--tokens {tokens}: expected at least 2 for each of {len(sources)} domains")
    budgets = _shares(tokens, len(sources))
    tokenizer = Tokenizer(Path(model), trust_remote_code, ended=pack)
    batches: list[Batch] = []
    for number, ((domain, path), budget) in enumerate(zip(sources.items(), budgets, strict=True)):
        documents = documents_of(path, tokenizer)
        ids = np.concatenate([np.empty(0, np.int64), *documents])
        draw = np.random.default_rng([seed, number])
        if pack:
            sequences = sequences_of(ids, sequence_length, budget, draw)
        else:
            sequences = rows_of(documents, sequence_length, budget, draw)
        if not sequences:
            raise InputError(f"--data {domain}={path}: holds no text")
        _check_vocabulary(ids, vocab_size, path)
        batches += [Batch(domain, torch.from_numpy(rows)) for rows in batched(sequences, batch_size)]
    longest = sequence_length if pack else max(batch.input_ids.shape[1] for batch in batches)
    chunk = max(1, CHUNK_TOKENS // longest) if chunk is None else chunk
    recipe = {
        "sources": {domain: {"path": path.name, "sha256": digest_of(path)} for domain, path in sources.items()},
        "sequence_length": sequence_length,
        "chunk": chunk,
        "tokens": tokens,
        "seed": seed,
    } | ({} if pack else {"pack": False})
    data = TokenData(tuple(batches), recipe, chunk)
    return replace(data, recipe=recipe | {"sha256": data.sha256})  # of what tokenizer and template made of the sources


def _shares(tokens: int | None, domains: int) -> list[int | None]:
    if tokens is None:
        return [None] * domains
    return [tokens // domains + (i < tokens % domains) for i in range(domains)]


def _check_vocabulary(ids: np.ndarray, vocab_size: int | None, path: Path) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise InputError(f"--data {path}: token ids {low} to {high} do not fit the model's vocabulary of {vocab_size}")

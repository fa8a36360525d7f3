"""Calibration and evaluation text as token batches: named domains, packed to one length, seeded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekern import files
from moekern.errors import InputError, first_line

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".rs", ".go", ".java", ".html", ".tex")
DATA_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".npy")
DEFAULT_DOMAIN = "text"


@dataclass(frozen=True)
class Batch:
    """Sequences of one domain and one length, without padding."""

    domain: str
    input_ids: Tensor  # [B, S] int64

    def __repr__(self) -> str:
        return f"Batch({self.domain}, {tuple(self.input_ids.shape)})"


@dataclass(frozen=True)
class TokenData:
    """Batches and the recipe they were made by (any JSON: sources with their sha256, sequence length, seed)."""

    batches: tuple[Batch, ...]
    recipe: dict[str, Any]

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens per domain."""
        totals: dict[str, int] = {}
        for batch in self.batches:
            totals[batch.domain] = totals.get(batch.domain, 0) + batch.input_ids.numel()
        return totals


def read_data(
    specs: Sequence[str],
    model: str | Path,
    *,
    vocab_size: int | None = None,
    tokens: int | None = None,
    sequence_length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> TokenData:
    """Read "name=path" or "path" sources, tokenise with the model folder's tokenizer and pack to `sequence_length`.

    A source is a text file, JSONL ("text", "messages" or "input_ids" per line), a .npy of token ids, or a folder of
    them. Documents follow one another with the tokenizer's end-of-text token between; sequences are drawn in a seeded
    order. `tokens` bounds the total and is shared evenly by the domains; what a small domain lacks is not made up for.
    Raises InputError for a source that is missing, empty or not text, and for token ids outside the vocabulary.
    """
    if sequence_length < 2 or batch_size < 1:
        raise InputError(f"--sequence-length {sequence_length}, --batch-size {batch_size}: expected at least 2 and 1")
    if seed < 0:
        raise InputError(f"--seed {seed}: expected 0 or more")
    sources = _sources(specs)
    if tokens is not None and tokens < 2 * len(sources):
        raise InputError(f"--tokens {tokens}: expected at least 2 for each of {len(sources)} domains")
    budgets = _shares(tokens, len(sources))
    tokenizer = _Tokenizer(Path(model), trust_remote_code)
    batches: list[Batch] = []
    for number, ((domain, path), budget) in enumerate(zip(sources.items(), budgets, strict=True)):
        ids = _domain_ids(path, tokenizer)
        if len(ids) < 2:
            raise InputError(f"--data {domain}={path}: holds no text")
        _check_vocabulary(ids, vocab_size, path)
        sequences = _sequences(ids, sequence_length, budget, np.random.default_rng([seed, number]))
        batches += [Batch(domain, torch.from_numpy(rows)) for rows in _batched(sequences, batch_size)]
    recipe = {
        "sources": {domain: {"path": path.name, "sha256": _digest(path)} for domain, path in sources.items()},
        "sequence_length": sequence_length,
        "tokens": tokens,
        "seed": seed,
    }
    return TokenData(tuple(batches), recipe)


def _sources(specs: Sequence[str]) -> dict[str, Path]:
    if not specs:
        raise InputError("--data: expected at least one NAME=PATH")
    sources: dict[str, Path] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        path = Path(rest if equals else spec)
        if not (rest if equals else spec):
            raise InputError(f"--data {spec}: no path is given; expected NAME=PATH")
        if not equals:
            name = DEFAULT_DOMAIN if len(specs) == 1 else path.stem
        if not name or "/" in name or not name.isprintable():
            raise InputError(f"--data {spec}: expected NAME=PATH with a plain name")
        if name in sources:
            raise InputError(f"--data {spec}: the domain {name!r} is named twice; put both into one folder")
        if not path.exists():
            raise InputError(f"--data {spec}: no such file or folder: {path}")
        sources[name] = path
    return sources


def _shares(tokens: int | None, domains: int) -> list[int | None]:
    if tokens is None:
        return [None] * domains
    return [tokens // domains + (i < tokens % domains) for i in range(domains)]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"--data: {path} is a pipe or a device; give a file or a folder")
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in DATA_SUFFIXES)
    if not found:
        raise InputError(f"--data: {path} holds no file ending in {', '.join(DATA_SUFFIXES)}")
    return found


def _digest(path: Path) -> str | dict[str, str]:
    if path.is_file():
        return files.sha256(path)
    return {str(p.relative_to(path)): files.sha256(p) for p in _files(path)}


class _Tokenizer:
    """The checkpoint's tokenizer, opened when the first text needs it."""

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.loaded: Any = None

    def get(self) -> Any:
        if self.loaded is None:
            from transformers import AutoTokenizer

            try:
                loaded = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
            except Exception as error:  # a tokenizer's files are anybody's, and so is what they make transformers raise
                raise self._unusable(first_line(error)) from error
            # Without tokenizer files transformers makes an empty one from config.json's model_type.
            if len(loaded) <= len(loaded.all_special_tokens):
                raise self._unusable("its vocabulary is empty")
            self.loaded = loaded
        return self.loaded

    def _unusable(self, reason: str) -> InputError:
        instead = "give token ids instead (.npy, or JSONL with input_ids)"
        return InputError(f"{self.folder}: no usable tokenizer; {instead}: {reason}")

    def encode(self, text: str) -> list[int]:
        tokenizer = self.get()
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        end = tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def chat(self, messages: Any) -> list[int]:
        return self.encode(self.get().apply_chat_template(messages, tokenize=False))


def _domain_ids(path: Path, tokenizer: _Tokenizer) -> np.ndarray:
    parts = [np.asarray(ids, dtype=np.int64) for file in _files(path) for ids in _documents(file, tokenizer)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _documents(file: Path, tokenizer: _Tokenizer) -> Iterator[Sequence[int] | np.ndarray]:
    if file.suffix == ".npy":
        yield _npy(file)
    elif file.suffix == ".jsonl":
        yield from _jsonl(file, tokenizer)
    else:
        text = _text(file)
        if text.strip():
            yield tokenizer.encode(text)


def _npy(file: Path) -> np.ndarray:
    try:
        ids = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{file}: not a readable .npy file of token ids") from error
    if not isinstance(ids, np.ndarray):
        raise InputError(f"{file}: not a readable .npy file of token ids")
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise InputError(f"{file}: expected integer token ids of shape [N] or [rows, N], got {ids.dtype} {ids.shape}")
    return ids.reshape(-1).astype(np.int64)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start})") from error


def _jsonl(file: Path, tokenizer: _Tokenizer) -> Iterator[Sequence[int]]:
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}:{number}: not JSON ({error})") from error
        yield _row(row, tokenizer, f"{file}:{number}")


def _row(row: Any, tokenizer: _Tokenizer, where: str) -> Sequence[int]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with text, messages or input_ids")
    ids = row.get("input_ids")
    if isinstance(ids, list) and all(type(i) is int and abs(i) < 1 << 63 for i in ids):
        return ids
    if isinstance(row.get("text"), str):
        try:
            row["text"].encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: text holds half a surrogate pair, which is no character") from error
        return tokenizer.encode(row["text"])
    if isinstance(row.get("messages"), list):
        tokenizer.get()
        try:
            return tokenizer.chat(row["messages"])
        except Exception as error:  # a chat template is a program of the checkpoint's author
            raise InputError(f"{where}: messages: the chat template cannot render them: {first_line(error)}") from error
    raise InputError(f"{where}: expected text (a string), messages or input_ids (a list of integers)")


def _check_vocabulary(ids: np.ndarray, vocab_size: int | None, path: Path) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise InputError(f"--data {path}: token ids {low} to {high} do not fit the model's vocabulary of {vocab_size}")


def _sequences(ids: np.ndarray, length: int, budget: int | None, rng: np.random.Generator) -> list[np.ndarray]:
    """Pieces of `length` in a random order, up to `budget` tokens in all; only the last may be shorter."""
    whole = len(ids) // length
    pieces = [ids[i * length : (i + 1) * length] for i in rng.permutation(whole)]
    if len(ids) - whole * length >= 2:
        pieces.append(ids[whole * length :])
    out: list[np.ndarray] = []
    left = len(ids) if budget is None else budget
    for piece in pieces:
        piece = piece[:left]
        if len(piece) < 2:
            break
        out.append(piece)
        left -= len(piece)
    return out


def _batched(sequences: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    group: list[np.ndarray] = []
    for sequence in sequences:
        if group and (len(group) == size or len(group[0]) != len(sequence)):
            yield np.stack(group)
            group = []
        group.append(sequence)
    if group:
        yield np.stack(group)

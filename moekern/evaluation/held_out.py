"""Text that is kept from calibration, to see by it what pruning costs, and text without what is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError

SHARE = 0.1  # of a domain's sequences
MOST = 8192  # tokens of a domain, unless one sequence is longer
LEAST = 4  # sequences of a domain, of which one is held back; of fewer none


def held_back(data: TokenData) -> tuple[TokenData, TokenData]:
    """The text for calibration, and windows of the same text that are held back from it, a sequence a batch.

    Of each domain a tenth of the sequences, spread evenly over their order, at most 8192 tokens; none of a domain of
    fewer than 4. The recipe of the first part says how many tokens of each domain are missing.
    """
    kept: list[Batch] = []
    held: list[Batch] = []
    for domain in data.tokens:
        rows = [row for batch in data.batches if batch.domain == domain for row in batch.each()]
        chosen = _chosen([row.input_ids.shape[1] for row in rows])
        held += [rows[i] for i in chosen]
        kept += [row for i, row in enumerate(rows) if i not in chosen]
    missing = replace(data, batches=tuple(held))
    return (_without(data, kept, missing.tokens), missing) if held else (data, missing)


def apart(data: TokenData, judged: TokenData) -> tuple[TokenData, int]:
    """The text without its sequences that are judged too, and how many these were; the same object where none was.
    Else its recipe says how many tokens of each domain are missing. Raises InputError where no other is left."""
    seen = {_ids(row) for batch in judged.batches for row in batch.each()}
    rows = [row for batch in data.batches for row in batch.each()]
    kept = [row for row in rows if _ids(row) not in seen]
    if not kept:
        raise InputError("data: all of its sequences are judged too; give text that is not")
    if len(kept) == len(rows):
        return data, 0
    rest = replace(data, batches=tuple(kept)).tokens
    missing = {domain: tokens - rest.get(domain, 0) for domain, tokens in data.tokens.items()}
    return _without(data, kept, missing).by_chunk(), len(rows) - len(kept)


def _without(data: TokenData, kept: Sequence[Batch], missing: Mapping[str, int]) -> TokenData:
    """These sequences of it, and a recipe that says how many tokens of each domain are missing."""
    before = data.recipe.get("held_out", {})
    tokens = {d: before.get(d, 0) + missing.get(d, 0) for d in {**before, **missing}}
    return replace(data, batches=tuple(kept), recipe={**data.recipe, "held_out": tokens})


def _ids(batch: Batch) -> bytes:
    return batch.input_ids.numpy().tobytes()


def _chosen(lengths: list[int]) -> list[int]:
    """Which of the sequences are held back."""
    if len(lengths) < LEAST:
        return []
    count = max(1, min(int(len(lengths) * SHARE), MOST // max(1, *lengths)))
    return [int((i + 0.5) * len(lengths) / count) for i in range(count)]

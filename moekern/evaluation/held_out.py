"""Text that is kept from calibration, to see by it what pruning costs."""

from __future__ import annotations

from dataclasses import replace

from moekern.data.batches import Batch, TokenData

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
    if not held:
        return data, missing
    before = data.recipe.get("held_out", {})
    tokens = {d: before.get(d, 0) + missing.tokens.get(d, 0) for d in {**before, **missing.tokens}}
    recipe = {**data.recipe, "held_out": tokens}
    return replace(data, batches=tuple(kept), recipe=recipe), missing


def _chosen(lengths: list[int]) -> list[int]:
    """Which of the sequences are held back."""
    if len(lengths) < LEAST:
        return []
    count = max(1, min(int(len(lengths) * SHARE), MOST // max(1, *lengths)))
    return [int((i + 0.5) * len(lengths) / count) for i in range(count)]

"""What a variant of a model predicts, token by token, held against what the original does: over the full vocabulary, a
few rows of log probabilities at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moekern.errors import InputError

CHUNK = 1 << 22  # numbers that are held of each of several kinds at a time
NLL, KL, TOP1, SHARED, ENTROPY = range(5)


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Ranges of rows of so many numbers, CHUNK numbers at the most or a row."""
    step = max(1, CHUNK // width)
    return (slice(start, start + step) for start in range(0, rows, step))


def token_figures(logits: Tensor, original: Tensor, wanted: Tensor) -> Tensor:
    """[B, S, 5], float64, on the CPU. Of p, what `original` [B, S, V] predicts, and q, what `logits` do (log
    probabilities serve as well): -log q of the token that is wanted [B, S], sum p log(p / q), whether both have the
    same likeliest token, sum min(p, q) = 1 - total variation, and -sum p log p.

    In float32 within a token; entries of no probability in p add nothing. Raises InputError for a token that there is
    no logit of.
    """
    B, S, V = logits.shape
    if wanted.numel() and int(wanted.max()) >= V:
        raise InputError(f"its head predicts {V} classes, and the text has token {int(wanted.max())}: no loss of it")
    found = torch.zeros(B, S, 5, dtype=torch.float64)
    for b in range(B):
        for rows in chunks(S, V):
            q = logits[b, rows].float().log_softmax(-1)
            same = original is logits
            log_p = q if same else original[b, rows].float().log_softmax(-1)
            p = log_p.exp()
            weighed = (log_p * p).masked_fill_(p == 0, 0)
            own = found[b, rows]
            own[:, NLL] = -q.gather(1, wanted[b, rows, None])[:, 0].double().cpu()
            own[:, ENTROPY] = -weighed.sum(1).double().cpu()
            if same:
                own[:, TOP1] = own[:, SHARED] = 1
                continue
            own[:, KL] = ((log_p - q) * p).masked_fill_(p == 0, 0).sum(1).double().cpu()
            own[:, TOP1] = (q.argmax(1) == log_p.argmax(1)).double().cpu()
            own[:, SHARED] = torch.minimum(p, q.exp_()).sum(1).clamp_(max=1).double().cpu()
    return found


def summed(figures: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Of each sequence [B, 5 or 6], float64: sums of -log q, KL and equal likeliest tokens, how many tokens, sum of
    1 - TV, and, where `sizes` [B, S] tells the bytes of each token, the sum of these."""
    B, S, _ = figures.shape
    total = figures.sum(1)
    parts = [total[:, :SHARED], torch.full((B, 1), S, dtype=torch.float64), total[:, SHARED, None]]
    return torch.cat(parts if sizes is None else [*parts, sizes.sum(1, keepdim=True).double()], 1)


def compared(logits: Tensor, original: Tensor, wanted: Tensor) -> Tensor:
    """`summed` figures of each sequence [B, 5], float64; logits or log probabilities as `token_figures` takes them."""
    return summed(token_figures(logits, original, wanted))

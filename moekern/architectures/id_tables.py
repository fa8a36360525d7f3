"""Tables of expert ids, such as DeepSeek V4's tid2eid: what stands in the place of dropped experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def replace_experts(table: np.ndarray, keep: Sequence[int], num_experts: int) -> np.ndarray:
    """A table of expert ids [..., K] with the ids numbered anew and those of dropped experts replaced.

    Hash layers (DeepSeek V4's tid2eid) give each token a fixed list of experts, which no score ranks, so a dropped
    expert's tokens are spread evenly: id d becomes the kept expert of rank d * kept // E, or the next rank, cyclically,
    that the token does not use yet. Slots are filled from left to right. Same shape and dtype as `table`.
    """
    ids = table.reshape(-1, table.shape[-1] if table.ndim else 1).astype(np.int64)
    rank = np.full(num_experts, -1, np.int64)
    rank[list(keep)] = np.arange(len(keep))
    out = rank[ids]
    for slot in range(ids.shape[1]):
        rows = np.flatnonzero(out[:, slot] < 0)
        choice = ids[rows, slot] * len(keep) // num_experts
        for _ in keep:
            used = (out[rows] == choice[:, None]).any(axis=1)
            choice[used] = (choice[used] + 1) % len(keep)
        out[rows, slot] = choice
    return out.reshape(table.shape).astype(table.dtype)

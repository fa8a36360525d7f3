"""Batches of token ids, and the sets of ids that each expert saw."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern import kernels


def batch(T: int, E: int, K: int, V: int, seed: int = 0, ids: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (T,), generator=g).to(ids), torch.randint(-1, E + 1, (T, K), generator=g).to(ids)


def sets(token_ids: Tensor, topk_idx: Tensor, mask: Tensor | None, E: int) -> list[set[int]]:
    found: list[set[int]] = [set() for _ in range(E)]
    for t, (v, chosen) in enumerate(zip(token_ids.tolist(), topk_idx.tolist(), strict=True)):
        for e in chosen:
            if 0 <= e < E and (mask is None or mask[t]):
                found[e].add(v)
    return found


def assert_bits_are_sets(
    shape: tuple[int, int, int, int], ids: torch.dtype, masked: bool, device: str, backend: str
) -> None:
    T, E, K, V = shape
    token_ids, idx = batch(T, E, K, V, ids=ids)
    mask = torch.arange(T) % 3 > 0 if masked else None
    bits = kernels.vocabulary_bits(E, V, device)
    on_device = (None if t is None else t.to(device) for t in (token_ids, idx, mask))
    kernels.vocabulary(*on_device, bits, backend=backend)
    want = sets(token_ids, idx, mask, E)
    found: list[set[int]] = [{64 * w + b for w, word in enumerate(row) for b in range(64) if word >> b & 1}
                             for row in bits.tolist()]  # fmt: skip
    assert found == want
    assert kernels.popcount(bits, backend=backend).tolist() == [len(a) for a in want]
    assert kernels.pair_popcount(bits, backend=backend).tolist() == [[len(a & b) for b in want] for a in want]

"""The C++ extension, op by op: the same bits for every number of threads and every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import moekern._C as _C

if TYPE_CHECKING:
    from moekern.kernels import GramSums, SimilaritySums
    from moekern.kernels.quantised import Quantised
    from moekern.kernels.sums import ExpertSums, MixtureSums, RouterSums
    from moekern.kernels.weight_stats import WeightSums


def obstacle(device: str) -> str | None:
    """Why none of this runs on a device of this type; None where it does."""
    if device == "cpu" or _C.cuda_device_count() > 0:
        return None
    built_for = _C.cuda_architectures()
    return f"no CUDA device that it was built for ({built_for})" if built_for else "built without CUDA"


@contextmanager
def stream_of(tensor: Tensor) -> Iterator[int]:
    """torch's current stream on a GPU tensor's device, which is the current device inside; 0 for a CPU tensor."""
    if not tensor.is_cuda:
        yield 0
        return
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def router_stats(
    logits: Tensor | None, topk_idx: Tensor, topk_weight: Tensor, mask: Tensor | None, sums: RouterSums, *, score: str,
    level: str = "",
) -> None:  # fmt: skip
    """kernels.router_stats with checked arguments: logits [T, E] or None, sums added to in place.

    `level` names an instruction set of _C.levels(), here and below: no bit depends on it; "" is the widest.
    """
    with stream_of(topk_idx) as stream:
        _C.router_stats(logits, topk_idx, topk_weight, mask, sums, score, torch.get_num_threads(), level, stream)


def combine_and_measure(
    y: Tensor, topk_weight: Tensor, topk_idx: Tensor, order: Tensor, offsets: Tensor, mask: Tensor | None,
    residual: Tensor | None, sums: ExpertSums, *, level: str = "",
) -> Tensor:  # fmt: skip
    """kernels.combine_and_measure with checked arguments: the output [T, H] of y's dtype, sums added to in place.

    Residual is [T, H] of y's dtype, or None. Raises ValueError for rows that are not one for each filled slot (CPU).
    """
    out = y.new_empty(len(topk_idx), y.shape[1])
    with stream_of(y) as stream:
        _C.combine_and_measure(
            y, topk_weight, topk_idx, order, offsets, mask, residual, sums, out, torch.get_num_threads(), level, stream
        )
    return out


def mixture_stats(
    y: Tensor, topk_weight: Tensor, share: Tensor, topk_idx: Tensor, order: Tensor, offsets: Tensor,
    mask: Tensor | None, sums: MixtureSums | None, gram: Tensor | None, *, level: str = "",
) -> None:  # fmt: skip
    """kernels.mixture_stats with checked arguments: sums and gram, where they are there, added to in place."""
    with stream_of(y) as stream:
        _C.mixture_stats(
            y, topk_weight, share, topk_idx, order, offsets, mask, sums, gram, torch.get_num_threads(), level, stream
        )


def similarity(
    y: Tensor, norm_square: Tensor | None, mask: Tensor | None, sums: SimilaritySums, *, level: str = ""
) -> None:
    """kernels.similarity with checked arguments: y [E, T, H], norm_square [E, T] float32 or None, sums in place."""
    with stream_of(y) as stream:
        _C.similarity(y, norm_square, mask, sums, torch.get_num_threads(), level, stream)


def sketch(y: Tensor, size: int, *, seed: int, start: int, level: str = "") -> tuple[Tensor, Tensor]:
    """kernels.sketch with checked arguments: projections [E, T, size] and squared norms [E, T], float32."""
    E, T, _ = y.shape
    z, norm_square = torch.empty(E, T, size, device=y.device), torch.empty(E, T, device=y.device)
    with stream_of(y) as stream:
        _C.sketch(y, z, norm_square, seed, start, torch.get_num_threads(), level, stream)
    return z, norm_square


def vocabulary(token_ids: Tensor, topk_idx: Tensor, mask: Tensor | None, bits: Tensor) -> None:
    """kernels.vocabulary with checked arguments: bits [E, W] int64 set in place. ValueError for a wild id (CPU)."""
    with stream_of(bits) as stream:
        _C.vocabulary(token_ids, topk_idx, mask, bits, torch.get_num_threads(), stream)


def popcount(bits: Tensor, *, level: str = "") -> Tensor:
    """kernels.popcount with checked arguments: [E] int64 of bits [E, W] int64."""
    count = bits.new_empty(len(bits))
    with stream_of(bits) as stream:
        _C.popcount(bits, count, torch.get_num_threads(), level, stream)
    return count


def pair_popcount(bits: Tensor, *, level: str = "") -> Tensor:
    """kernels.pair_popcount with checked arguments: [E, E] int64 of bits [E, W] int64."""
    count = bits.new_empty(len(bits), len(bits))
    with stream_of(bits) as stream:
        _C.pair_popcount(bits, count, torch.get_num_threads(), level, stream)
    return count


def weight_stats(weight: Tensor | Quantised, sums: WeightSums, *, level: str = "") -> None:
    """kernels.weight_stats with checked arguments: weight dense [E, N], or quantised; sums added to in place."""
    dense, stored = (weight, None) if isinstance(weight, Tensor) else (None, _stored(weight))
    with stream_of(sums.count) as stream:
        _C.weight_stats(dense, stored, sums, torch.get_num_threads(), level, stream)


def dequantize(weight: Quantised, dtype: torch.dtype, *, level: str = "") -> Tensor:
    """kernels.dequantize with checked arguments: [E, R, C] of dtype, in the order of the codes' rows and columns."""
    codes = weight.codes
    out = torch.empty(len(codes), weight.rows, weight.columns, dtype=dtype, device=codes.device)
    with stream_of(codes) as stream:
        _C.dequantize(_stored(weight), out, torch.get_num_threads(), level, stream)
    return out


def _stored(w: Quantised) -> _C.Stored:
    return (w.codes, w.coding, w.scale, w.zero, w.group, w.rows, w.columns, *w.block)


def sort_by_expert(topk_idx: Tensor, num_experts: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """kernels.sort_by_expert with checked arguments: (order [T·K] int64, offsets [E + 1] int64)."""
    order = topk_idx.new_empty(topk_idx.numel(), dtype=torch.int64)
    offsets = topk_idx.new_empty(num_experts + 1, dtype=torch.int64)
    with stream_of(topk_idx) as stream:
        _C.sort_by_expert(topk_idx, mask, order, offsets, torch.get_num_threads(), stream)
    return order, offsets


def expert_gram(
    a: Tensor, r: Tensor, offsets: Tensor, mask: Tensor | None, sums: GramSums, *, tokens: Tensor | None = None,
    level: str = "",
) -> None:  # fmt: skip
    """kernels.expert_gram with checked arguments: sums added to in place."""
    with stream_of(a) as stream:
        _C.expert_gram(a, r, tokens, offsets, mask, sums, torch.get_num_threads(), level, stream)


def gated_energy(
    rows: Tensor, gates: Tensor, offsets: Tensor, mask: Tensor | None, energy: Tensor, *, level: str = ""
) -> Tensor:
    """kernels.gated_energy with checked arguments: [N, M] float32, energy [E, M] float64 added to in place."""
    out = torch.empty(len(rows), energy.shape[1], device=rows.device)
    with stream_of(rows) as stream:
        _C.gated_energy(rows, gates, offsets, mask, energy, out, torch.get_num_threads(), level, stream)
    return out


def scatter_residual(r: Tensor, a: Tensor, delta: Tensor, tokens: Tensor, offsets: Tensor, *, level: str = "") -> None:
    """kernels.scatter_residual with checked arguments: r [T, H] changed in place."""
    with stream_of(r) as stream:
        _C.scatter_residual(r, a, delta, tokens, offsets, torch.get_num_threads(), level, stream)

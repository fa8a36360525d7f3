"""The experts' MLP by torch's grouped matrix product: gathered rows, two products, an activation between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moekern.kernels.combine_and_measure import combine_and_measure
from moekern.kernels.dequantize import dequantize
from moekern.kernels.quantised import Quantised
from moekern.kernels.reference import ACTIVATIONS
from moekern.kernels.sums import ExpertSums, expert_sums


def obstacle(device: str) -> str | None:
    """Why none of this runs on a device of this type; None where it does."""
    return None


def grouped_mlp(
    x: Tensor, gate_up: Tensor | Quantised, down: Tensor | Quantised, topk_weight: Tensor, topk_idx: Tensor,
    order: Tensor, offsets: Tensor, mask: Tensor | None, residual: Tensor | None, sums: ExpertSums | None, *,
    activation: str,
) -> Tensor:  # fmt: skip
    slots, K = topk_idx.numel(), topk_idx.shape[1]
    y = x.new_zeros(len(order), x.shape[1])
    if slots and y.numel():
        rows = x[order.clamp(0, slots - 1) // K]  # behind the experts' rows order may name anything
        gate, up = product(rows, dense(gate_up, x.dtype), offsets).chunk(2, dim=1)
        y = product(ACTIVATIONS[activation](gate) * up, dense(down, x.dtype), offsets)
    sums = sums or expert_sums(len(offsets) - 1, device=x.device)
    return combine_and_measure(y, topk_weight, topk_idx, order, offsets, mask, sums, residual=residual)


def dense(weight: Tensor | Quantised, dtype: torch.dtype) -> Tensor:
    """[E, R, C]; a quantised weight is dequantised expert by expert, since that takes temporary memory."""
    if isinstance(weight, Tensor):
        return weight
    stack = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    for e, matrix in enumerate(stack):
        matrix.copy_(dequantize(weight.expert(e), dtype)[0])
    return stack


def product(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows [N, C] times the transposes of weight [E, R, C], each expert's rows with its own; [N, R].

    Rows from offsets[E] on are anything. Without a grouped product for these tensors the offsets are read on the host.
    """
    grouped = grouped_product(rows, weight)
    if grouped is not None:
        return grouped(rows, weight.mT, offs=offsets[1:].to(torch.int32)).contiguous()  # R may be padded
    out, bounds = rows.new_empty(len(rows), weight.shape[1]), offsets.tolist()
    for e, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        torch.mm(rows[start:stop], weight[e].T, out=out[start:stop])
    return out


def grouped_product(rows: Tensor, weight: Tensor) -> Callable[..., Tensor] | None:
    """torch's grouped product where it takes these tensors: it wants every row to start at a multiple of 16 bytes."""
    if any(t.data_ptr() % 16 or t.shape[-1] * t.element_size() % 16 for t in (rows, weight)) or not weight.numel():
        return None
    capability = torch.cuda.get_device_capability(rows.device) if rows.device.type == "cuda" else None
    public = getattr(F, "grouped_mm", None)  # since torch 2.10
    if public is not None and (capability is None or capability >= (8, 0)):
        return public
    private = getattr(torch, "_grouped_mm", None)  # before, for Hopper and bfloat16 alone
    return private if capability and capability[0] == 9 and rows.dtype == torch.bfloat16 else None

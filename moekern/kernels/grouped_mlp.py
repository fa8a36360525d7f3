"""The experts block of one MoE layer: gathered rows through gate, up and down projections, combined and measured."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.kernels import reference
from moekern.kernels.checks import BOOL, FLOATS, I64, INTS, Tensors, check_tensors
from moekern.kernels.combine_and_measure import check_rows
from moekern.kernels.dispatch import backend_for, implementation, serves
from moekern.kernels.quantised import Quantised
from moekern.kernels.sums import ExpertSums, as_arguments

ACTIVATIONS = tuple(reference.ACTIVATIONS)
# Compute capability -> the backend that was measured to be the fastest there; dispatch.PREFERENCE decides for the rest.
# Nothing has been measured on a GPU yet.
FASTEST: dict[tuple[int, int], str] = {}


def grouped_mlp(
    x: Tensor,
    gate_up: Tensor | Quantised,
    down: Tensor | Quantised,
    topk_weight: Tensor,
    topk_idx: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    sums: ExpertSums | None,
    *,
    activation: str = "silu",
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Σₖ gate·y for each token, [T, H], with y = down(act(gate(x))·up(x)); y is measured as by combine_and_measure.

    x [T, H] is float32, bfloat16 or float16. gate_up [E, 2I, H] (rows 0:I are the gate's) and down [E, H, I] have x's
    dtype, or are FP8 e4m3 made by `scaled` with a block of any size, and then stand for dequantize(weight, x.dtype).
    topk_weight, topk_idx, order, offsets, mask, residual and sums are those of combine_and_measure; without sums
    nothing is measured. activation is named as in a model's config: silu, gelu (with erf) or gelu_pytorch_tanh.
    Neither x nor weights get a gradient.

    Rounded to x's dtype are: gate(x) and up(x), act(gate(x)), its product with up(x), and y, each once. Products are
    added in float32 at least, in an order of the backend's own, so backends agree up to rounding; out and sums are what
    combine_and_measure makes of a backend's y, the squares of a row added in another order.
    Raises ValueError for a wrong argument (on a CPU also for wrong values in order and offsets), NotImplementedError
    for a backend that has no such op.
    """
    op = "grouped_mlp"
    if activation not in ACTIVATIONS:
        raise ValueError(f"[{op}] activation: expected one of {', '.join(ACTIVATIONS)}, got {activation}")
    same = (x.dtype,) if isinstance(x, Tensor) else FLOATS
    sizes = check_tensors(op, {
        "x": (x, "T H", FLOATS),
        "offsets": (offsets, "E+1", I64),
        "order": (order, "N", I64),
        "topk_idx": (topk_idx, "T K", INTS),
        "topk_weight": (topk_weight, "T K", FLOATS),
        "mask": (mask, "T", BOOL),
        "residual": (residual, "T H", same),
        **_weight("gate_up", op, gate_up, same, "E 2I H"),
        **_weight("down", op, down, same, "E H I"),
        **({} if sums is None else as_arguments(ExpertSums, sums)),
    })  # fmt: skip
    if sizes["2I"] != 2 * sizes["I"]:
        raise ValueError(f"[{op}] gate_up: expected 2I={2 * sizes['I']}, got {sizes['2I']}")
    device = x.device.type
    name = backend_for(op, device, backend or _fastest(op, x.device))
    if device == "cpu":
        check_rows(op, topk_idx, order, offsets)
    run = implementation(name, op)
    x, topk_weight = x.detach(), topk_weight.detach()
    h = None if residual is None or sums is None else residual.detach()
    gate_up, down = (w.detach() if isinstance(w, Tensor) else w for w in (gate_up, down))
    out: Tensor = run(x, gate_up, down, topk_weight, topk_idx, order, offsets, mask, h, sums, activation=activation)
    return out


def _fastest(op: str, device: torch.device) -> str | None:
    name = FASTEST.get(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    return name if name and serves(name, op, device.type) else None


def _weight(name: str, op: str, weight: Tensor | Quantised, dtypes: tuple[torch.dtype, ...], dims: str) -> Tensors:
    """What check_tensors is to check of a weight."""
    if not isinstance(weight, Quantised):
        return {name: (weight, dims, dtypes)}
    if weight.coding != "e4m3" or not weight.stacked:
        what = weight.coding if weight.stacked else "one matrix"
        raise ValueError(f"[{op}] {name}: expected a stack of FP8 e4m3 matrices, got {what}")
    scale = f"E {name}-rows {name}-columns"
    return {name: (weight.codes, dims, (torch.uint8,)), f"{name} scale": (weight.scale, scale, (*FLOATS, torch.uint8))}

"""What the weights alone say: one pass over a checkpoint's experts and routers, a layer at a time, without any text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern import kernels
from moekern.architectures import Layout, MoeLayer, find_layout
from moekern.architectures.channels import fused_axis
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.errors import InputError
from moekern.kernels import Quantised
from moekern.measurement.stored_weights import Matrix, parted, projections
from moekern.model.finite import all_finite, expert_list, wrong_experts
from moekern.model.reader import read_tensors
from moekern.statistics.file import Statistics
from moekern.statistics.header import Source, make_header
from moekern.statistics.layer import LayerStatistics
from moekern.version import versions

NO_TEXT = "weights"  # the one domain of statistics without text
TILE = 1 << 26  # numbers of all experts that are multiplied at a time


def weigh(
    source: str | Path | Checkpoint,
    *,
    costly: bool = True,
    backend: str | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> Statistics:
    """Statistics of the weights tier, with no tokens. `costly` adds stable ranks and inner products between experts.

    Resident: one layer as it is stored, and with `costly` one of its projections in bfloat16 or wider. Quantised
    weights count as what they stand for. `progress(done, total)` counts layers, the one at work by its share.

    Raises InputError for a checkpoint that is not a MoE or stores its experts in a layout that moekern does not know as
    numbers.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    layers, total = {}, len(layout.layers)
    for done, (key, layer) in enumerate(layout.layers.items()):
        within = lambda share, done=done: progress(done + share, total)  # noqa: E731
        progress(done, total)
        sums = weigh_layer(checkpoint, layout, layer, costly=costly, backend=backend, within=within)
        layers[key] = {NO_TEXT: sums}
        progress(done + 1, total)
    return Statistics(_header(checkpoint, layout, backend), layers)


def weigh_layer(
    checkpoint: Checkpoint,
    layout: Layout,
    layer: MoeLayer,
    *,
    costly: bool = True,
    backend: str | None = None,
    within: Callable[[float], None] = lambda share: None,
) -> LayerStatistics:
    """The weights tier of one layer. All matrices of an expert count as one, but for the stable rank: the mean of
    gate's, up's and down's, whether the checkpoint stores gate and up apart or in one tensor. `within` is told
    which share of the layer is done."""
    E = layer.num_experts
    sums, ranks, number = kernels.weight_sums(E), torch.zeros(E, dtype=torch.float64), 0
    gram = torch.zeros(E, E, dtype=torch.float64) if costly else torch.zeros(0, 0, dtype=torch.float64)
    stored = projections(checkpoint, layer)
    matrices = 0.5 if costly else 1.0  # of the work on a projection; the rest is inner products
    for place, (name, experts) in enumerate(stored.items()):
        others = [alike[0].shape for other, alike in stored.items() if other != name]
        axis, fused = fused_axis(experts[0].shape, others), layout.family.alternating
        alternating = bool(fused) and name.endswith(fused)
        number += 1 if axis is None else 2
        part_of = _between(within, place / len(stored), (place + 1) / len(stored))
        for e, matrix in enumerate(experts):
            kernels.weight_stats(matrix, kernels.of_expert(sums, e), backend=backend)
            if not sums.abs_sum[e].isfinite():
                raise InputError(f"{checkpoint.folder}: layer {layer.key}: expert {e}: its weights are not finite")
            if costly:
                for part in (matrix,) if axis is None else parted(matrix, axis, alternating):
                    ranks[e] += kernels.stable_rank(part)[0]
            part_of(matrices * (e + 1) / E)
        if costly:
            gram += _gram(experts, backend, _between(part_of, matrices, 1))
    if not number:
        raise InputError(f"{checkpoint.folder}: layer {layer.key}: its experts have no weights that moekern can read")
    router = _router(checkpoint, layer)
    if not all_finite(router):
        which = expert_list(wrong_experts(router))
        raise InputError(f"{checkpoint.folder}: layer {layer.key}: {which}: rows of the router are not finite")
    return replace(
        LayerStatistics.zeros(E),
        weight_count=sums.count,
        weight_abs_sum=sums.abs_sum,
        weight_square_sum=sums.square_sum,
        weight_stable_rank=ranks / number if costly else ranks[:0],
        weight_gram=gram,
        router_gram=router @ router.T,
    )


def _between(within: Callable[[float], None], low: float, high: float) -> Callable[[float], None]:
    """What tells of the share of a part that is from `low` to `high` of the whole."""
    return lambda share: within(low + share * (high - low))


def _gram(experts: list[Matrix], backend: str | None, within: Callable[[float], None]) -> Tensor:
    """[E, E] inner products of the flattened matrices."""
    dense = [kernels.dequantize(m, torch.bfloat16) if isinstance(m, Quantised) else m for m in experts]
    sums = kernels.similarity_sums(len(dense))
    rows, columns = dense[0].shape
    step = max(1, TILE // max(1, len(dense) * columns))
    for start in range(0, rows, step):
        tile = torch.stack([matrix[start : start + step] for matrix in dense])
        kernels.similarity(tile, None, sums, backend=backend)
        within(min(1.0, (start + step) / rows))
    return sums.gram_sum


def _router(checkpoint: Checkpoint, layer: MoeLayer) -> Tensor:
    """[E, H] float64 rows of the router's matrix; [E, 0] where there is none."""
    for tensor in layer.of_role("router"):
        value = read_tensors(checkpoint, [tensor.name])[tensor.name]
        if value.ndim >= 2 and value.is_floating_point():
            rows = value.double().movedim(tensor.axis, 0)[: layer.num_experts * tensor.rows]
            return rows.reshape(layer.num_experts, -1)
    return torch.zeros(layer.num_experts, 0, dtype=torch.float64)


def _header(checkpoint: Checkpoint, layout: Layout, backend: str | None) -> dict[str, Any]:
    ops = ("weight_stats", "similarity", "dequantize")
    return make_header(
        Source.of(checkpoint, layout),
        tokens={NO_TEXT: 0},
        data="no text: the weights alone",
        backend={op: kernels.backend_for(op, "cpu", backend) for op in ops},
        versions=versions(),
    )

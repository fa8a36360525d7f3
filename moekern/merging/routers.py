"""Router rows of merged groups: linear combinations of the layer's rows, fitted to what their members' logits say.

A second pass over the text, whose routers choose as the original's: the logits of a layer and the targets of its groups
stand side by side, and the sums of their products are the normal equations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekern import kernels
from moekern.architectures import find_layout
from moekern.calibration.passes import MeasuringPass, Progress, Steps, Sums
from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.measurement.batch import BatchContext, Seen
from moekern.measurement.recorder import Recorder
from moekern.model.compute import Compute
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.plan.document import Plan
from moekern.plan.groups import MERGE, merged_groups
from moekern.plan.router_rows import (
    DOMINANT,
    LOG_SUM,
    ROUTER,
    RouterRow,
    check_routers,
    rows_document,
)

RIDGE = 1e-6  # of the mean of the diagonal

Members = Sequence[int]


def plan_with_routers(
    checkpoint: Checkpoint,
    data: TokenData,
    compute: Compute,
    plan: Plan,
    kind: str,
    *,
    domains: Collection[str] | None = None,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """The plan with a router row for each expert that others are merged into, fitted over the text (of `domains`).

    The type that is computed in is settled. Raises InputError for a router whose rows are not known to give logits, and
    for "log-sum" where scores are not those of a softmax; NoRoomForText where the text is too much for memory and disk.
    """
    if kind == DOMINANT:
        return plan
    layout = find_layout(checkpoint)
    groups = {key: merged_groups(layer) for key, layer in plan.layers.items()}
    groups = {key: own for key, own in groups.items() if own}
    check_routers(checkpoint, layout, groups, kind)
    constants = {key for key in groups if layout.router_tensors(key)[1] is not None}
    recorder = TargetRecorder(
        layout.family.score, backend=compute.backend, kind=kind, groups=groups, constants=constants,
        domains=None if domains is None else tuple(domains),
    )  # fmt: skip
    with open_layerwise(checkpoint, layout, compute) as layerwise:
        fit = _Pass(layerwise, data, recorder, Steps(progress, len(layerwise.layers)))
        fit.run()
    told = plan.provenance.get(MERGE)
    merge = {**(told if isinstance(told, dict) else {}), ROUTER: rows_document(kind, fit.rows)}
    return replace(plan, provenance={**plan.provenance, MERGE: merge})


@dataclass
class TargetRecorder(Recorder):
    """Adds up products of logits and of groups' targets, beside what every recorder does."""

    kind: str = ""
    groups: Mapping[str, Mapping[int, Members]] = field(default_factory=dict)  # layer -> expert -> its group
    constants: Collection[str] = ()  # layers whose router has a bias
    domains: Collection[str] | None = None
    products: dict[str, Tensor] = field(default_factory=dict)  # layer -> [n + G, n + G] float64

    def measure(self, layer: str, seen: Seen, context: BatchContext) -> Tensor:
        if layer in self.groups and (self.domains is None or context.domain in self.domains):
            if seen.logits is None:
                raise InputError(
                    f"layer {layer}: its router tells no logits, so that --router {self.kind} has no target"
                )
            logits = seen.logits[:, : seen.num_experts].float()
            if not bool(logits.isfinite().all()):
                what = f"its router's logits are not finite, so that --router {self.kind} cannot be fitted"
                raise InputError(f"layer {layer}: {what}; take --router {DOMINANT}")
            ones = [torch.ones_like(logits[:, :1])] if layer in self.constants else []
            goals = targets(logits, list(self.groups[layer].values()), self.kind)
            own = products(torch.cat([logits, *ones, goals], 1), self.backend)
            self.products[layer] = self.products[layer] + own if layer in self.products else own
        return super().measure(layer, seen, context)


def targets(logits: Tensor, groups: Sequence[Members], kind: str) -> Tensor:
    """Of logits [T, E] float32 what each group's should be, [T, G]."""
    of = [logits[:, list(group)] for group in groups]
    return torch.stack([each.logsumexp(1) if kind == LOG_SUM else each.amax(1) for each in of], 1)


def products(columns: Tensor, backend: str | None) -> Tensor:
    """Sums over tokens of products of columns [T, n] float32: [n, n] float64."""
    none = torch.empty(len(columns), 0, device=columns.device)
    sums = kernels.router_sums(columns.shape[1], columns.device, gram=True)
    kernels.router_stats(columns.contiguous(), none.long(), none, None, sums, score="sigmoid", backend=backend)
    return sums.logit_gram


def fitted(gram: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Coefficients [G, n] of n columns, from the sums of products of these and, behind them, of G targets: ridge
    regression, with RIDGE of the mean diagonal. Not finite where that is 0. By elimination, row after row, of a matrix
    that needs no pivots: a library's solution would differ in its last bits by the number of threads."""
    rows, found = gram[:n].copy(), np.zeros((n, len(gram) - n))
    rows[:, :n] += np.eye(n) * (RIDGE * np.trace(gram[:n, :n]) / n)
    with np.errstate(all="ignore"):
        for i in range(n):
            rows[i + 1 :, i:] -= (rows[i + 1 :, i] / rows[i, i])[:, None] * rows[i, i:]
        for i in reversed(range(n)):
            found[i] = (rows[i, n:] - (rows[i, i + 1 : n, None] * found[i + 1 :]).sum(0)) / rows[i, i]
    return found.T


class _Pass(MeasuringPass):
    """Fits the rows of each layer when it is done."""

    recorder: TargetRecorder

    def __init__(self, layerwise: LayerwiseModel, data: TokenData, recorder: TargetRecorder, step: Steps) -> None:
        super().__init__(layerwise, data, recorder, step)
        self.rows: dict[str, dict[int, RouterRow]] = {}

    def finished(self, key: str, sums: Sums) -> None:
        gram = self.recorder.products.pop(key, None)
        if gram is None:
            return
        E, constant = next(iter(sums.values())).num_experts, key in self.recorder.constants
        rows = fitted(gram.cpu().numpy(), E + constant).astype(np.float32).tolist()
        if not np.isfinite(rows).all():
            what = "router rows that are fitted to its logits are not finite: these are all 0, or too large to be added"
            raise InputError(f"layer {key}: {what}; take --router {DOMINANT}")
        given = zip(self.recorder.groups[key], rows, strict=True)
        self.rows[key] = {e: RouterRow(tuple(row[:E]), *row[E:]) for e, row in given}

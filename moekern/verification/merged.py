"""Merged experts computed again from plan and source, by another road than the one that wrote them: numpy, whole
tensors as the safetensors library gives them, all experts of a layer side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekern.architectures import ExpertTensor, Layout, MoeLayer
from moekern.plan.document import Plan
from moekern.plan.groups import aligned
from moekern.plan.router_rows import router_rows
from moekern.verification.narrow import channel_axis, expert_part
from moekern.verification.opened import Folder

Rows = NDArray[Any]  # [I, n]: what a tensor holds of each channel


def merged_again(old: Folder, layer: MoeLayer, of: Plan) -> dict[str, Any]:
    """Name in the pruned checkpoint -> bytes, of all tensors that hold merged experts of a layer."""
    plan, align = of.layers[layer.key], aligned(of.provenance)
    tensors = [t for t in layer.of_role("expert") if t.projection]
    whole = {t.name: old.tensor(t.name) for t in tensors}
    groups = {e: dict(group) for e, group in zip(plan.keep, plan.groups or (), strict=True)}
    orders = {
        (e, member): _order(tensors, whole, e, member) if align else None
        for e, group in groups.items() for member, weight in group.items() if member != e and weight > 0
    }  # fmt: skip
    found: dict[str, Any] = {}
    for tensor in tensors:
        rows = [e for e in plan.keep if tensor.expert in (None, e)]
        alone = all(not any(w > 0 for m, w in groups[e].items() if m != e) for e in rows)
        if not rows or (alone and tensor.expert is not None):
            continue
        made = [_mean(tensor, tensors, whole, e, groups[e], orders).to(whole[tensor.name].dtype) for e in rows]
        stack = torch.cat(made) if tensor.rows > 1 else torch.stack(made)
        name = tensor.name if tensor.expert is None else tensor.template.replace("{}", str(plan.keep.index(rows[0])))
        value = (stack if tensor.expert is None else made[0]).contiguous()
        found[name] = value.flatten().view(torch.uint8).numpy()
    return found


def routers_again(old: Folder, layout: Layout, key: str, of: Plan) -> dict[str, Any]:
    """Name -> bytes of matrix and bias of a layer's router, where the plan combines rows of it; {} where not."""
    rows, keep, found = router_rows(of).get(key, {}), of.layers[key].keep, dict[str, Any]()
    for tensor in layout.router_tensors(key) if rows else ():
        if tensor is not None:
            whole = old.tensor(tensor.name)
            numbers = np.asarray(whole.double().numpy())
            made = whole[[*keep, *range(len(whole) - tensor.trailing, len(whole))]]
            for e, row in rows.items():
                total = np.zeros_like(numbers[0])
                for member, coefficient in enumerate(row.of):
                    total = total + numbers[member] * coefficient
                total = total + row.constant if whole.ndim == 1 else total
                made[keep.index(e)] = torch.from_numpy(np.asarray(total)).to(whole.dtype)
            found[tensor.name] = made.contiguous().flatten().view(torch.uint8).numpy()
    return found


def _mean(
    tensor: ExpertTensor,
    tensors: list[ExpertTensor],
    whole: Mapping[str, Tensor],
    expert: int,
    group: Mapping[int, float],
    orders: Mapping[tuple[int, int], NDArray[np.int64] | None],
) -> Tensor:
    """What the tensor holds of an expert, with all of its members in it."""
    own = _numbers(expert_part(tensor, whole[tensor.name], expert))
    total, weights = own.copy(), sum(group.values())
    for member, weight in group.items():
        if member == expert or weight == 0:
            continue
        other = next(t for t in tensors if _same_place(t, tensor) and t.expert in (None, member))
        given = _numbers(expert_part(other, whole[other.name], member))
        order = orders[expert, member]
        if order is not None and tensor.channel_axis is not None:
            places = order
            if tensor.channel_form == "halves":
                places = np.concatenate([order, order + len(order)])
            elif tensor.channel_form == "alternating":
                places = np.stack([2 * order, 2 * order + 1], 1).ravel()
            given = np.take(given, places, axis=channel_axis(tensor))
        total = total + (given - own) * own.dtype.type(weight / weights)
    return torch.from_numpy(total)


def _order(tensors: list[ExpertTensor], whole: Mapping[str, Tensor], expert: int, member: int) -> NDArray[np.int64]:
    """The member's channel in the place of each of the expert's."""
    from scipy.optimize import linear_sum_assignment

    one, two = (_expert(tensors, whole, e) for e in (expert, member))
    likeness = np.zeros(())
    for name in ("gate", "up", "down"):
        if name in one:
            likeness = likeness + np.einsum("ih,jh->ij", one[name], two[name], optimize=True)
    return np.asarray(linear_sum_assignment(np.nan_to_num(-likeness.astype(np.float32)))[1])


def _expert(tensors: list[ExpertTensor], whole: Mapping[str, Tensor], expert: int) -> dict[str, Rows]:
    parts = [_channels(t, whole[t.name], expert) for t in tensors if t.expert in (None, expert)]
    return {name: rows for part in parts for name, rows in part.items()}


def _channels(tensor: ExpertTensor, whole: Tensor, expert: int) -> dict[str, Rows]:
    """Projection -> an expert's rows by channel, of gate and up in one tensor each apart; {} of a bias."""
    part = expert_part(tensor, whole, expert)
    if part.ndim != 2:
        return {}
    rows = np.moveaxis(part.double().numpy(), channel_axis(tensor), 0)
    if tensor.projection != "gate_up":
        return {tensor.projection: rows}
    half = len(rows) // 2
    gate, up = (rows[::2], rows[1::2]) if tensor.channel_form == "alternating" else (rows[:half], rows[half:])
    return {"gate": gate, "up": up}


def _same_place(one: ExpertTensor, other: ExpertTensor) -> bool:
    return (one.projection, one.is_bias) == (other.projection, other.is_bias)


def _numbers(part: Tensor) -> NDArray[Any]:
    return np.asarray(part.to(torch.promote_types(part.dtype, torch.float32)).numpy())

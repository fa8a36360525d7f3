"""Experts that have lost channels, read by another road than the one that cut them: through torch, whole experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekern.architectures import ExpertTensor, Layout, MoeLayer
from moekern.plan.channels import channel_rows
from moekern.plan.document import Plan
from moekern.verification.opened import Folder

ROWS = 256  # channels of an expert whose squares are summed at a time


@dataclass(frozen=True)
class Channels:
    """Of a layer whose experts had `width` channels: those that stay of each that is kept, int64 [M], by its number."""

    width: int
    left: int
    of: Mapping[int, Tensor]
    coded: bool = False  # experts are quantised: what is left of them is computed, and not cut

    def rows(self, tensor: ExpertTensor, expert: int) -> Tensor:
        """Where they stand in the expert's own matrix, in their order in the result."""
        own = self.of.get(expert, torch.arange(self.left))
        if tensor.channel_form == "halves":
            return torch.cat([own, own + self.width])
        if tensor.channel_form == "alternating":
            return torch.cat([2 * own[:, None], 2 * own[:, None] + 1], 1).flatten()
        return own


def kept_channels(old: Folder, layout: Layout, plan: Plan, kept: Mapping[str, tuple[int, ...]]) -> dict[str, Channels]:
    """Layer key -> channels; empty where experts stay whole. Layers that the plan does not name (MTP) keep the largest
    products of the squared norms of gate's and up's rows and down's columns."""
    found: dict[str, Channels] = {}
    for key, layer in {**layout.layers, **layout.mtp}.items() if plan.width is not None else ():
        if key not in kept or layer.width is None or plan.width is None:
            continue
        own = plan.layers.get(key)
        if layer.step:  # with all channels they are compared whole
            found |= {key: Channels(layer.width, plan.width, {}, coded=True)} if plan.width < layer.width else {}
            continue
        if own is not None and own.channels is not None:
            texts = dict(zip(own.keep, torch.from_numpy(channel_rows(own.channels)), strict=True))
        else:
            texts = {e: _largest(old, layer, e, layer.width, plan.width) for e in kept[key]}
        found[key] = Channels(layer.width, plan.width, texts)
    return found


def _largest(old: Folder, layer: MoeLayer, expert: int, width: int, left: int) -> Tensor:
    product = torch.ones(width, dtype=torch.float64)
    for tensor in layer.of_role("expert"):
        if tensor.channel_axis is None or tensor.expert not in (None, expert):
            continue
        matrix = expert_part(tensor, old.tensor(tensor.name), expert)
        if matrix.ndim != 2:
            continue
        rows = torch.cat([_energies(part) for part in matrix.movedim(channel_axis(tensor), 0).split(ROWS)])
        if tensor.projection == "gate_up":
            rows = rows.unflatten(0, (-1, 2) if tensor.channel_form == "alternating" else (2, -1))
            rows = rows.prod(1 if tensor.channel_form == "alternating" else 0)
        product *= rows
    return product.argsort(descending=True, stable=True)[:left].sort().values


def _energies(rows: Tensor) -> Tensor:
    """Sums of squares of rows [n, m], in two parts of multiples of a power of two: in any order they are the same."""
    left, total = rows.double().square(), torch.zeros(len(rows), dtype=torch.float64)
    for _ in range(2):
        exponents = left.abs().amax(1).frexp().exponent.tolist()
        units = [math.ldexp(1.5, exponent + left.shape[1].bit_length()) for exponent in exponents]
        unit = torch.tensor(units, dtype=torch.float64)[:, None]
        part = (left + unit) - unit
        total += part.sum(1)
        left = left - part
    return total


def widened(layout: Layout, layer: MoeLayer, channels: Channels) -> dict[str, tuple[int, int]]:
    """Name -> axis and size of the tensors of shared experts that zeros are added to."""
    before = layout.shared_times * (layer.width or 0)
    size = math.ceil(before / channels.left) * channels.left
    return {t.name: (t.axis, size) for t in layer.shared if t.axis is not None and before and size != before}


def narrow_shape(shape: Sequence[int], tensor: ExpertTensor, channels: Channels) -> list[int]:
    """The shape of a tensor that has lost experts, without the channels that go."""
    out = list(shape)
    if tensor.rows > 1:  # experts in rows
        out[0] = out[0] // channels.width * channels.left
    elif tensor.channel_axis is not None:
        out[tensor.channel_axis] = out[tensor.channel_axis] * channels.left // channels.width
    return out


def narrow_problems(
    name: str, source: str, tensor: ExpertTensor, keep: Sequence[int], channels: Channels, old: Folder, new: Folder
) -> tuple[list[str], int]:
    """Problems of one tensor, and the bytes of it that were compared: an expert at a time."""
    before, after, nbytes = old.tensor(source), new.tensor(name), 0
    for place, expert in enumerate(keep if tensor.expert is None else [tensor.expert]):
        want = expert_part(tensor, before, expert).index_select(channel_axis(tensor), channels.rows(tensor, expert))
        got = after
        if tensor.expert is None:
            got = after[place] if tensor.rows == 1 else after.unflatten(0, (len(keep), channels.left))[place]
        nbytes += got.nbytes
        if got.shape != want.shape or not torch.equal(_bits(want), _bits(got)):
            return [f"{name}: differs from the channels of the source's {source}, expert {expert}, that stay"], nbytes
    return [], nbytes


def wide_problems(name: str, source: str, axis: int, old: Folder, new: Folder) -> tuple[list[str], int]:
    """The same of a shared expert's tensor, which zeros follow along an axis."""
    before, after = old.tensor(source), new.tensor(name)
    own, more = after.split([before.shape[axis], after.shape[axis] - before.shape[axis]], axis)
    if not torch.equal(_bits(own), _bits(before)):
        return [f"{name}: differs from the source's {source}"], after.nbytes
    return ([f"{name}: what follows the source's channels is not zero"] if _bits(more).any() else []), after.nbytes


def channel_axis(tensor: ExpertTensor) -> int:
    assert tensor.channel_axis is not None
    return tensor.channel_axis - (tensor.expert is None and tensor.rows == 1)


def expert_part(tensor: ExpertTensor, whole: Tensor, expert: int) -> Tensor:
    """One expert's part of a tensor."""
    if tensor.expert is not None:
        return whole
    return whole[expert] if tensor.rows == 1 else whole.unflatten(0, (-1, tensor.rows))[expert]


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)

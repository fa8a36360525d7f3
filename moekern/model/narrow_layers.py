"""Cut channels of a decoder layer's experts in memory, so that it computes what the narrower checkpoint's computes.

The layer is rebuilt from the configuration with a smaller width. The experts' weights go over through `views`, whatever
way they are held; everything else has the shape that it had, but for shared experts whose width follows that of the
others: these become as wide as the configuration can say, and what is new in them is zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moekern.errors import InputError
from moekern.model.experts import experts_of
from moekern.model.projections import Views, halves, views

INSTEAD = "take a plan without channels"


def expert_parameters(layer: nn.Module) -> tuple[nn.Module, frozenset[str]] | None:
    """The module of a layer's experts, and the names, within the layer, of what holds their weights; None where it is
    not known how."""
    block = experts_of(layer)
    known = None if block is None else halves(block)
    if block is None or known is None:
        return None
    within = next(name for name, module in layer.named_modules() if module is block)
    return block, frozenset(f"{within}.{name}".lstrip(".") for name in known.parameters)


def check_cuttable(layer: nn.Module, key: str) -> Views:
    """The weights of a layer's experts. Raises InputError where no channels of them can be cut in memory."""
    found = expert_parameters(layer)
    if found is None:
        what = "its experts are not held together, so that no channels of them are cut in memory"
        raise InputError(f"layer {key}: {what}; {INSTEAD}")
    own = views(found[0])
    if own.down.is_meta:
        what = "its experts run in groups, which have all their channels"
        raise InputError(f"layer {key}: {what}; give more (--memory, --gpu-memory), or {INSTEAD}", kind="memory")
    return own


def check_channels(channels: Tensor, width: int, key: str) -> None:
    """Raise InputError for channels that experts do not have."""
    wrong = channels[(channels < 0) | (channels >= width)].tolist()
    if wrong:
        what = f"channel {wrong[0]} is to stay, and its experts have channels 0 to {width - 1}"
        raise InputError(f"layer {key}: {what}")


def narrow_live(layer: nn.Module, smaller: nn.Module, picked: Tensor, key: str, shared: Mapping[str, int]) -> None:
    """Let `smaller`, a decoder layer of the same class and number of experts with its parameters on the meta device,
    have a loaded layer's weights with the channels picked [E, M] of each expert.

    `shared` has the names, within the layer, of the shared expert's weights and the axis of their channels. Raises
    InputError for a parameter whose shape the width changes and that is of neither.
    """
    old, (block, names) = check_cuttable(layer, key), expert_parameters(smaller) or (layer, frozenset())
    parts = dict(layer.named_modules())
    for path, part in smaller.named_modules():
        source: Any = parts[path]
        for name, value in list(part._buffers.items()):
            if value is not None:
                part._buffers[name] = check_same(getattr(source, name), value, f"layer {key}: {path}.{name}")
        for name, parameter in list(part._parameters.items()):
            if parameter is None:
                continue
            full, given = f"{path}.{name}".lstrip("."), getattr(source, name)
            if full in names:
                new = torch.zeros(parameter.shape, dtype=given.dtype, device=given.device)
            elif full in shared and given.shape != parameter.shape:
                new = _widened(given.detach(), parameter, shared[full], f"layer {key}: {full}")
            else:
                new = check_same(given.detach(), parameter, f"layer {key}: {full}")
            part._parameters[name] = nn.Parameter(new, requires_grad=given.requires_grad)
    fill_views(views(block), old, picked, key)


def fill_views(new: Views, old: Views, picked: Tensor, key: str) -> None:
    """Copy channels picked [E, M] of old weights into new ones. Raises InputError where these have no M channels."""
    if new.up.shape[1] != picked.shape[1]:
        what = f"config.json with {picked.shape[1]} channels makes experts of {new.up.shape[1]}"
        raise InputError(f"layer {key}: {what}: it is not known which key holds the width; {INSTEAD}")
    for name, value in vars(new).items():
        source = getattr(old, name)
        if value is None or source is None:
            continue
        axis = {"down": 2, "down_bias": None}.get(name, 1)
        for e, own in enumerate(picked.to(source.device)):
            value[e].copy_(source[e] if axis is None else source[e].index_select(axis - 1, own))


def check_same(given: Tensor, wanted: Tensor, what: str) -> Tensor:
    """`given`. Raises InputError where `wanted`, the same of a model with narrower experts, has another shape."""
    if given.shape != wanted.shape:
        shapes = f"{list(given.shape)}, and with narrower experts the model has it {list(wanted.shape)}"
        raise InputError(f"{what}: shape {shapes}; channels of this model cannot be cut; {INSTEAD}")
    return given


def _widened(given: Tensor, wanted: Tensor, axis: int, what: str) -> Tensor:
    """The weight of a shared expert with zeros in the channels that it has more."""
    shape = list(given.shape)
    more = wanted.shape[axis] - shape[axis]
    if more < 0:
        return check_same(given, wanted, what)
    shape[axis] = more
    return check_same(torch.cat([given, given.new_zeros(shape)], axis), wanted, what)

"""Weights that transformers' conversion stacks, and joins, copied straight into the parameters that they fill.

Most families keep experts one by one and the model all of them in one parameter: gate and up [E, 2I, H], say. The
conversion stacks the gates, stacks the ups, and joins both, each time in memory that is taken for it. Here each weight
goes to its place at once: the same bits, and a third of the time on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekern.layer_keys import natural
from moekern.model.memory import room_for

Way = Callable[[str], tuple[str | None, str | None]]  # key -> the model's name, and the pattern of what converts it


def stacked(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    way: Way,
    mapping: Sequence[Any],
    casts: Mapping[str, torch.dtype],
    device: torch.device,
) -> dict[str, Tensor]:
    """Fill the parameters that are stacked of some of these tensors; the others are returned.

    `mapping` are transformers' converters and renamings, `casts` parts of names whose parameters have another type than
    the model says. What is not all there, or of another shape than the parameter has room for, is among the others.
    """
    sources, found = _sources(mapping), dict[str, dict[str, list[str]]]()  # parameter -> pattern -> keys
    for key in tensors if sources else ():
        if (place := _place(key, way, sources, casts)) is not None:
            target, pattern = place
            found.setdefault(target, {}).setdefault(pattern, []).append(key)
    done: set[str] = set()
    for target, keys in found.items():
        patterns = sources[next(iter(keys))]
        parts = [[tensors[key] for key in sorted(keys.get(pattern, ()), key=natural)] for pattern in patterns]
        if _fill(model, target, parts, device):
            done |= {key for own in keys.values() for key in own}
    return {key: tensor for key, tensor in tensors.items() if key not in done}


def only_stacked(keys: Iterable[str], way: Way, mapping: Sequence[Any], casts: Mapping[str, torch.dtype]) -> bool:
    """Whether `stacked` takes all weights of these names, if they are of one shape."""
    sources = _sources(mapping)
    return all(_place(key, way, sources, casts) is not None for key in keys)


def _place(
    key: str, way: Way, sources: Mapping[str, tuple[str, ...]], casts: Mapping[str, torch.dtype]
) -> tuple[str, str] | None:
    """The parameter that a weight is a part of, and the pattern of the others that it is stacked with."""
    target, pattern = way(key)
    if target is None or pattern not in sources or any(word in target or "*" in word for word in casts):
        return None
    return target, str(pattern)


def _sources(mapping: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """Pattern -> all patterns, in order, of the one converter that it belongs to, which stacks along the first axis and
    joins along the next. None where names depend on what was loaded before."""
    if any(hasattr(each, "_active") for each in mapping):
        return {}
    found: dict[str, tuple[str, ...]] = {}
    known: set[str] = set()
    for each in mapping:
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in getattr(each, "operations", ())]
        several = len(each.source_patterns) > 1
        plain = steps == [("MergeModulelist", 0), *([("Concatenate", 1)] if several else [])]
        for pattern in each.source_patterns if steps else ():
            if plain and pattern not in known and len(each.target_patterns) == 1 and not each.force_cpu:
                found[pattern] = tuple(each.source_patterns)
            else:
                found.pop(pattern, None)
            known.add(pattern)
    return found


def _fill(model: nn.Module, target: str, parts: Sequence[Sequence[Tensor]], device: torch.device) -> bool:
    """Put a parameter of these parts into the model: of each the weights [rows, columns] of all experts. Whether it has
    the shape for that."""
    path, _, name = target.rpartition(".")
    module = model.get_submodule(path)
    held = module._parameters.get(name)
    shapes = [each.shape for part in parts for each in part]
    if held is None or held.ndim != 3 or not shapes or any(len(shape) != 2 for shape in shapes):
        return False
    E, rows, columns = held.shape
    sizes = [part[0].shape[0] if part else 0 for part in parts]
    alike = all(each.shape == (size, columns) for part, size in zip(parts, sizes, strict=True) for each in part)
    if not alike or sum(sizes) != rows or any(len(part) != E for part in parts):
        return False
    made = room_for(held.shape, held.dtype, device)
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        for place, weight in zip(made[:, start : start + size], part, strict=True):
            place.copy_(weight, non_blocking=True)
        start += size
    module._parameters[name] = value = nn.Parameter(made)
    value._is_hf_initialized = True  # type: ignore[attr-defined]
    return True

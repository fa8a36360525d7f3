"""What lists with an entry for each expert must have become, wherever a config holds them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moekern.architectures import Layout
from moekern.architectures.config_keys import COUNT_KEYS, LAYER_KEYS, TOP_K_KEYS, first
from moekern.architectures.patterns import SIDE

Kept = Mapping[str, tuple[int, ...]]


def lists_cut(value: Any, config: Mapping[str, Any], layout: Layout, kept: Kept) -> Any:
    """`value`, a config or a part of one, with entries of dropped experts left out. config: the model's own."""
    layers = first(config, LAYER_KEYS, layout.family.holder)

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if path and (SIDE.search(path[-1]) or path[-1] in (*COUNT_KEYS, *TOP_K_KEYS)):
            return value
        about = [part for part in path if "expert" in part or "moe" in part]
        if isinstance(value, dict):
            if about and about[-1] == path[-1] and set(value) == {str(n) for n in range(len(value))}:
                old = [value[str(n)] for n in range(len(value))]
                new = one_each(old, path)
                if new != old:
                    return dict(zip(map(str, range(len(new))), new, strict=True))
            return {key: walk(item, (*path, key)) for key, item in value.items()}
        if not isinstance(value, list):
            return value
        if not about:
            return [walk(item, path) if isinstance(item, dict) else item for item in value]
        if any(isinstance(row, list) and len(row) == layout.num_experts for row in value):
            keys = [str(n) for n in range(len(value))] if len(value) == layers else list(layout.layers)
            return [row_of(key, row) for key, row in zip(keys, value, strict=False)]
        return one_each(value, path)

    def row_of(key: str, row: Any) -> Any:
        whole = key in layout.layers and isinstance(row, list) and len(row) == layout.layers[key].num_experts
        return [row[e] for e in kept[key]] if whole else row

    def one_each(value: list[Any], path: tuple[str, ...]) -> list[Any]:
        if any(isinstance(item, list) or (isinstance(item, str) and "." in item) for item in value):
            return value
        own = next(_named(path, layout), None)
        if own is not None:
            key, count = own
            return [value[e] for e in kept[key]] if key in kept and len(value) == count else value
        if len(value) != layout.num_experts or len(value) in (layers, len(layout.layers)):
            return value
        most = max((kept[key] for key in layout.layers), key=len)
        return [value[e] for e in most]

    return walk(value, ())


def _named(path: tuple[str, ...], layout: Layout) -> Iterator[tuple[str, int]]:
    for part in path:
        for key, layer in [*layout.layers.items(), *layout.mtp.items()]:
            if part == key or re.match(rf"{re.escape(layer.prefix.rstrip('.'))}(?:\.|$)", part):
                yield key, layer.num_experts

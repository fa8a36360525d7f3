"""Lists of a config with an entry for each expert, or a row for each layer: cut and renumbered with the experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moekern.architectures import Layout, MoeLayer
from moekern.architectures.config_keys import COUNT_KEYS, LAYER_KEYS, TOP_K_KEYS, Path, first
from moekern.architectures.patterns import SIDE
from moekern.errors import InputError
from moekern.plan.document import some_of

ABOUT_EXPERTS = re.compile(r"expert|moe")
PER_LAYER = (*COUNT_KEYS, *TOP_K_KEYS)  # lists under these are a number for each layer
# Keys beside COUNT_KEYS that may count all experts, and numbers about experts that are no experts' numbers.
A_COUNT = re.compile(r"expert(?:s|_count|_num|s_list|s_per_layer)?$")
NO_COUNT = re.compile(r"shared|activ|select|chosen|used|top|zero|redundant|parallel|per_(?!layer)")
NO_NUMBERS = re.compile(r"num|size|top|per_|freq|dim|interval|every|layer|capacity")


@dataclass(frozen=True)
class ExpertLists:
    """What is known of a model when lists of its settings in `source` are cut."""

    source: str
    layout: Layout
    kept: Mapping[str, Sequence[int]]
    num_layers: int | None
    lists: dict[str, None] = field(default_factory=dict)  # keys of what was cut
    numbers: dict[str, None] = field(default_factory=dict)  # keys of what may count experts or name them by number

    def notes(self, name: str) -> Iterator[str]:
        """What was done in the file `name`, and what stays though it may be about the original's experts."""
        if self.lists:
            yield f"{name}: cut to an entry for each expert that stays: {some_of(self.lists)}"
        if self.numbers:
            what = "may count or number the original's experts; left as it is"
            yield f"{name}: {what}: {some_of(self.numbers)}"

    def cut(self, value: Any, path: Path = ()) -> Any:
        """`value` with every such list cut: those under a key that speaks of experts, as long as there are experts.

        Raises InputError, naming the key, where layers keep different experts and the list does not tell them apart,
        and where its entries may as well be layers.
        """
        if path and (SIDE.search(path[-1]) or path[-1] in PER_LAYER):
            return value
        new = self._cut(value, path)
        if not isinstance(value, dict):
            self._note(value, new, path)
        return new

    def _cut(self, value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            numbered = [str(n) for n in range(len(value))]
            if value and sorted(value) == sorted(numbered) and ABOUT_EXPERTS.search(path[-1] if path else ""):
                entries = [value[n] for n in numbered]
                kept = self._entries(entries, path)
                if kept is not entries:
                    self._note(entries, kept, path)
                    return {str(n): item for n, item in enumerate(kept)}
            elif value and all(key.isdecimal() and not isinstance(value[key], list) for key in value):
                self.numbers.update({".".join(path): None} if path and "expert" in path[-1] else {})
            return {key: self.cut(item, (*path, key)) for key, item in value.items()}
        if not isinstance(value, list):
            return value
        if not any(ABOUT_EXPERTS.search(part) for part in path):
            return [self.cut(item, path) if isinstance(item, dict) else item for item in value]
        if any(isinstance(row, list) and len(row) == self.layout.num_experts for row in value):
            return self._rows(value, path)
        return self._entries(value, path)

    def _note(self, old: Any, new: Any, path: Path) -> None:
        """Remember the key of what was cut, and of what may count experts or be their numbers."""
        name, experts = ".".join(path), self.layout.num_experts
        if new != old and not any(isinstance(item, dict) for item in old):
            self.lists[name] = None
        if not any("expert" in part for part in path):
            return
        key = next((part for part in reversed(path) if "expert" in part and "." not in part), "")
        found = [item for row in _items(old) for item in _items(row)]
        if not found or any(type(item) is not int or not 0 <= item <= experts for item in found):
            return
        if A_COUNT.search(key) and not NO_COUNT.search(key) and set(found) == {experts}:
            self.numbers[name] = None
        elif isinstance(old, list) and not NO_NUMBERS.search(key) and experts not in found:
            distinct = len(set(found[:experts])) == len(found[:experts])
            if distinct and (new == old or len(found) >= experts):
                self.numbers[name] = None

    def _entries(self, value: list[Any], path: Path) -> list[Any]:
        """An entry for each expert: of the layer that the path names, or of all."""
        if any(isinstance(item, list) or (isinstance(item, str) and "." in item) for item in value):
            return value
        layer = self._named(path)
        if layer is not None:
            same_length = len(value) == layer.num_experts
            return _picked(value, self.kept[layer.key]) if same_length and layer.key in self.kept else value
        if len(value) != self.layout.num_experts:
            return value
        if len(value) in (self.num_layers, len(self.layout.layers)):
            if "layer" in path[-1] or all(item == value[0] for item in value):
                return value
            raise self._refusal(path, "there are as many experts as layers, and nothing tells which its entries are")
        kept = {tuple(self.kept[key]) for key in self.layout.layers}
        if len(kept) == 1:
            return _picked(value, kept.pop())
        if all(item == value[0] for item in value):
            return value[: max(map(len, kept))]
        raise self._refusal(path, "an entry for each expert, of which layers keep different ones")

    def _rows(self, value: list[Any], path: Path) -> list[Any]:
        """A row for each layer, or for each layer with experts, of an entry for each expert."""
        if len(value) == self.num_layers:
            keys = [str(n) for n in range(len(value))]
        elif len(value) == len(self.layout.layers):
            keys = list(self.layout.layers)
        else:
            raise self._refusal(path, f"{len(value)} rows of an entry for each expert, which are no layers")
        return [
            _picked(row, self.kept[key])
            if key in self.layout.layers and isinstance(row, list) and len(row) == self.layout.layers[key].num_experts
            else row
            for key, row in zip(keys, value, strict=True)
        ]

    def _named(self, path: Path) -> MoeLayer | None:
        """The layer that a key on the way is the number of, or a module of."""
        layers = {**self.layout.layers, **self.layout.mtp}
        for part in path:
            for key, layer in layers.items():
                if part == key or f"{part}.".startswith(f"{layer.prefix.rstrip('.')}."):
                    return layer
        return None

    def _refusal(self, path: Path, what: str) -> InputError:
        return InputError(f"{self.source}: {'.'.join(path)}: {what}; remove the key, or give it a row for each layer")


def expert_lists(
    source: str, config: Mapping[str, Any], layout: Layout, kept: Mapping[str, Sequence[int]]
) -> ExpertLists:
    """config: the model's config.json, whichever file `source` is."""
    return ExpertLists(source, layout, kept, first(config, LAYER_KEYS, layout.family.holder))


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _picked(entries: Sequence[Any], keep: Sequence[int]) -> list[Any]:
    return [entries[expert] for expert in sorted(keep)]

"""config.json of the pruned model: expert counts, MTP layer counts and lists that name experts by number."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from moekern.architectures import Layout
from moekern.architectures.quantisation import QUANTIZATION_KEYS
from moekern.architectures.widths import narrow_numbers
from moekern.pruning.expert_names import Renamer

# Quantisers also leave their settings in files of their own; these may name experts too.
QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json", "quantization_config.json")


def pruned_config(
    config: Mapping[str, Any],
    layout: Layout,
    kept: Mapping[str, Sequence[int]],
    names: Renamer,
    *,
    drop_mtp: bool,
    width: int | None = None,
) -> dict[str, Any]:
    """A patched copy; key order stays, and so does every value that no expert count and no expert number is part of.

    Every path of layout.count_paths gets the kept count, the largest where layers differ. In a list, entry i gets that
    of layer i (layers with one expert are dense and stay). With drop_mtp the next-n counts become 0.
    With `width`, the channels that experts have left, it stands at layout.width_paths, and shared experts whose width
    follows are counted anew. num_experts_per_tok stays. Raises InputError for names of experts that cannot be written
    anew.
    """
    counts = {key: len(keep) for key, keep in kept.items() if key in layout.layers}
    most = max(counts.values())

    def shrunk(old: Any) -> Any:
        if not isinstance(old, list):
            return most
        return [counts.get(str(i), most) if n > 1 else n for i, n in enumerate(old)]

    out = deepcopy(dict(config))
    for path in layout.count_paths:
        _set(out, path, shrunk)
    for path in layout.mtp_paths if drop_mtp else ():
        _set(out, path, lambda old: 0)
    for path, number in narrow_numbers(layout, width).items() if width is not None else ():
        _set(out, path, partial(_alike, number))
    return dict(renamed(out, names, inside=False))


def with_numbers(config: Mapping[str, Any], numbers: Mapping[tuple[str, ...], int]) -> dict[str, Any]:
    """A copy with other numbers at these paths, or lists of them. Raises KeyError, dotted, where no number stands."""
    out = deepcopy(dict(config))
    for path, number in numbers.items():
        old: Any = out
        for key in path:
            old = old.get(key) if isinstance(old, dict) else None
        if not all(type(each) is int for each in (old if isinstance(old, list) else [old])):
            raise KeyError(".".join(path))
        _set(out, path, partial(_alike, number))
    return out


def renamed(value: Any, names: Renamer, *, inside: bool) -> Any:
    """`value` with its strings and its keys replaced by those that mean the same modules: in lists and keys by none for
    names in dropped experts, and by several for what has to be spelt out. inside: of a quantiser's settings, where any
    string may name modules; elsewhere those do that speak of experts. Raises InputError."""

    def is_name(text: str) -> bool:
        return inside or "expert" in text

    if isinstance(value, dict):
        return {
            new: renamed(item, names, inside=inside or key in QUANTIZATION_KEYS)
            for key, item in value.items()
            for new in (names(key) if is_name(key) else (key,))
        }
    if isinstance(value, list):
        found: list[Any] = []
        for item in value:
            found += names(item) if isinstance(item, str) and is_name(item) else [renamed(item, names, inside=inside)]
        return found
    return names.only(value) if isinstance(value, str) and is_name(value) else value


def dumped_like(content: Any, original: str) -> str:
    """JSON with the indentation, separators, escapes and final newline of `original`; `original` itself if equal."""
    if json.dumps(content) == json.dumps(json.loads(original)):
        return original
    indent = re.search(r"^[\[{]\r?\n([ \t]+)", original.lstrip())
    separators = (",", ":") if '": ' not in original else None
    text = json.dumps(
        content,
        indent=indent[1] if indent else None,
        ensure_ascii=original.isascii(),
        separators=separators,
    )
    return text + original[len(original.rstrip()) :]


def _alike(number: int, old: Any) -> Any:
    """`number` in the place of one, or of each of several that were the same."""
    return [number] * len(old) if isinstance(old, list) else number


def _set(config: dict[str, Any], path: tuple[str, ...], change: Callable[[Any], Any]) -> None:
    holder: Any = config
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = change(holder[path[-1]])

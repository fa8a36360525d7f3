"""config.json of the pruned model: expert counts, MTP layer counts and lists that name experts by number."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from moekern.architectures import Layout, MoeLayer

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
# Quantisers also leave their settings in files of their own; these may name experts too.
QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json")

WRAPPERS = ("model", "language_model", "text_model")

Rename = Callable[[str], str | None]


def pruned_config(
    config: Mapping[str, Any], layout: Layout, kept: Mapping[str, Sequence[int]], *, drop_mtp: bool
) -> dict[str, Any]:
    """A patched copy; key order stays, and so does every value that no expert count and no expert number is part of.

    Every path of layout.count_paths gets the kept count, the largest where layers differ. In a list, entry i gets that
    of layer i (layers with one expert are dense and stay). With drop_mtp the next-n counts become 0.
    num_experts_per_tok stays.
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
    rename = expert_renamer(layout, kept, drop_mtp=drop_mtp)
    for holder in (out, *(value for value in out.values() if isinstance(value, dict))):
        for key in QUANTIZATION_KEYS:
            if isinstance(holder.get(key), dict):
                holder[key] = renamed_lists(holder[key], rename)
    return out


def expert_renamer(layout: Layout, kept: Mapping[str, Sequence[int]], *, drop_mtp: bool) -> Rename:
    """A function from a module name to its new name, or None when it lies in a dropped expert.

    Wrapper names ("model.", "language_model.") may differ from the tensor keys', as those of loaded models do.
    """
    ranks: dict[str, dict[int, int]] = {}
    for key, layer in {**layout.layers, **layout.mtp}.items():
        if key in kept or (drop_mtp and key in layout.mtp):
            stays = [*sorted(kept.get(key, ())), *_past_the_routed(layer)]
            rank = {old: new for new, old in enumerate(stays)}
            ranks.update((_bare(t.template.partition("{}")[0]), rank) for t in layer.tensors if t.action == "drop")

    def rename(name: str) -> str | None:
        for number in re.finditer(r"(?<![^._])\d+(?=\.|$)", name):
            rank = ranks.get(_bare(name[: number.start()]))
            if rank is not None:
                new = rank.get(int(number[0]))
                return None if new is None else f"{name[: number.start()]}{new}{name[number.end() :]}"
        return name

    return rename


def renamed_lists(value: Any, rename: Rename) -> Any:
    """`value` with every string in a list and every key of a dict renamed, those of dropped experts left out.

    Regular expressions and wildcards name no expert by its plain number and pass through.
    """
    if isinstance(value, dict):
        names = {key: rename(key) for key in value}
        return {names[key]: renamed_lists(item, rename) for key, item in value.items() if names[key] is not None}
    if isinstance(value, list):
        items = [rename(item) if isinstance(item, str) else renamed_lists(item, rename) for item in value]
        return [new for new, old in zip(items, value, strict=True) if new is not None or old is None]
    return value


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


def _past_the_routed(layer: MoeLayer) -> list[int]:
    """Numbers of experts that are never routed by weight (LongCat's zero experts) and so never dropped."""
    return sorted({t.expert for t in layer.tensors if t.expert is not None and t.expert >= layer.num_experts})


def _bare(stem: str) -> str:
    return ".".join(part for part in stem.split(".") if part not in WRAPPERS)


def _set(config: dict[str, Any], path: tuple[str, ...], change: Callable[[Any], Any]) -> None:
    holder: Any = config
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = change(holder[path[-1]])

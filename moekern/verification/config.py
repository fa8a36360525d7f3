"""config.json of a pruned checkpoint against its source's: what must have changed, and that nothing else did."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moekern.architectures import ExpertTensor, Layout

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
WRAPPERS = ("model", "language_model", "text_model")


def config_problems(
    before: Mapping[str, Any],
    path: Path,
    layout: Layout,
    kept: Mapping[str, tuple[int, ...]],
    rename: Mapping[str, str | None],
    *,
    drop_mtp: bool,
) -> Iterator[str]:
    """One line for each value of the config at `path` that is not what the plan makes of `before`."""
    try:
        after = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        yield f"{path.name}: {error}"
        return
    count = max(len(kept[key]) for key in layout.layers)
    counts, mtp = set(layout.count_paths), set(layout.mtp_paths) if drop_mtp else set()
    want, got = dict(_leaves(before, ())), dict(_leaves(after, ()))
    if list(want) != list(got):
        changed = sorted(".".join(key) for key in want.keys() ^ got.keys())
        yield f"{path.name}: keys differ from the source's: {', '.join(changed) or 'their order'}"
    for key in want.keys() & got.keys():
        value = want[key]
        if key in counts:
            value = [_in_layer(kept, i, n, count) for i, n in enumerate(value)] if isinstance(value, list) else count
        elif key in mtp:
            value = 0
        elif any(part in QUANTIZATION_KEYS for part in key[:2]):
            value = renamed_modules(value, rename)
        if json.dumps(got[key]) != json.dumps(value):
            yield f"{path.name}: {'.'.join(key)} is {_short(got[key])}, expected {_short(value)}"


def _in_layer(kept: Mapping[str, tuple[int, ...]], layer: int, before: int, count: int) -> int:
    """The count that a list of counts must hold for a layer: 1 is a dense layer."""
    return before if before <= 1 else len(kept[str(layer)]) if str(layer) in kept else count


def renumbered(tensor: ExpertTensor, keep: tuple[int, ...], num_experts: int) -> int | None:
    """New number of an expert: its rank among the kept; past the last routed expert the distance to the end stays."""
    if tensor.expert in keep:
        return keep.index(tensor.expert)
    past = (tensor.expert or 0) - num_experts
    return len(keep) + past if past >= 0 else None


def module_names(layout: Layout, kept: Mapping[str, tuple[int, ...]], *, drop_mtp: bool) -> dict[str, str | None]:
    """Every module at or below a numbered expert -> its name in the pruned model, None when the expert is dropped.

    Each is there by its key and without the wrappers' names ("model.", "language_model.").
    """
    names: dict[str, str | None] = {}
    for key, layer in [*layout.layers.items(), *layout.mtp.items()]:
        if key not in kept and not (drop_mtp and key in layout.mtp):
            continue
        keep = kept.get(key, ())
        for tensor in layer.tensors:
            if tensor.action != "drop":
                continue
            stem, _, rest = tensor.template.partition("{}")
            new = renumbered(tensor, keep, layer.num_experts)
            tails = rest.split(".")
            for end in range(1, len(tails) + 1):
                tail = ".".join(tails[:end])
                for start in (stem, _unwrapped(stem)):
                    names[f"{start}{tensor.expert}{tail}"] = None if new is None else f"{start}{new}{tail}"
    return names


def renamed_modules(value: Any, names: Mapping[str, str | None]) -> Any:
    """Lists and dict keys with module names replaced, and those of dropped experts left out."""
    if isinstance(value, dict):
        pairs = [(_renamed(key, names), renamed_modules(item, names)) for key, item in value.items()]
        return {key: item for key, item in pairs if key is not None}
    if isinstance(value, list):
        new = [_renamed(item, names) if isinstance(item, str) else renamed_modules(item, names) for item in value]
        return [item for item, old in zip(new, value, strict=True) if item is not None or old is None]
    return value


def _renamed(name: str, names: Mapping[str, str | None]) -> str | None:
    if name in names:
        return names[name]
    bare = _unwrapped(name)
    if bare not in names:
        return name
    new = names[bare]
    return None if new is None else name.removesuffix(bare) + new


def _unwrapped(name: str) -> str:
    """The name from after its leading wrappers on."""
    while (head := name.split(".", 1)[0]) in WRAPPERS and head != name:
        name = name.split(".", 1)[1]
    return name


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything below dicts; the inside of quantisation settings counts as one value."""
    if isinstance(value, dict) and value and not (path and path[-1] in QUANTIZATION_KEYS):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

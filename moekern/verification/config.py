"""config.json of a pruned checkpoint against its source's: what must have changed, and that nothing else did."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moekern.architectures import Layout
from moekern.architectures.quantisation import QUANTIZATION_KEYS
from moekern.checkpoint.strict_json import read_json
from moekern.errors import InputError
from moekern.plan.document import some_of
from moekern.verification.expert_lists import lists_cut
from moekern.verification.record import without_folder
from moekern.verification.settings import Modules, names_experts, renamed_settings, same_settings


def config_problems(
    before: Mapping[str, Any],
    path: Path,
    layout: Layout,
    kept: Mapping[str, tuple[int, ...]],
    modules: Modules,
    *,
    drop_mtp: bool,
    width: int | None = None,
    trained: Mapping[tuple[str, ...], int] = {},
) -> Iterator[str]:
    """One line for each value of the config at `path` that is not what the plan makes of `before`, and training then:
    `trained` numbers by path."""
    try:
        after = read_json(path)
    except InputError as error:
        yield without_folder(path.parent, error)
        return
    count = max(len(kept[key]) for key in layout.layers)
    counts, mtp = set(layout.count_paths), set(layout.mtp_paths) if drop_mtp else set()
    numbers = {**trained, **({} if width is None else dict.fromkeys(layout.width_paths, width))}
    if width is not None and layout.shared_times and layout.width:  # as wide as it was, or the next that it can be
        numbers |= dict.fromkeys(layout.shared_paths, math.ceil(layout.shared_times * layout.width / width))
    want = dict(_leaves(lists_cut(before, before, layout, kept), modules))
    got = dict(_leaves(after, modules))
    if list(want) != list(got):
        changed = sorted(".".join(key) for key in want.keys() ^ got.keys())
        yield f"{path.name}: keys differ from the source's: {some_of(changed) or 'their order'}"
    for key in want.keys() & got.keys():
        value = want[key]
        if key in counts:
            value = [_in_layer(kept, i, n, count) for i, n in enumerate(value)] if isinstance(value, list) else count
        elif key in mtp:
            value = 0
        elif key in numbers:
            value = [numbers[key]] * len(value) if isinstance(value, list) else numbers[key]
        elif key[-1] in QUANTIZATION_KEYS or _names_experts(value, modules):
            if not same_settings(value, got[key], modules):
                want_text = _short(renamed_settings(value, modules))
                yield f"{path.name}: {'.'.join(key)} is {_short(got[key])}, expected what means {want_text}"
            continue
        if json.dumps(got[key]) != json.dumps(value):
            yield f"{path.name}: {'.'.join(key)} is {_short(got[key])}, expected {_short(value)}"


def _in_layer(kept: Mapping[str, tuple[int, ...]], layer: int, before: int, count: int) -> int:
    """The count that a list of counts must hold for a layer: 1 is a dense layer."""
    return before if before <= 1 else len(kept[str(layer)]) if str(layer) in kept else count


def _leaves(value: Any, modules: Modules, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything below dicts; settings of quantisers, and dicts whose keys name experts, count as one
    value."""
    whole = path[-1:] and (path[-1] in QUANTIZATION_KEYS or _names_experts(value, modules))
    if isinstance(value, dict) and value and not whole:
        for key, item in value.items():
            yield from _leaves(item, modules, (*path, key))
    else:
        yield path, value


def _names_experts(value: Any, modules: Modules) -> bool:
    """Whether a string, or one in a list or among a dict's keys, speaks of experts and may name them."""
    if isinstance(value, str):
        return "expert" in value and names_experts(value, modules)
    return isinstance(value, (list, dict)) and any(_names_experts(item, modules) for item in value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

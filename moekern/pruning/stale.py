"""What a file that is copied as it is still says about the original's experts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moekern.architectures import Layout
from moekern.architectures.config_keys import COUNT_KEYS
from moekern.architectures.widths import narrow_numbers
from moekern.checkpoint.strict_json import check_depth, read_start, regular_size
from moekern.errors import InputError
from moekern.pruning.expert_lists import expert_lists
from moekern.pruning.expert_names import NUMBERED

SETTINGS_CAP = 1 << 20  # bytes of a file that is looked into; tokenizers are larger
SETTINGS = (".json", ".jsonl", ".yaml", ".yml", ".toml", ".csv")
COUNTS = (*COUNT_KEYS, "n_experts", "num_moe_experts", "num_routed_experts")
WIDTHS = (
    "moe_intermediate_size", "moe_inter_dim", "moe_ffn_hidden_size", "expert_ffn_hidden_size",
    "expert_intermediate_size",
)  # fmt: skip


def stale(
    path: Path,
    name: str,
    config: Mapping[str, Any],
    layout: Layout,
    kept: Mapping[str, Sequence[int]],
    width: int | None = None,
) -> Iterator[str]:
    """A line where a file of settings counts the original's experts, says how wide they are, though they have `width`
    channels left (None: all), or names them by number. Code is not looked at."""
    size = regular_size(path)
    if not name.lower().endswith(SETTINGS) or size > SETTINGS_CAP:
        return
    text = read_start(path, size)[0].decode(errors="replace")
    if _says(text, COUNTS, layout.num_experts):
        yield f"{name}: copied as it is, though it counts the original's {layout.num_experts} experts"
    for what, keys, old in _widths(layout, width):
        if key := _says(text, keys, old):
            yield f"{name}: copied as it is, though it says that the original's {what} ({key}: {old})"
    if NUMBERED.search(text) or _lists_experts(path, text, config, layout, kept):
        yield f"{name}: copied as it is, though it names the original's experts by number"


def _says(text: str, keys: Iterable[str], number: int) -> str | None:
    """The first of these keys that holds the number in a file of settings, of whatever format."""
    found = re.search(rf"\b({'|'.join(keys)})[\"']?\s*[:=][\[\"'\s]*{number}\b(?!\.)", text)
    return None if found is None else found[1]


def _widths(layout: Layout, width: int | None) -> Iterator[tuple[str, list[str], int]]:
    """What is no longer so of experts that have `width` channels left: in words, its keys, and the number."""
    if width is None or layout.width in (None, width):
        return
    assert layout.width is not None
    of_experts = dict.fromkeys((*(path[-1] for path in layout.width_paths), *WIDTHS))
    yield f"experts have {layout.width} channels", list(of_experts), layout.width
    times, new = layout.shared_times, narrow_numbers(layout, width)
    shared = list(dict.fromkeys(path[-1] for path in layout.shared_paths if new.get(path, times) != times))
    if shared:
        yield f"shared experts are {times} times as wide", shared, times


def _lists_experts(
    path: Path, text: str, config: Mapping[str, Any], layout: Layout, kept: Mapping[str, Sequence[int]]
) -> bool:
    """Whether it is JSON with an entry for each expert, or with expert numbers; the file's name is its first key."""
    lists = expert_lists(str(path), config, layout, kept)
    try:
        content = json.loads(text)
        check_depth(content, str(path))
    except (ValueError, RecursionError, InputError):
        return False
    try:
        lists.cut(content, (path.stem,))
    except InputError:  # lists that nobody could cut
        return True
    return bool(lists.lists)

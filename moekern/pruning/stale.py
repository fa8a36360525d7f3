"""What a file that is copied as it is still says about the original's experts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moekern.architectures import Layout
from moekern.architectures.config_keys import COUNT_KEYS
from moekern.checkpoint.strict_json import check_depth, read_start, regular_size
from moekern.errors import InputError
from moekern.pruning.expert_lists import expert_lists
from moekern.pruning.expert_names import NUMBERED

SETTINGS_CAP = 1 << 20  # bytes of a file that is looked into; tokenizers are larger
SETTINGS = (".json", ".jsonl", ".yaml", ".yml", ".toml", ".csv")
COUNTS = "|".join((*COUNT_KEYS, "n_experts", "num_moe_experts", "num_routed_experts"))


def stale(
    path: Path, name: str, config: Mapping[str, Any], layout: Layout, kept: Mapping[str, Sequence[int]]
) -> Iterator[str]:
    """A line where a file of settings counts the original's experts, or names them by number. Code is not looked at."""
    size = regular_size(path)
    if not name.lower().endswith(SETTINGS) or size > SETTINGS_CAP:
        return
    text = read_start(path, size)[0].decode(errors="replace")
    if re.search(rf"\b(?:{COUNTS})[\"']?\s*[:=][\[\"'\s]*{layout.num_experts}\b(?!\.)", text):
        yield f"{name}: copied as it is, though it counts the original's {layout.num_experts} experts"
    if NUMBERED.search(text) or _lists_experts(path, text, config, layout, kept):
        yield f"{name}: copied as it is, though it names the original's experts by number"


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

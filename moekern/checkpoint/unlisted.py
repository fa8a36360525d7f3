"""Safetensors files of a folder that its index does not name: an MTP layer in a file of its own, or no shard at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from moekern.checkpoint.contents import ADAPTER_WEIGHTS, AN_ADAPTER
from moekern.checkpoint.header import Shard
from moekern.checkpoint.pointers import A_POINTER, is_pointer
from moekern.checkpoint.strict_json import shown
from moekern.errors import InputError

LAYER = re.compile(r"(.*?(?:^|\.)(?:layers|blocks|h))\.(\d{1,6})\.")
MTP = re.compile(r"(?:^|\.)mtp\w*\.")
MTP_COUNT = re.compile(r"nextn|(?:^|_)mtp(?:_|$)")
LAYER_COUNT = re.compile(r"^(?:num_hidden_layers|n_layers|num_layers|n_layer)$")
SECOND_COPY = "a second copy of the weights"
NOT_LISTED = "weights that the index does not name"
NOT_READABLE = "not named by the index, and not readable"


def unlisted_shards(
    folder: Path,
    config: Mapping[str, Any],
    names: Collection[str],
    listed: Mapping[str, Any],
    read: Callable[[Path], Shard],
) -> tuple[list[Shard], dict[str, str]]:
    """The files that belong to the model all the same, and the others with the reason why not.

    Loaders read the files that the index names. One more is taken where config.json counts MTP layers, the index lists
    none, and the file holds nothing but tensors of such layers. names: of the shards; listed: the tensors they hold;
    read: reads the header of a file. Raises InputError for a file that holds MTP layers among other tensors.
    """
    shards: list[Shard] = []
    strays: dict[str, str] = {}
    last: dict[str, int] | None = None  # of the stacks that an MTP layer can follow
    for path in sorted(path for path in folder.glob("*.safetensors") if path.name not in names):
        if reason := why_unread(path.name):
            strays[path.name] = reason
            continue
        try:
            shard = read(path)
        except InputError:
            strays[path.name] = A_POINTER if is_pointer(path) else NOT_READABLE
            continue
        if last is None:
            last = last_layers(listed, set(integers(config, LAYER_COUNT)))
        new = [entry.name for entry in shard.tensors if entry.name not in listed]
        mtp = [name for name in new if is_mtp(name, last)]
        if not new:
            strays[path.name] = SECOND_COPY
        elif not mtp or max(integers(config, MTP_COUNT), default=0) < 1 or any(map(MTP.search, listed)):
            strays[path.name] = NOT_LISTED
        elif len(mtp) < len(shard.tensors):
            other = next(entry.name for entry in shard.tensors if entry.name not in set(mtp))
            raise InputError(
                f"{path}: no index names it, yet it holds MTP tensors ({shown(mtp[0])}) beside others "
                f"({shown(other)}); name what belongs to the model in weight_map of the index, or take the file away"
            )
        elif twice := next((name for other in shards for name in mtp if name in {e.name for e in other.tensors}), None):
            raise InputError(f"{path}: tensor {shown(twice)} is in another file that no index names too; remove one")
        else:
            shards.append(shard)
    return shards, strays


def why_unread(name: str) -> str | None:
    """What a file is by its name alone."""
    if name.lower().startswith(ADAPTER_WEIGHTS):
        return AN_ADAPTER
    if name.lower().startswith("consolidated"):
        return SECOND_COPY
    return None if name.isprintable() else NOT_LISTED


def last_layers(names: Collection[str], counts: Collection[int]) -> dict[str, int]:
    """Stack of layers -> the highest number in it, of the stacks that are as long as one of `counts`."""
    last: dict[str, int] = {}
    for found in filter(None, map(LAYER.match, names)):
        last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    return {stack: number for stack, number in last.items() if number + 1 in counts}


def is_mtp(name: str, last: Mapping[str, int]) -> bool:
    """By its name a part of an MTP block, or of a layer that follows the last one of its stack."""
    found = LAYER.match(name)
    return MTP.search(name) is not None or (found is not None and int(found[2]) > last.get(found[1], 1 << 30))


def integers(config: Any, key: re.Pattern[str]) -> Iterator[int]:
    """Every integer under a key that matches, at any depth of the config."""
    pairs = config.items() if isinstance(config, dict) else (("", item) for item in config)
    for name, value in pairs:
        if isinstance(value, (dict, list)):
            yield from integers(value, key)
        elif type(value) is int and key.search(name):
            yield value

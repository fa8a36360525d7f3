"""Where config.json keeps the numbers that go with experts."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moekern.architectures.patterns import SIDE
from moekern.checkpoint.strict_json import shown
from moekern.errors import InputError

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_num_primary_experts")
TOP_K_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts", "moe_num_active_primary_experts",
)  # fmt: skip
LAYER_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
MTP_COUNT = re.compile(r"(?:nextn|mtp)\w*(?:layers|modules)$")
GROUP_KEYS = ("n_group", "num_expert_group")
SIZE_CAP = 1 << 24  # Llama 4 has positions up to 10 * 2^20
REPEAT_CAP = 10_000
REPEATED = re.compile(r"layers$|depth$|labels$|modules$|blocks$|iters?$|steps$|(chunk|block)_size$")
FREE = re.compile(r"theta|base|scal|factor|seed|hash|params|parameters|limit|min$|max$|mask")  # numbers, but no sizes
SECTIONS = ("text_config", "quantization_config", "compression_config")
TOPK_GROUP = "topk_group"
OPAQUE = ("quantization_config", "compression_config", "generation_config")

Path = tuple[str, ...]


def sections(config: Mapping[str, Any], holder: str = "") -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The sections of the text model: the holder first, then the root, then the others, outer before inner."""
    found: list[tuple[Path, Mapping[str, Any]]] = []
    queue: list[tuple[Path, Mapping[str, Any]]] = [((), config)]
    for path, section in queue:
        found.append((path, section))
        for key, value in section.items():
            if isinstance(value, dict) and key not in OPAQUE and not SIDE.search(key) and len(path) < 4:
                queue.append(((*path, key), value))
    wanted = tuple(holder.split(".")) if holder else ()
    found.sort(key=lambda item: item[0] != wanted)
    yield from found


def values(config: Mapping[str, Any], keys: tuple[str, ...], holder: str = "") -> Iterator[tuple[Path, int]]:
    """Path and value of every integer under one of the keys; a list of equal integers counts as its element."""
    for path, section in sections(config, holder):
        for key in keys:
            value = section.get(key)
            if isinstance(value, list) and value and all(item == value[0] for item in value):
                value = value[0]
            if type(value) is int:
                yield (*path, key), value


def mtp_counts(config: Mapping[str, Any]) -> Iterator[tuple[Path, int]]:
    """Path and value of every number above 0 that counts MTP layers by its name, under MTP_KEYS or another key."""
    for path, section in sections(config):
        for key, value in section.items():
            if type(value) is int and value > 0 and MTP_COUNT.search(key):
                yield (*path, key), value


def first(config: Mapping[str, Any], keys: tuple[str, ...], holder: str) -> int | None:
    return next((value for _, value in values(config, keys, holder)), None)


def check_numbers(config: Mapping[str, Any], source: str, keys: Collection[str]) -> None:
    """Raise InputError, naming the key, where one of `keys` is there but holds neither counts nor null: what `values`
    would pass over as if nobody had said anything."""
    for path, section in sections(config):
        for key in keys & section.keys():
            value = section[key]
            for item in value if isinstance(value, list) else [value]:
                if item is not None and (type(item) is not int or item < 0):
                    raise InputError(f"{source}: {'.'.join((*path, key))} is {shown(value)}, expected a whole number")


def check_sections(config: Mapping[str, Any], source: str) -> None:
    """Raise InputError, naming the key, where a section is none, or says of blocks of scales what cannot be."""
    for path, section in sections(config):
        for key in SECTIONS:
            held = section.get(key)
            if not isinstance(held, (dict, type(None))):
                raise InputError(f"{source}: {'.'.join((*path, key))} is {shown(held)}, expected an object")
            block = (held or {}).get("weight_block_size")
            sizes = block if isinstance(block, list) and len(block) == 2 else [0]
            if block is not None and any(type(n) is not int or n < 1 for n in sizes):
                where = ".".join((*path, key, "weight_block_size"))
                raise InputError(f"{source}: {where} is {shown(block)}, expected two numbers above 0")


def check_sizes(config: Mapping[str, Any], source: str) -> None:
    """Raise InputError for a size that no model has, before transformers makes room for it or counts up to it: anything
    beyond SIZE_CAP, and beyond REPEAT_CAP for what is built or done so many times, or takes memory by its square."""
    queue: list[tuple[Path, Any]] = [((), config)]
    for path, value in queue:
        if isinstance(value, dict):
            queue += (((*path, key), item) for key, item in value.items())
        elif isinstance(value, list):
            queue += ((path, item) for item in value)
        elif isinstance(value, (int, float)) and not FREE.search(path[-1]):
            cap = REPEAT_CAP if REPEATED.search(path[-1]) else SIZE_CAP
            if cap < abs(value) < math.inf:
                raise InputError(f"{source}: {'.'.join(path)} is {shown(value)}, and no model has more than {cap}")


def model_types(config: Mapping[str, Any]) -> list[str]:
    """Names of the model, the root's first."""
    names = [section.get("model_type") for _, section in sections(config)]
    return [name for name in names if isinstance(name, str)]


def own_code(config: Mapping[str, Any]) -> bool:
    """Whether code that lies beside the weights says what the model computes."""
    classes = config.get("auto_map")
    return isinstance(classes, dict) and any(str(name).startswith("AutoModel") for name in classes)


def check_counts(
    config: Mapping[str, Any], source: str, num_experts: int, in_layers: Collection[int] = ()
) -> tuple[Path, ...]:
    """Paths of every key that holds the expert count. Raises InputError if there is none or one disagrees, and where a
    list of blocks gives each block a count of its own, as Nemotron-H Puzzle's block_configs does.

    in_layers: the counts of all layers, any of which may stand in a list; a number must be num_experts, the largest.
    """
    paths = []
    for path, section in sections(config):
        for key, value in section.items():
            blocks = value if isinstance(value, list) and not SIDE.search(key) else ()
            if any(isinstance(block, dict) and block.keys() & set(COUNT_KEYS) for block in blocks):
                where = ".".join((*path, key))
                raise InputError(f"{source}: {where} counts the experts of each block; such models cannot be pruned")
        for key in COUNT_KEYS:
            value = section.get(key)
            if value is None:
                continue
            listed = isinstance(value, list) and bool(value)
            items, known = (value, {num_experts, *in_layers}) if listed else ([value], {num_experts})
            if any(type(item) is not int or item not in known for item in items):
                where = ".".join((*path, key))
                raise InputError(f"{source}: {where} is {value!r:.80}, but the tensors hold {num_experts} experts")
            paths.append((*path, key))
    if not paths:
        raise InputError(f"{source}: no key gives the number of experts; add {COUNT_KEYS[0]}: {num_experts}")
    return tuple(paths)

"""The files of a pruned checkpoint that hold no weights, and the words on what was done."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.architectures import Layout
from moekern.architectures.config_keys import COUNT_KEYS
from moekern.checkpoint.folder import CONFIG, INDEX, PLAN_FILE, Checkpoint
from moekern.checkpoint.strict_json import read_json, read_start, regular_size
from moekern.errors import InputError
from moekern.plan.document import Mtp, Plan
from moekern.pruning.config import QUANTIZATION_FILES, dumped_like, pruned_config, renamed_lists
from moekern.pruning.expert_lists import expert_lists
from moekern.pruning.expert_names import Renamer
from moekern.pruning.model_card import MODEL_CARD, notice, split_at
from moekern.pruning.pieces import Range, made_from
from moekern.pruning.shards import OutputShard

MANIFEST = "moekern_manifest.jsonl"  # a line for each shard: its size, and its tensors' checksums
FORMAT = "moekern.pruned/1"
SETTINGS_CAP = 1 << 20  # bytes of a JSON file that is looked into for expert counts; tokenizers are larger


@dataclass(frozen=True)
class SideFile:
    """A file of the output: literal bytes and ranges of source files. origin is all that decided its bytes when it was
    looked at (`made_from`); note is a line for the user where it is no plain copy, or no longer true."""

    name: str
    pieces: tuple[bytes | Range, ...]
    origin: str
    note: str = ""

    @property
    def size(self) -> int:
        return sum(len(piece) if isinstance(piece, bytes) else piece[2] for piece in self.pieces)


def side_file(name: str, *pieces: bytes | Range, note: str = "") -> SideFile:
    return SideFile(name, pieces, made_from(pieces), note)


def side_files(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    kept: Mapping[str, tuple[int, ...]],
    shards: Sequence[OutputShard],
    mtp: Mtp,
) -> list[SideFile]:
    """In the order of writing: what is copied, the plan, then index and config.

    Raises InputError for a file that would bring another than the checkpoint's into the result, and for settings that
    name experts in a form that cannot be renumbered.
    """
    for name, wrong in checkpoint.contents.refused.items():
        raise InputError(f"{checkpoint.folder}: {name!r}: {wrong}")
    drop = mtp == "drop"
    files = []
    for name in checkpoint.side_files:
        path = checkpoint.folder / name
        if name in QUANTIZATION_FILES:
            renamer = Renamer(str(path), checkpoint.tensors, layout, kept, drop_mtp=drop)
            lists = expert_lists(str(path), checkpoint.config, layout, kept)
            settings = renamed_lists(lists.cut(read_json(path)), renamer)
            files.append(_text(name, dumped_like(settings, path.read_text(encoding="utf-8")), renamer.note(name)))
        elif name == MODEL_CARD:
            files.append(_model_card(path, layout, plan, kept))
        elif name not in (PLAN_FILE, MANIFEST):
            files.append(side_file(name, _whole(path), note=_stale_counts(path, name, layout.num_experts)))
    files.append(_text(PLAN_FILE, _provenance(checkpoint, layout, plan, kept, mtp)))
    if checkpoint.index is not None or len(shards) > 1:
        files.append(_text(INDEX, _index(checkpoint, shards)))
    original = (checkpoint.folder / CONFIG).read_text(encoding="utf-8")
    renamer = Renamer(str(checkpoint.folder / CONFIG), checkpoint.tensors, layout, kept, drop_mtp=drop)
    lists = expert_lists(str(checkpoint.folder / CONFIG), checkpoint.config, layout, kept)
    config = pruned_config(lists.cut(checkpoint.config), layout, kept, renamer, drop_mtp=drop)
    files.append(_text(CONFIG, dumped_like(config, original), renamer.note(CONFIG)))
    return files


def _text(name: str, text: str, note: str = "") -> SideFile:
    return side_file(name, text.encode(), note=note)


def _whole(path: Path) -> Range:
    return str(path), 0, regular_size(path)


def _model_card(path: Path, layout: Layout, plan: Plan, kept: Mapping[str, Sequence[int]]) -> SideFile:
    """The original's card with a notice in front of its text: what it says about experts is the original's."""
    size = regular_size(path)
    at = split_at(read_start(path, min(size, SETTINGS_CAP))[0], size)
    most = max(len(kept[key]) for key in layout.layers)
    pieces = ((str(path), 0, at), notice(most, layout.num_experts, plan.digest), (str(path), at, size - at))
    note = f"{MODEL_CARD}: the original's, behind a notice that names the plan; its numbers are the original's"
    return side_file(MODEL_CARD, *pieces, note=note)


def _stale_counts(path: Path, name: str, num_experts: int) -> str:
    """What to say about a JSON file that counts the original's experts; it is copied as it is."""
    if not name.endswith(".json") or regular_size(path) > SETTINGS_CAP:
        return ""
    try:
        level: list[Any] = [read_json(path)]
    except InputError:  # a list, or JSON of another tool's kind: copied, and nobody's settings
        return ""
    while level:
        holder = level.pop()
        items = list(holder.items()) if isinstance(holder, dict) else [("", item) for item in holder]
        if any(key in COUNT_KEYS and value == num_experts for key, value in items):
            return f"{name}: copied as it is, though it counts the original's {num_experts} experts"
        level += [value for _, value in items if isinstance(value, (dict, list))]
    return ""


def _provenance(
    checkpoint: Checkpoint, layout: Layout, plan: Plan, kept: Mapping[str, tuple[int, ...]], mtp: Mtp
) -> str:
    """JSON: the plan and its sha256, the source's fingerprint, what MTP layers keep; under "source" that of the source,
    if it was pruned itself."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": checkpoint.fingerprint,
        "mtp": mtp,
        "mtp_keep": {key: list(kept[key]) for key in layout.mtp if key in kept},
        "plan": json.loads(plan.to_json()),
        "plan_sha256": plan.digest,
    }
    earlier = checkpoint.folder / PLAN_FILE
    if earlier.is_file():
        content["source"] = read_json(earlier)
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _index(checkpoint: Checkpoint, shards: Sequence[OutputShard]) -> str:
    """The index in the form that save_pretrained gives it: sorted keys, indent 2.

    total_parameters is kept up only where it is the number of elements; for packed weights nothing here can know it.
    """
    metadata = dict((checkpoint.index or {}).get("metadata") or {})
    metadata["total_size"] = sum(shard.data_bytes for shard in shards)
    elements = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    if metadata.pop("total_parameters", None) == elements:
        metadata["total_parameters"] = sum(tensor.elements for shard in shards for tensor in shard.tensors)
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def mtp_line(layout: Layout, kept: Mapping[str, Sequence[int]], plan: Plan, mtp: Mtp) -> str:
    layers = ", ".join(layout.mtp)
    if mtp == "drop" and layout.mtp_prefixes:
        return f"MTP layers removed ({', '.join(layout.mtp_prefixes)})"
    if not layout.mtp:
        return "no MTP layer has experts"
    if mtp == "keep":
        return (
            f"MTP layer {layers}: all experts kept; engines size MTP layers by the same count key of config.json, so "
            "run this checkpoint without speculative decoding"
        )
    count = len(kept[next(iter(layout.mtp))])
    if all(key in plan.layers for key in layout.mtp):
        return f"MTP layer {layers}: {count} experts kept, as planned"
    return (
        f"MTP layer {layers}: {count} experts kept, those with the largest router rows, since calibration does not run "
        "MTP layers"
    )

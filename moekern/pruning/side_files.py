"""The files of a pruned checkpoint that hold no weights, and the words on what was done."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.architectures import Layout
from moekern.checkpoint.folder import CONFIG, INDEX, PLAN_FILE, Checkpoint
from moekern.checkpoint.strict_json import read_json
from moekern.plan.document import Plan
from moekern.pruning.config import QUANTIZATION_FILES, dumped_like, expert_renamer, pruned_config, renamed_lists
from moekern.pruning.cuts import Mtp
from moekern.pruning.shards import OutputShard

MANIFEST = "moekern_manifest.jsonl"  # a line for each shard: its size, and its tensors' checksums
FORMAT = "moekern.pruned/1"


@dataclass(frozen=True)
class SideFile:
    """A file of the output: its bytes, or the file that it is a copy of."""

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def side_files(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    kept: Mapping[str, tuple[int, ...]],
    shards: Sequence[OutputShard],
    mtp: Mtp,
) -> list[SideFile]:
    """In the order of writing: what is copied, the plan, then index and config."""
    drop = mtp == "drop"
    files = []
    for name in checkpoint.side_files:
        path = checkpoint.folder / name
        if name in QUANTIZATION_FILES:
            files.append(_text(name, _renamed_file(path, layout, kept, drop)))
        elif name not in (PLAN_FILE, MANIFEST):
            files.append(SideFile(name, path))
    files.append(_text(PLAN_FILE, _provenance(checkpoint, layout, plan, kept, mtp)))
    if checkpoint.index is not None or len(shards) > 1:
        files.append(_text(INDEX, _index(checkpoint, shards)))
    original = (checkpoint.folder / CONFIG).read_text(encoding="utf-8")
    config = pruned_config(checkpoint.config, layout, kept, drop_mtp=drop)
    files.append(_text(CONFIG, dumped_like(config, original)))
    return files


def _text(name: str, text: str) -> SideFile:
    return SideFile(name, text.encode())


def _renamed_file(path: Path, layout: Layout, kept: Mapping[str, Sequence[int]], drop_mtp: bool) -> str:
    content, text = read_json(path), path.read_text(encoding="utf-8")
    return dumped_like(renamed_lists(content, expert_renamer(layout, kept, drop_mtp=drop_mtp)), text)


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

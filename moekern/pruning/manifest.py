"""moekern_manifest.jsonl: a line for each shard of a pruned checkpoint, as it was written."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moekern.pruning.side_files import MANIFEST, SideFile, side_file
from moekern.pruning.work_folder import Record


def manifest(records: Sequence[Record], plan: str | None, told: Mapping[str, Mapping[str, Any]]) -> SideFile:
    """plan: its sha256. told: shard -> what else is to stand in its line: of a refit, of training."""
    text = ""
    for record in records:
        line = {
            "shard": record.shard,
            "size": record.size,
            "plan": plan,
            "checksum": record.checksum,
            "tensors": dict(record.tensors),
            "computed": list(record.computed),
            **told.get(record.shard, {}),
        }
        text += json.dumps(line, ensure_ascii=False) + "\n"
    return side_file(MANIFEST, text.encode())

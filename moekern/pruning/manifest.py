"""moekern_manifest.jsonl: a line for each shard of a pruned checkpoint, as it was written."""

import json
from collections.abc import Mapping, Sequence

from moekern.plan.document import Plan
from moekern.pruning.refitted import Refitted
from moekern.pruning.side_files import MANIFEST, SideFile, side_file
from moekern.pruning.work_folder import Record


def manifest(
    records: Sequence[Record], plan: Plan, refitted: Refitted | None, names: Mapping[str, Sequence[str]]
) -> SideFile:
    """names: shard -> its tensors that were refitted, which count as computed, and are named with their recipe."""
    text = ""
    for record in records:
        line = {
            "shard": record.shard,
            "size": record.size,
            "plan": plan.digest,
            "checksum": record.checksum,
            "tensors": dict(record.tensors),
            "computed": list(record.computed),
        }
        if refitted is not None and names[record.shard]:
            line["refit"] = {"recipe": refitted.recipe, "tensors": list(names[record.shard])}
        text += json.dumps(line, ensure_ascii=False) + "\n"
    return side_file(MANIFEST, text.encode())

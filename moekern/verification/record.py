"""What a pruned checkpoint says of itself: the plan that it was made by, and the manifest of its shards."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from moekern.checkpoint.folder import Checkpoint
from moekern.plan.document import Plan

PLAN_FILE, MANIFEST = "moekern_plan.json", "moekern_manifest.jsonl"
FORMAT = "moekern.pruned/1"
MTP_MODES = ("prune", "drop", "keep")


def parsed(data: bytes) -> Any:
    """JSON of a pruned checkpoint. Raises ValueError, for what is nested too deep as well."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def recorded(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """moekern_plan.json of the pruned folder; a checkpoint made by another tool has none."""
    path = folder / PLAN_FILE
    if not path.exists():
        return None
    try:
        content = parsed(path.read_bytes())
    except (OSError, ValueError) as error:
        problems.append(f"{PLAN_FILE}: {error}")
        return None
    if not isinstance(content, dict):
        problems.append(f"{PLAN_FILE}: holds no object")
        return None
    return content


def record_problems(
    found: Mapping[str, Any] | None,
    folder: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    mtp: str,
    mtp_keep: Mapping[str, Collection[int]],
    shards: Mapping[str, Collection[str]],
) -> Iterator[str]:
    """A line for each thing that the files say and that is not so. found: what the plan's file holds; mtp_keep: what
    MTP layers keep; shards: name -> its tensors. A checkpoint of another tool's has neither file."""
    if found is None:
        if (folder / MANIFEST).exists() and not (folder / PLAN_FILE).exists():
            yield f"{PLAN_FILE}: missing"
        return
    earlier = checkpoint.folder / PLAN_FILE
    want: dict[str, Any] = {
        "fingerprint": checkpoint.fingerprint,
        "format": FORMAT,
        "mtp": mtp,
        "mtp_keep": {key: list(keep) for key, keep in mtp_keep.items()},
        "plan": json.loads(plan.to_json()),
        "plan_sha256": plan.digest,
        **({"source": json.loads(earlier.read_bytes())} if earlier.is_file() else {}),
    }
    if found.get("plan_sha256") != plan.digest:
        return  # told before
    if mtp not in MTP_MODES:
        yield f"{PLAN_FILE}: mtp is none of {', '.join(MTP_MODES)}"
    for key in sorted(want.keys() | found.keys()):
        if json.dumps(want.get(key), sort_keys=True) != json.dumps(found.get(key), sort_keys=True):
            yield f"{PLAN_FILE}: {key} is not that of this source and plan"
    yield from _manifest_problems(folder, plan, shards)


def _manifest_problems(folder: Path, plan: Plan, shards: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Sizes, names and plan of the manifest's lines. Its checksums are of the files as they were written: nothing here
    reads them, since every byte is compared with the source."""
    try:
        lines = [parsed(line) for line in (folder / MANIFEST).read_bytes().splitlines()]
        named = {line["shard"]: line for line in lines}
        held = {name: {*line["tensors"], *line.get("computed", ())} for name, line in named.items()}
    except FileNotFoundError:
        yield f"{MANIFEST}: missing"
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{MANIFEST}: not readable: {error}"
        return
    if len(lines) != len(shards) or named.keys() != shards.keys():
        yield f"{MANIFEST}: its lines are not one for each shard"
        return
    for name, line in named.items():
        if line.get("size") != (folder / name).stat().st_size:
            yield f"{MANIFEST}: {name} has another size"
        if line.get("plan") != plan.digest:
            yield f"{MANIFEST}: {name}: made from another plan"
        if other := sorted(held[name] - set(shards[name])):
            yield f"{MANIFEST}: {name} does not hold {other[0]}"

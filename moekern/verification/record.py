"""What a pruned checkpoint says of itself: the plan that it was made by, and the manifest of its shards."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from moekern.checkpoint.folder import MANIFEST, PLAN_FILE, Checkpoint
from moekern.checkpoint.recovery import read_recovery
from moekern.checkpoint.strict_json import read_json, read_json_lines
from moekern.errors import InputError
from moekern.plan.document import MTP_MODES, Mtp, Plan

FORMAT = "moekern.pruned/1"


def without_folder(folder: Path, error: Exception) -> str:
    """What an error says of a file in `folder`, by its name in it."""
    return str(error).removeprefix(f"{folder}/")


def recorded(folder: Path, plan: Plan, problems: list[str]) -> dict[str, Any] | None:
    """moekern_plan.json of the pruned folder; a checkpoint made by another tool has none."""
    path = folder / PLAN_FILE
    if not os.path.lexists(path):
        return None
    try:
        content = read_json(path)
    except InputError as error:
        problems.append(without_folder(folder, error))
        return None
    if content.get("plan_sha256") != plan.digest:
        problems.append(f"{PLAN_FILE}: made from another plan")
    return content


def recorded_mtp(found: Mapping[str, Any] | None) -> Mtp | None:
    """What was done with MTP layers, as the plan's file says it."""
    return next((mode for mode in MTP_MODES if found is not None and found.get("mtp") == mode), None)


def lines_told(folder: Path) -> list[dict[str, Any]]:
    """The lines of the manifest; none where it is not there or no good, which record_problems tells."""
    try:
        return manifest_lines(folder) if os.path.lexists(folder / MANIFEST) else []
    except InputError:
        return []


def record_problems(
    found: Mapping[str, Any] | None,
    folder: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    mtp: str,
    mtp_keep: Mapping[str, Collection[int]],
    shards: Mapping[str, Collection[str]],
    replaced: Mapping[str, Any] = {},
) -> Iterator[str]:
    """A line for each thing that the files say and that is not so. found: what the plan's file holds; mtp_keep: what
    MTP layers keep; shards: name -> its tensors; replaced: in which form dropped experts are, and by what. A checkpoint
    of another tool's has neither file; one that was trained then has a manifest, which names no plan."""
    if found is None:
        if os.path.lexists(folder / MANIFEST) and not os.path.lexists(folder / PLAN_FILE):
            if any(line.get("plan") is not None for line in lines_told(folder)):
                yield f"{PLAN_FILE}: missing"
            else:
                yield from _manifest_problems(folder, None, shards)
        return
    if found.get("plan_sha256") != plan.digest:
        return  # told before
    earlier, recovery = checkpoint.folder / PLAN_FILE, read_recovery(checkpoint.folder)
    before = {**(read_json(earlier) if earlier.is_file() else {}), **({"recovery": recovery} if recovery else {})}
    want: dict[str, Any] = {
        "fingerprint": checkpoint.fingerprint,
        "format": FORMAT,
        "mtp": mtp,
        "mtp_keep": {key: list(keep) for key, keep in mtp_keep.items()},
        "plan": json.loads(plan.to_json()),
        "plan_sha256": plan.digest,
        **({"source": before} if before else {}),
        **({"replaced": replaced} if replaced else {}),
    }
    for key in sorted(want.keys() | found.keys()):
        if json.dumps(want.get(key), sort_keys=True) != json.dumps(found.get(key), sort_keys=True):
            yield f"{PLAN_FILE}: {key} is not that of this source and plan"
    yield from _manifest_problems(folder, plan.digest, shards)


def manifest_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of the manifest. Raises InputError for a file that holds no such lines."""
    return read_json_lines(folder / MANIFEST)


def _manifest_problems(folder: Path, plan: str | None, shards: Mapping[str, Collection[str]]) -> Iterator[str]:
    """Sizes, names and plan of the manifest's lines. Its checksums are of the files as they were written: they are read
    of what was refitted alone (`computed`), since every other byte is compared with the source. plan: its sha256."""
    if not os.path.lexists(folder / MANIFEST):
        yield f"{MANIFEST}: missing"
        return
    try:
        lines = manifest_lines(folder)
        named = {line["shard"]: line for line in lines}
        held = {name: {*line["tensors"], *line.get("computed", ())} for name, line in named.items()}
    except InputError as error:
        yield without_folder(folder, error)
        return
    except (KeyError, TypeError, AttributeError) as error:
        yield f"{MANIFEST}: not readable: {error}"
        return
    if len(lines) != len(shards) or named.keys() != shards.keys():
        yield f"{MANIFEST}: its lines are not one for each shard"
        return
    for name, line in named.items():
        if line.get("size") != (folder / name).stat().st_size:
            yield f"{MANIFEST}: {name} has another size"
        if line.get("plan") != plan:
            yield f"{MANIFEST}: {name}: made from another plan"
        if other := held[name] - set(shards[name]):
            yield f"{MANIFEST}: {name} does not hold {min(map(str, other))}"

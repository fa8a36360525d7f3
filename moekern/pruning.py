"""Write the pruned checkpoint: kept bytes are copied, never converted."""

import fcntl
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moekern import _C
from moekern.architectures import Layout, find_layout
from moekern.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint
from moekern.errors import InputError
from moekern.files import fsync
from moekern.plan import Plan, check_plan
from moekern.ranges import MTP_MODES, Mtp, OutputShard, Piece, kept_experts, output_shards
from moekern.rewrite_config import QUANTIZATION_FILES, dumped_like, expert_renamer, pruned_config, renamed_lists

PLAN_FILE = "moekern_plan.json"  # in the pruned folder: what it was made from
FORMAT = "moekern.pruned/1"

__all__ = ["PLAN_FILE", "Mtp", "PruneReport", "prune"]

Progress = Callable[[int, int], None]  # bytes written, bytes to write


@dataclass(frozen=True)
class PruneReport:
    """What was written. Bytes are those of the safetensors files."""

    out: Path
    bytes_in: int
    bytes_out: int
    experts_before: int  # in each layer
    experts_after: int
    layers: int
    tensors_in: int
    tensors_out: int
    shards_in: int
    shards_out: int
    mtp: str  # one line: what happened to the MTP layers
    seconds: float


@dataclass(frozen=True)
class File:
    """One file of the output: the bytes it takes, and its pieces, made when it is written."""

    name: str
    size: int
    pieces: Callable[[], list[Piece]]


def prune(
    source: Checkpoint | str | Path,
    plan: Plan,
    out: str | Path,
    *,
    mtp: Mtp = "prune",
    progress: Progress | None = None,
) -> PruneReport:
    """Copy `source` to the new folder `out` without the experts that `plan` drops.

    Everything is checked before the first byte is written, into a temporary folder beside `out` that is renamed at the
    end; whatever goes wrong on the way, nothing is left. Memory: headers, and a buffer of 8 MiB. `progress` is called
    with the bytes written so far and in all. mtp: "prune" keeps as many experts in MTP layers as elsewhere, "drop"
    removes these layers, "keep" copies them. Raises InputError.
    """
    start = time.perf_counter()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    if mtp not in MTP_MODES:
        raise InputError(f"--mtp {mtp}: expected one of {', '.join(MTP_MODES)}")
    check_plan(plan, layout, checkpoint.fingerprint)
    kept = kept_experts(checkpoint, layout, plan, mtp)
    shards = output_shards(checkpoint, layout, kept, mtp)
    files = _files(checkpoint, layout, plan, kept, shards, mtp)
    target = Path(out)
    check_target(checkpoint.folder, target, sum(file.size for file in files))
    _write_folder(target, files, progress)
    return PruneReport(
        out=target,
        bytes_in=sum(shard.size for shard in checkpoint.shards),
        bytes_out=sum((target / shard.name).stat().st_size for shard in shards),
        experts_before=layout.num_experts,
        experts_after=len(kept[next(iter(layout.layers))]),
        layers=len(layout.layers),
        tensors_in=len(checkpoint.tensors),
        tensors_out=sum(len(shard.tensors) for shard in shards),
        shards_in=len(checkpoint.shards),
        shards_out=len(shards),
        mtp=_mtp_line(layout, kept, plan, mtp),
        seconds=time.perf_counter() - start,
    )


def _files(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    kept: Mapping[str, tuple[int, ...]],
    shards: Sequence[OutputShard],
    mtp: Mtp,
) -> list[File]:
    """All files of the output in the order of writing: shards, side files, plan, then index and config."""
    files = [
        File(shard.name, len(shard.header()) + shard.data_bytes, partial(shard.pieces, checkpoint)) for shard in shards
    ]
    drop = mtp == "drop"
    for name in checkpoint.side_files:
        path = checkpoint.folder / name
        if name in QUANTIZATION_FILES:
            files.append(_literal(name, _renamed_file(path, layout, kept, drop)))
        elif name != PLAN_FILE:
            files.append(_whole(name, path))
    files.append(_literal(PLAN_FILE, _provenance(checkpoint, layout, plan, kept, mtp)))
    if checkpoint.index is not None:
        files.append(_literal(INDEX, _index(checkpoint, shards)))
    original = (checkpoint.folder / CONFIG).read_text(encoding="utf-8")
    config = pruned_config(checkpoint.config, layout, kept, drop_mtp=drop)
    files.append(_literal(CONFIG, dumped_like(config, original)))
    return files


def _whole(name: str, path: Path) -> File:
    size = path.stat().st_size
    return File(name, size, lambda: [(str(path), 0, size)])


def _literal(name: str, text: str) -> File:
    data = text.encode()
    return File(name, len(data), lambda: [data])


def _renamed_file(path: Path, layout: Layout, kept: Mapping[str, Sequence[int]], drop_mtp: bool) -> str:
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
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
        try:
            content["source"] = json.loads(earlier.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{earlier}: not valid JSON: {error}") from None
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


def _mtp_line(layout: Layout, kept: Mapping[str, Sequence[int]], plan: Plan, mtp: Mtp) -> str:
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


def check_target(source: Path, target: Path, size: int) -> None:
    """Refuse, before anything is written, a target that could not be written or would harm something.

    What a killed process left of the same target is removed first: it may hold the space that is needed.
    """
    parent = target.parent
    if os.path.lexists(target):
        raise InputError(f"{target}: exists already; name a new folder or remove it")
    if not parent.is_dir():
        raise InputError(f"{target}: the folder {parent} does not exist; make it first")
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target}: lies inside the source {source}; name a folder elsewhere")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{target}: no permission to write in {parent}")
    _remove_abandoned(target)
    free = shutil.disk_usage(parent).free
    if size > free:
        raise InputError(f"{target}: needs {size / 1e9:.2f} GB, and {parent} has {free / 1e9:.2f} GB free")


def _write_folder(target: Path, files: Sequence[File], progress: Progress | None) -> None:
    """Write the files into a temporary folder, then rename it to `target`. On any exception nothing stays."""
    temporary = target.with_name(f"{_temporary_prefix(target)}{secrets.token_hex(4)}")
    with ExitStack() as stack:
        try:
            temporary.mkdir()
            with suppress(OSError):  # a file system without locks
                stack.enter_context(_locked(temporary))
            _write_files(temporary, files, progress)
            temporary.rename(target)
            fsync(target.parent)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise InputError(f"{target}: not written: {_reason(error)}") from error
            raise


def _write_files(folder: Path, files: Sequence[File], progress: Progress | None) -> None:
    total, done = sum(file.size for file in files), 0
    for file in files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        _C.write_file(str(path), file.pieces(), progress and _shifted(progress, done, total))
        done += file.size
    for part in {folder, *((folder / file.name).parent for file in files)}:
        fsync(part)


def _temporary_prefix(target: Path) -> str:
    return f".{target.name}.moekern-"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process however that ends; BlockingIOError while another holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_abandoned(target: Path) -> None:
    """Remove temporary folders of this target that no living process writes; where locks do not work, none."""
    pattern = re.escape(_temporary_prefix(target)) + "[0-9a-f]{8}"
    for folder in [path for path in target.parent.iterdir() if re.fullmatch(pattern, path.name)]:
        with suppress(OSError), _locked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _shifted(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    return lambda written: progress(before + written, total)


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)

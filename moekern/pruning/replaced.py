"""Write a checkpoint with some tensors replaced by trained ones: all other bytes are copied, never converted."""

import json
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.checkpoint.contents import MODEL_CARD
from moekern.checkpoint.folder import CONFIG, INDEX, MANIFEST, PLAN_FILE, Checkpoint, open_checkpoint
from moekern.checkpoint.header import TensorEntry, read_shard
from moekern.checkpoint.recovery import FORMAT, RECOVERY, read_recovery
from moekern.checkpoint.strict_json import HEADER_CAP, check_depth, parse_json, read_file, read_json, shown
from moekern.errors import InputError
from moekern.files import is_plain
from moekern.plan.refit import is_sha256
from moekern.pruning.config import dumped_like, with_numbers
from moekern.pruning.copying import Checksum, Copy, check_copying, read_checksums
from moekern.pruning.cuts import OutputTensor
from moekern.pruning.manifest import RefittedBefore, read_manifest
from moekern.pruning.refitted import SUFFIX, NewTensor
from moekern.pruning.shards import OutputShard
from moekern.pruning.side_files import SideFile, check_side_files, side_file, text_file, whole_file
from moekern.pruning.work_folder import check_target
from moekern.pruning.writing import Progress, Tally, check_out, job_of, written
from moekern.publishing.card import CARD_CAP, trained_card

OWN = ("format", "source_fingerprint", "tensors", "settings", "earlier")  # keys of RECOVERY that no caller gives


@dataclass(frozen=True)
class ReplacedReport:
    """What was written. Bytes are those of the safetensors files.

    copy names the ways taken; cloned, holes and copied are the bytes that were shared with the source, left as holes
    and written; reused those that an earlier run had written.
    """

    out: Path
    bytes_out: int
    shards: int
    tensors: int
    replaced: int  # tensors that were trained this time
    trained: int  # and those that were trained when the source was made
    copy: str
    cloned: int
    holes: int
    copied: int
    reused: int
    left_out: Mapping[str, str]  # file, or folder with a "/" at its end, that was not copied -> why
    notes: tuple[str, ...]
    seconds: float


def write_replaced(
    source: Checkpoint | str | Path,
    out: str | Path,
    replaced: str | Path,
    record: Mapping[str, Any],
    *,
    settings: Mapping[tuple[str, ...], int] = {},
    copy: Copy = "auto",
    checksum: Checksum = "xxh3",
    progress: Progress | None = None,
) -> ReplacedReport:
    """Copy `source` to the new folder `out` with the tensors in the safetensors files of the folder `replaced` in the
    place of those of their names, whose dtype and shape they must have.

    Shards keep names, headers and order, side files their bytes. moekern_manifest.jsonl is written anew, and
    moekern_recovery.json names the tensors that were trained, those of an earlier time too, and holds `record` (values
    of JSON). settings: numbers of config.json that become others, by path (a list of equal ones stays one); they stand
    in the record too, with those of an earlier time, and nothing else of the file changes. Everything is checked before
    the first byte is written; the output grows in `NAME.moekern` beside `out` and gets its name at the end; what is
    interrupted goes on where it was when it is called again with the same files.
    copy, checksum, progress: as of `prune`. Raises InputError.
    """
    start = time.perf_counter()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    target = Path(out)
    check_target(target, checkpoint.folder)
    check_copying(copy, checksum)
    check_side_files(checkpoint)
    new = _open_replaced(checkpoint, Path(replaced))
    earlier = read_recovery(checkpoint.folder)
    computed, refits = read_manifest(checkpoint.folder)
    _check_names(checkpoint, MANIFEST, refits)
    before = {name: bytes.fromhex(value) for name, value in (earlier["tensors"] if earlier else {}).items()}
    _check_names(checkpoint, RECOVERY, before)
    trained = {**before, **{name: tensor.checksum for name, tensor in new.items()}}
    refits = {name: refit for name, refit in refits.items() if name not in trained}
    held = _refitted(checkpoint, refits) | {n: _in_source(checkpoint, n, value) for n, value in before.items()} | new
    shards = _shards(checkpoint, held)
    numbers = {**(earlier or {}).get("settings", {}), **{".".join(path): n for path, n in settings.items()}}
    recovery = _recovery(checkpoint, trained, numbers, record, earlier)
    side = _side_files(checkpoint, recovery, _config(checkpoint, settings), len(trained), {**record, **numbers})
    told = {shard.name: _line(shard, computed, refits, trained) for shard in shards}
    job = job_of(checkpoint, _plan_sha256(checkpoint), shards, side, told, target, copy, checksum)
    check_out(job, target, shards, again=False)
    tally = Tally(job.passes * sum(shard.size for shard in shards) + sum(file.size for file in side), progress)
    written(job, target, None, shards, tally)
    return ReplacedReport(
        out=target,
        bytes_out=sum(shard.size for shard in shards),
        shards=len(shards),
        tensors=len(checkpoint.tensors),
        replaced=len(new),
        trained=len(trained),
        copy=", ".join(sorted({job.way(shard).removesuffix("_or_stream") for shard in shards})),
        cloned=tally.cloned,
        holes=tally.holes,
        copied=tally.copied,
        reused=tally.reused,
        left_out=checkpoint.contents.left_out,
        notes=(*checkpoint.notes, *(note for file in side for note in file.notes)),
        seconds=time.perf_counter() - start,
    )


def _open_replaced(checkpoint: Checkpoint, folder: Path) -> dict[str, NewTensor]:
    """The tensors that take the places of the checkpoint's; they are read once, for their checksums. Files of other
    kinds, and those that are still written, are passed over."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    folder = folder.resolve()
    entries: dict[str, tuple[Path, TensorEntry]] = {}
    for name in sorted(name for name in os.listdir(folder) if name.endswith(SUFFIX) and not name.startswith(".")):
        path = folder / name
        is_plain(path)
        for entry in read_shard(path).tensors:
            if entry.name in entries:
                other = entries[entry.name][0].name
                raise InputError(f"{path}: tensor {shown(entry.name)} is also in {other}; give it once")
            _check_fits(checkpoint, path, entry)
            entries[entry.name] = path, entry
    if not entries:
        raise InputError(f"{folder}: no safetensors file with a tensor is in it; name the folder of the trained ones")
    return {name: NewTensor(None, path, entry, _xxh3(path, entry)) for name, (path, entry) in entries.items()}


def _check_fits(checkpoint: Checkpoint, path: Path, new: TensorEntry) -> None:
    """Raise InputError unless the checkpoint has a tensor of this name, of this dtype and shape."""

    def refuse(what: str) -> InputError:
        return InputError(f"{path}: tensor {shown(new.name)}: {what}")

    old = checkpoint.tensors.get(new.name)
    if old is None:
        raise refuse(f"{checkpoint.folder} has no tensor of this name")
    if new.dtype != old.dtype:
        raise refuse(f"is {new.dtype}; in {checkpoint.folder} it is {old.dtype}")
    if new.shape != old.shape:
        raise refuse(f"has shape {list(new.shape)}; in {checkpoint.folder} it has {list(old.shape)}")


def _xxh3(path: Path, entry: TensorEntry) -> bytes:
    with path.open("rb", buffering=0) as file:
        return read_checksums(file, entry.name, entry.start, entry.stop, "xxh3")[0]


def _check_names(checkpoint: Checkpoint, file: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in checkpoint.tensors:
            what = "the checkpoint has no tensor of this name; remove the file if it is of another"
            raise InputError(f"{checkpoint.folder / file}: {shown(name)}: {what}")


def _in_source(checkpoint: Checkpoint, name: str, checksum: bytes) -> NewTensor:
    """A tensor that stays where it is, and must have this checksum."""
    entry = checkpoint.tensors[name]
    return NewTensor(None, Path(entry.shard), entry, checksum)


def _refitted(checkpoint: Checkpoint, refits: Mapping[str, RefittedBefore]) -> dict[str, NewTensor]:
    """Tensors that a refit computed and that stay, with the checksums that they got then: XXH3-128 of those that have
    another kind is taken once that one is found right. Those that have none are copied like any other."""
    found = {}
    for name, refit in refits.items():
        entry, checksum = checkpoint.tensors[name], refit.checksum
        if refit.kind == "blake3" and checksum is not None:
            check_copying("auto", "blake3")
            path = checkpoint.folder / entry.shard
            with path.open("rb", buffering=0) as file:
                own, other = read_checksums(file, name, entry.start, entry.stop, "blake3")
            if other != checksum:
                what = f"its bytes are not those that were computed, whose checksum is in {MANIFEST}"
                raise InputError(f"{path}: tensor {shown(name)}: {what}")
            checksum = own
        if checksum is not None:
            found[name] = _in_source(checkpoint, name, checksum)
    return found


def _shards(checkpoint: Checkpoint, held: Mapping[str, NewTensor]) -> tuple[OutputShard, ...]:
    """The source's, header and order as they are, and tensors that another shard supersedes too."""
    shards = []
    for shard in checkpoint.shards:
        shard.check_unchanged()
        tensors = [
            OutputTensor(e.name, e.shape, e, None, held.get(e.name) if _counts(checkpoint, e) else None)
            for e in read_shard(shard.path).tensors
        ]
        shards.append(OutputShard(shard.name, shard.metadata, tuple(tensors), taken=shard.data_start))
    return tuple(shards)


def _counts(checkpoint: Checkpoint, entry: TensorEntry) -> bool:
    return checkpoint.tensors[entry.name].shard == entry.shard


def _line(
    shard: OutputShard, computed: Collection[str], refits: Mapping[str, RefittedBefore], trained: Collection[str]
) -> dict[str, Any]:
    """What the shard's line of the manifest says of computed tensors: now, and when the source was made."""
    names = [tensor.name for tensor in shard.tensors]
    line: dict[str, Any] = {"computed": [n for n in names if n in computed or n in refits or n in trained]}
    if refitted := [name for name in names if name in refits]:
        line["refit"] = {"recipe": refits[refitted[0]].recipe, "tensors": refitted}
    if recovered := [name for name in names if name in trained]:
        line["recover"] = {"tensors": recovered}
    return line


def _plan_sha256(checkpoint: Checkpoint) -> str | None:
    """sha256 of the plan that the source was pruned by; None where another tool did."""
    path = checkpoint.folder / PLAN_FILE
    if not os.path.lexists(path):
        return None
    found = read_json(path).get("plan_sha256")
    if not is_sha256(found):
        raise InputError(f"{path}: plan_sha256: expected a sha256, got {shown(found)}")
    return str(found)


def _config(checkpoint: Checkpoint, settings: Mapping[tuple[str, ...], int]) -> SideFile:
    """config.json with these numbers."""
    path = checkpoint.folder / CONFIG
    if not settings:
        return side_file(CONFIG, whole_file(path))
    try:
        changed = with_numbers(checkpoint.config, settings)
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}: no number is there that could become another") from None
    return text_file(CONFIG, dumped_like(changed, path.read_text(encoding="utf-8")))


def _recovery(
    checkpoint: Checkpoint,
    trained: Mapping[str, bytes],
    numbers: Mapping[str, int],
    record: Mapping[str, Any],
    earlier: Mapping[str, Any] | None,
) -> SideFile:
    if own := [key for key in OWN if key in record]:
        raise ValueError(f"[write_replaced] record: {own[0]} is a key of the file's own")
    content = {
        **record,
        "format": FORMAT,
        "source_fingerprint": checkpoint.fingerprint,
        "tensors": {name: value.hex() for name, value in trained.items()},
        **({"settings": numbers} if numbers else {}),
        **({"earlier": earlier} if earlier is not None else {}),
    }
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    check_depth(parse_json(text.encode(), RECOVERY), RECOVERY)
    if len(text) > HEADER_CAP:
        raise InputError(f"{RECOVERY}: would have {len(text)} bytes, more than the limit of {HEADER_CAP}")
    return text_file(RECOVERY, text)


def _side_files(
    checkpoint: Checkpoint, recovery: SideFile, config: SideFile, trained: int, told: Mapping[str, Any]
) -> Sequence[SideFile]:
    """In the order of writing: what is copied, the record, then index and config."""
    names = [name for name in checkpoint.side_files if name not in (MANIFEST, RECOVERY)]
    last = [] if checkpoint.index is None else [INDEX]
    copied, ends = ([side_file(name, whole_file(checkpoint.folder / name)) for name in some] for some in (names, last))
    copied = [_card(checkpoint, trained, told) if file.name == MODEL_CARD else file for file in copied]
    return [*copied, recovery, *ends, config]


def _card(checkpoint: Checkpoint, trained: int, told: Mapping[str, Any]) -> SideFile:
    """The source's card with what was trained; as it is where it has no place for that, which is told."""
    path = checkpoint.folder / MODEL_CARD
    try:
        card = read_file(path, CARD_CAP).decode()
        return text_file(MODEL_CARD, trained_card(card, trained, told, str(path)))
    except (InputError, UnicodeDecodeError):
        note = f"{MODEL_CARD}: copied as it is; it does not tell of the training"
        return side_file(MODEL_CARD, whole_file(path), notes=(note,))

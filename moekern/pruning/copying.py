"""How the bytes of a shard come into its file, and their checksums."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import moekern._C as _C
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.strict_json import shown
from moekern.errors import InputError
from moekern.pruning.cuts import OutputTensor
from moekern.pruning.pieces import Piece
from moekern.pruning.shards import OutputShard

Copy = Literal["auto", "reflink", "kernel", "stream"]
Checksum = Literal["xxh3", "blake3", "none"]
COPIES: tuple[Copy, ...] = ("auto", "reflink", "kernel", "stream")
CHECKSUMS: tuple[Checksum, ...] = ("xxh3", "blake3", "none")
KINDS: dict[Checksum, str | None] = {"xxh3": "xxh3-128", "blake3": "blake3", "none": None}  # as the manifest says it
CHUNK = 8 << 20

Way = Literal["reflink", "reflink_or_stream", "kernel", "stream"]  # what write_file is told
Report = Callable[[int], None]  # bytes so far


@dataclass(frozen=True)
class Copied:
    """What became of the bytes of a file, and the checksums of its tensors, hex, None where there is none."""

    cloned: int
    holes: int
    copied: int
    checksum: str | None
    tensors: dict[str, str | None]


def ways(checkpoint: Checkpoint, names: Collection[str], folder: Path, copy: Copy) -> dict[str, Way]:
    """File of a shard -> how its bytes come into files of `folder`; each pair of file systems is probed once.

    auto: blocks are shared where the file systems can, a server copies where both files are on it, else the bytes
    stream through memory. Raises InputError when --copy reflink is not possible.
    """
    if copy in ("stream", "kernel"):
        return dict.fromkeys(names, copy)
    largest: dict[int, Path] = {}
    devices: dict[str, int] = {}
    sizes: dict[int, int] = {}
    for name in sorted(names):
        path = checkpoint.folder / name
        status = path.stat()
        device = devices[name] = status.st_dev
        if status.st_size >= sizes.get(device, 0):
            largest[device], sizes[device] = path, status.st_size
    found: dict[int, Way] = {}
    for device, path in largest.items():
        can: Way = _C.probe_copy(str(path), str(folder))
        if copy == "reflink" and can != "reflink":
            raise InputError(
                f"--copy reflink: {folder} cannot share blocks with {path}; both must be on one file system that can, "
                "such as XFS or btrfs; use --copy auto or stream"
            )
        found[device] = "reflink_or_stream" if copy == "auto" and can == "reflink" else can
    return {name: found[device] for name, device in devices.items()}


def way_of(shard: OutputShard, known: Mapping[str, Way]) -> Way:
    """One way for a file of several sources: theirs if they agree; else blocks are shared with those that can, and the
    rest goes through memory."""
    found = {known[file] for file in shard.files}
    return found.pop() if len(found) == 1 else "reflink_or_stream" if "reflink_or_stream" in found else "stream"


def space_needed(checkpoint: Checkpoint, shard: OutputShard, known: Mapping[str, Way]) -> int:
    """Bytes of disk that a shard will take, at the most: shared blocks and holes take none, what is computed does."""
    size = shard.size
    if all(known[file].startswith("reflink") for file in shard.files):
        size -= shard.shared
    made = sum(tensor.nbytes for tensor in shard.tensors if tensor.is_computed)
    copied = sum(map(_data_bytes, (checkpoint.folder / file for file in shard.files)))
    return min(size, shard.header_bytes + made + copied)


def room_needed(checkpoint: Checkpoint, folder: Path, nbytes: int) -> int:
    """The same for `nbytes` of a checkpoint before it is known which they are."""
    found = ways(checkpoint, [shard.name for shard in checkpoint.shards], folder, "auto")
    if set(found.values()) == {"reflink_or_stream"}:
        return 0
    return min(nbytes, sum(_data_bytes(shard.path) for shard in checkpoint.shards))


def _data_bytes(path: Path) -> int:
    """What a file with holes takes on the disk; its size when it has none."""
    handle = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(handle)
        hole = os.lseek(handle, 0, os.SEEK_HOLE) if status.st_size and hasattr(os, "SEEK_HOLE") else status.st_size
    except OSError:
        return status.st_size
    finally:
        os.close(handle)
    return status.st_size if hole >= status.st_size else min(status.st_size, status.st_blocks * 512)


def copy_shard(
    path: Path, shard: OutputShard, pieces: list[Piece], way: Way, checksum: Checksum, reread: bool, report: Report
) -> Copied:
    """Write the shard to the new file `path` and fsync it; `reread`, which blake3 needs, reads it back from the disk.

    xxh3 is taken of what passes through memory on the way; reading back compares with it and takes the checksum of the
    rest. What was computed before, by a refit or by training, has the checksum that it got then. Raises OSError, and
    InputError when the disk gives back other bytes than were written, or such tensors are not what was computed.
    """
    spans = shard.spans()
    names = [tensor.name for tensor in shard.tensors]
    on_the_way = spans if checksum != "none" or reread else []
    cloned, holes, copied, digests = _C.write_file(str(path), pieces, on_the_way, way, report)
    digests = [_as_computed(t, d) for t, d in zip(shard.tensors, digests or [None] * len(spans), strict=True)]
    if reread:
        digests = _read_back(path, names, spans, digests, checksum, lambda done: report(shard.size + done))
    named = KINDS[checksum]
    values = {n: d.hex() if d and named else None for n, d in zip(names, digests, strict=True)}
    return Copied(cloned, holes, copied, named, values)


def _as_computed(tensor: OutputTensor, found: bytes | None) -> bytes | None:
    """The checksum of a tensor: of what passed through memory, which is held against the one that it got when it was
    computed, or the latter. Raises InputError where they differ."""
    if tensor.new is None:
        return found
    if found not in (None, tensor.new.checksum):
        what = "its bytes are not those that were computed; the file is damaged: compute it again"
        raise InputError(f"{tensor.new.path}: tensor {shown(tensor.name)}: {what}")
    return tensor.new.checksum


def _read_back(
    path: Path,
    names: Sequence[str],
    spans: Sequence[tuple[int, int]],
    written: Sequence[bytes | None],
    checksum: Checksum,
    report: Report,
) -> list[bytes | None]:
    """Checksums of what the disk holds, once the file has left the page cache."""
    found: list[bytes | None] = []
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for name, (start, stop), before in zip(names, spans, written, strict=True):
            hashes = read_checksums(file, name, start, stop, checksum, report)
            if before is not None and hashes[0] != before:
                raise InputError(f"{path}: {name}: the disk gives back other bytes than were written; it is faulty")
            found.append(hashes[-1])
    return found


def read_checksums(
    file: IO[bytes], name: str, start: int, stop: int, checksum: Checksum, report: Report = lambda done: None
) -> list[bytes]:
    """xxh3 of the bytes of tensor `name` in an open file, and the one that is asked for, if it is another. What was
    read leaves the page cache. Raises InputError for a file that ends before `stop`."""
    hashes: list[Any] = [_C.Xxh3()]
    if checksum == "blake3":
        import blake3

        hashes.append(blake3.blake3())
    buffer = memoryview(bytearray(min(CHUNK, max(1, stop - start))))
    while start < stop:
        got = os.preadv(file.fileno(), [buffer[: stop - start]], start)
        if not got:
            raise InputError(f"{file.name}: ends inside {name}, at byte {start}: it has become shorter")
        for state in hashes:
            state.update(buffer[:got])
        os.posix_fadvise(file.fileno(), start, got, os.POSIX_FADV_DONTNEED)
        start += got
        report(start)
    return [state.digest() for state in hashes]


def check_copying(copy: str, checksum: str) -> None:
    """Raise InputError when the way or the checksum is unknown, or its library is not installed."""
    if copy not in COPIES:
        raise InputError(f"--copy {copy}: expected one of {', '.join(COPIES)}")
    if checksum not in CHECKSUMS:
        raise InputError(f"--checksum {checksum}: expected one of {', '.join(CHECKSUMS)}")
    if checksum == "blake3":
        try:
            import blake3  # noqa: F401
        except ImportError:
            how = "pip install 'moekern[blake3]'"
            raise InputError(f"--checksum blake3: the package blake3 is not installed; {how}") from None

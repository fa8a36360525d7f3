"""What is read of a repository of the hub: headers by range requests, or the whole model into the hub's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from moekern import files
from moekern.checkpoint.contents import ADAPTER_WEIGHTS
from moekern.checkpoint.folder import CONFIG, INDEX, PLAN_FILE, Checkpoint, open_checkpoint, sampled
from moekern.checkpoint.header import Shard, TensorEntry, header_length, parse_header
from moekern.checkpoint.hub import Progress, Repository, Step, Tell, alone_with, asking, broken_off
from moekern.checkpoint.recovery import RECOVERY
from moekern.checkpoint.strict_json import HEADER_CAP, read_start, shown
from moekern.errors import InputError

THREADS, TRIES = 16, 4
QUERY: Any = {"timeout": 30, "follow_redirects": True, "retry_on_exceptions": ()}
NO_SHARDS = ("consolidated", ADAPTER_WEIGHTS)  # a second copy by its authors' name for it; an adapter
LARGE, ONE_AT_A_TIME = 1 << 24, threading.Lock()  # bytes of a header: several of them would fill the memory
FEW = 64  # bytes: as many as a router is asked for
MARGIN = 1 << 30  # bytes of the disk that a download leaves free

A = TypeVar("A")
B = TypeVar("B")


def headers_of(repository: Repository, progress: Progress) -> Checkpoint:
    """A checkpoint of which config, index, headers and the fingerprint's samples alone are read, by range requests.

    They are kept by commit in HF_HOME/moekern, so that the next command asks for none of them: there each file of the
    repository has a stand-in, of a shard as far as its header goes, else empty. Reading other bytes raises InputError.
    """
    folder = repository.folder
    if CONFIG not in repository.sizes:
        raise InputError(f"{repository}: holds no {CONFIG}: not a checkpoint that moekern reads")
    with alone_with(repository):
        _keep_headers(repository, progress)
        try:
            found = open_checkpoint(folder, lambda path: _shard(repository, path))
        except InputError as error:
            again = f"read from what is kept of {repository}: remove {folder} to ask the hub again"
            raise InputError(f"{error}; {again}", error.kind) from error
    return replace(found, read_data=_sample_reader(repository, found))


def _keep_headers(repository: Repository, progress: Progress) -> None:
    """Stand-ins of all files, with what is read of them."""
    folder, sizes = repository.folder, repository.sizes
    for name in sizes:
        _stand_in(folder, name)
    for name in (CONFIG, INDEX, PLAN_FILE, RECOVERY):
        if name in sizes and (folder / name).stat().st_size != sizes[name]:
            if sizes[name] > HEADER_CAP:
                raise InputError(f"{repository}: {name}: {sizes[name]} bytes, more than the limit of {HEADER_CAP}")
            files.write_bytes(folder / name, _bytes_of(repository, name, 0, sizes[name]))
    shards = [
        name
        for name in sizes
        if "/" not in name
        and name.endswith(".safetensors")
        and not name.startswith(NO_SHARDS)
        and not _has_header(repository, name)
    ]
    with progress(f"reading headers of {repository.id}", "files") as step:
        for done, _ in enumerate(_in_parallel(lambda name: _keep_header(repository, name), shards), 1):
            step(done, len(shards))


def _stand_in(folder: Path, name: str) -> None:
    """An empty file in the place of one of the repository, so that the rules of folders see what it has."""
    if not name.isprintable() or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise InputError(f"{folder}: {shown(name)}: a name that leads elsewhere")
    path = folder / name
    if not files.is_plain(path):  # nor a link that somebody has put there
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _has_header(repository: Repository, name: str) -> bool:
    return (repository.folder / name).stat().st_size > 0 or repository.sizes[name] == 0


def _keep_header(repository: Repository, name: str) -> None:
    """The beginning of a shard's stand-in: its first 8 bytes and, if they are sound, its header."""
    path, size = repository.folder / name, repository.sizes[name]
    if not _has_header(repository, name):
        start, length = _bytes_of(repository, name, 0, min(8, size)), 0
        with suppress(InputError):  # which is raised again if it is a shard
            length = header_length(start, path, size)
        with ONE_AT_A_TIME if length > LARGE else nullcontext():
            files.write_bytes(path, start + _bytes_of(repository, name, 8, length))


def _shard(repository: Repository, path: Path) -> Shard:
    """The header in a stand-in, as that of the whole file."""
    size = repository.sizes[path.name]
    _keep_header(repository, path.name)
    length = header_length(read_start(path, min(8, size))[0], path, size)
    return parse_header(read_start(path, 8, length)[1], path, size)


def _in_parallel(function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """What the function makes of every item, in order. The first error ends it."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = [pool.submit(function, item) for item in items]
        try:
            for each in waiting:
                yield each.result()
        finally:
            for each in waiting:
                each.cancel()


def _sample_reader(repository: Repository, checkpoint: Checkpoint) -> Callable[[Path, TensorEntry, int, int], bytes]:
    """Reads what the fingerprint looks at, all of it when the first is asked for, and a few bytes elsewhere; refuses
    the rest."""
    held: dict[tuple[str, int, int], bytes] = {}

    def read(path: Path, entry: TensorEntry, start: int, size: int) -> bytes:
        if not held:
            held.update(_samples(repository, checkpoint))
        if (entry.name, start, size) not in held:
            if size <= FEW:
                return _bytes_of(repository, entry.shard, start, size)
            raise InputError(f"{repository}: {entry.name}: only headers were read; its weights were not downloaded")
        return held[entry.name, start, size]

    return read


def _samples(repository: Repository, checkpoint: Checkpoint) -> Iterable[tuple[tuple[str, int, int], bytes]]:
    places, path = sampled(checkpoint.tensors), repository.beside(".samples")
    with alone_with(repository):
        data = files.read_plain(path) if files.is_plain(path) else b""
        if data[-32:] != hashlib.sha256(data[:-32]).digest() or len(data) != sum(size for _, _, size in places) + 32:
            parts = _in_parallel(lambda place: _bytes_of(repository, place[0].shard, *place[1:]), places)
            data = b"".join(parts)
            files.write_bytes(path, data + hashlib.sha256(data).digest())
    at = 0
    for entry, start, size in places:
        yield (entry.name, start, size), data[at : at + size]
        at += size


def _bytes_of(repository: Repository, name: str, start: int, size: int) -> bytes:
    """Bytes of a file of the repository, of its download if it is there: else no more are received, whatever the
    server sends. Raises InputError."""
    if size == 0:
        return b""
    if repository.snapshot is not None and (repository.snapshot / name).is_file():
        with (repository.snapshot / name).open("rb") as file:
            file.seek(start)
            return file.read(size)
    for left in reversed(range(TRIES)):
        try:
            with asking(repository.id, repository.commit):
                data = _received(repository, name, start, size)
        except InputError as error:
            if not left or not broken_off(error.__cause__):
                raise
        else:
            if len(data) == size:
                return data
        if left:
            time.sleep(0.2 * 2 ** (TRIES - left))
    raise InputError(f"{repository}: {name}: the hub sent {len(data)} of {size} bytes from byte {start} on")


def _received(repository: Repository, name: str, start: int, size: int) -> bytes:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(repository.id, name, revision=repository.commit)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff("GET", url, headers=headers, **QUERY) as response:
        hf_raise_for_status(response)
        whole = response.status_code != 206  # then the whole file is sent, of which only the beginning is received
        total = response.headers.get("Content-Length" if whole else "Content-Range", "*").rpartition("/")[2]
        if total not in ("*", str(repository.sizes[name])):
            raise InputError(f"{repository}: {name}: has {total} bytes; the hub's list says {repository.sizes[name]}")
        skip = start if whole else 0
        if skip + size > HEADER_CAP + 8:
            raise InputError(f"{repository}: {name}: the server does not answer requests for a part of a file")
        data = bytearray()
        for piece in response.iter_bytes():
            data += piece
            if len(data) >= skip + size:
                break
    return bytes(data[skip : skip + size])


def download(
    repository: Repository, checkpoint: Checkpoint, revision: str | None, tell: Tell, progress: Progress
) -> Path:
    """The folder in the hub's cache that holds the model, downloaded as far as it is not there yet.

    `checkpoint` has the repository's headers, and names its shards and the files that belong to it: all that is taken.
    Before a weight is asked for, the size is told, and refused where the disk has no room for it. Files that an earlier
    download has finished are not asked for again.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    cache, commit = Path(constants.HF_HUB_CACHE), repository.commit
    names = {CONFIG, INDEX, *(shard.name for shard in checkpoint.shards), *checkpoint.side_files} & {*repository.sizes}
    with asking(repository.id, revision), _no_bars():
        # By the revision's name, which the cache then knows when the hub is away.
        hf_hub_download(repository.id, CONFIG, revision=revision)
        snapshot = Path(hf_hub_download(repository.id, CONFIG, revision=commit)).parent
        missing = [name for name in sorted(names) if not (snapshot / name).exists()]
        size = sum(repository.sizes[name] for name in missing)
        free = shutil.disk_usage(cache).free
        wanted = f"{files.sized(size)} to download in {len(missing)} files"
        line = f"{repository}: {wanted}; {files.sized(free)} free in {cache}"
        if missing and size + MARGIN > free:
            raise InputError(f"{line}; make room, or set HF_HOME to a folder on another disk")
        if missing:
            tell(line)
            with progress(f"downloading {repository.id}", "bytes") as step, _watched(snapshot, size, step):
                patterns = [_literal(name) for name in missing]
                snapshot_download(repository.id, revision=commit, allow_patterns=patterns)
    return snapshot


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without progress bars of the hub's library: there is one of our own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _literal(name: str) -> str:
    """A pattern that means one file."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@contextmanager
def _watched(snapshot: Path, total: int, step: Step) -> Iterator[None]:
    """Tell how many bytes have come, by the size of what lies in the cache, which needs no word of the library."""
    blobs, ended = snapshot.parent.parent / "blobs", threading.Event()
    before = _bytes_in(blobs)

    def watch() -> None:
        while not ended.wait(0.5):
            step(min(total, max(0, _bytes_in(blobs) - before)), total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    step(total, total)


def _bytes_in(folder: Path) -> int:
    total = 0
    try:
        with os.scandir(folder) as found:
            for each in found:
                try:
                    total += each.stat().st_size
                except FileNotFoundError:  # renamed meanwhile
                    continue
    except FileNotFoundError:
        return 0
    return total

"""What is read of a repository of the hub: headers by range requests, or the whole model into the hub's cache."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from moekern import files
from moekern.checkpoint.folder import (
    CONFIG,
    INDEX,
    PLAN_FILE,
    WEIGHTS,
    Checkpoint,
    check_weight_map,
    join_shards,
    open_checkpoint,
    read_index,
    sampled,
)
from moekern.checkpoint.header import Shard, TensorEntry, header_length, parse_header
from moekern.checkpoint.hub import Progress, Repository, Step, Tell, asking, broken_off, snapshot_of, wanted
from moekern.checkpoint.strict_json import HEADER_CAP, read_start
from moekern.errors import InputError

THREADS, TRIES = 16, 4
QUERY: Any = {"timeout": 30, "follow_redirects": True, "retry_on_exceptions": ()}
SAMPLES = "samples.bin"  # the bytes that the fingerprint looks at, one after another
MARGIN = 1 << 30  # bytes of the disk that a download leaves free

A = TypeVar("A")
B = TypeVar("B")


def headers_of(repository: Repository, progress: Progress) -> Checkpoint:
    """A checkpoint of which config, index, headers and the fingerprint's samples alone are read, by range requests.

    They are kept by commit in HF_HOME/moekern, where a shard's file ends with its header, so that the next command
    asks for none of them; there they are checked as any file is. Reading other bytes raises InputError. A download that
    has all shards is read instead.
    """
    snapshot = snapshot_of(repository)
    if snapshot is not None:
        return open_checkpoint(snapshot)
    folder, sizes = repository.folder, repository.sizes
    if CONFIG not in sizes:
        raise InputError(f"{repository}: holds no {CONFIG}: not a checkpoint that moekern reads")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, INDEX, PLAN_FILE):
        if name in sizes and not (folder / name).exists():
            _check_size(repository, name)
            files.write_bytes(folder / name, read_range(repository, name, 0, sizes[name]))
    index = read_index(folder)
    shards = (
        {name for name in sizes if "/" not in name and name.endswith((*WEIGHTS, ".index.json"))}
        if index is None
        else {*check_weight_map(folder, index).values()} & sizes.keys()
    )
    for name in shards:  # so that the folder's rules see what the repository has
        (folder / name).touch()
    with progress(f"reading headers of {repository.id}", "files") as step:
        found = join_shards(folder, lambda paths: _shards(repository, paths, step))
    return replace(found, read_data=_sample_reader(repository, found))


def _check_size(repository: Repository, name: str) -> None:
    if repository.sizes[name] > HEADER_CAP:
        raise InputError(f"{repository}: {name}: {repository.sizes[name]} bytes, more than the limit of {HEADER_CAP}")


def _shards(repository: Repository, paths: Sequence[Path], step: Step) -> Iterator[Shard]:
    """Every shard's header, fetched where it is not kept yet; several are fetched at a time, and one is parsed."""
    for done, path in enumerate(_in_parallel(lambda path: _kept_header(repository, path), paths), 1):
        size = repository.sizes[path.name]
        try:
            length = header_length(read_start(path, 8)[0], path, size)
            yield parse_header(read_start(path, 8, length)[1], path, size)
        except InputError:
            os.truncate(path, 0)
            raise
        step(done, len(paths))


def _kept_header(repository: Repository, path: Path) -> Path:
    """The file that holds a shard's header and nothing else, by two requests if it does not yet."""
    if path.stat().st_size == 0:
        size = repository.sizes[path.name]
        start = read_range(repository, path.name, 0, min(8, size))
        files.write_bytes(path, start + read_range(repository, path.name, 8, header_length(start, path, size)))
    return path


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
    """Reads what the fingerprint looks at, and refuses the rest; all of it is fetched when the first is asked for."""
    held: dict[tuple[str, int, int], bytes] = {}

    def read(path: Path, entry: TensorEntry, start: int, size: int) -> bytes:
        if not held:
            held.update(_samples(repository, checkpoint))
        if (entry.name, start, size) not in held:
            raise InputError(f"{repository}: {entry.name}: only headers were read; its weights were not downloaded")
        return held[entry.name, start, size]

    return read


def _samples(repository: Repository, checkpoint: Checkpoint) -> Iterable[tuple[tuple[str, int, int], bytes]]:
    places, path = sampled(checkpoint.tensors), repository.folder / SAMPLES
    total = sum(size for _, _, size in places)
    if not path.is_file() or path.stat().st_size != total:
        parts = _in_parallel(lambda place: read_range(repository, place[0].shard, *place[1:]), places)
        files.write_bytes(path, b"".join(parts))
    data = path.read_bytes()
    at = 0
    for entry, start, size in places:
        yield (entry.name, start, size), data[at : at + size]
        at += size


def read_range(repository: Repository, name: str, start: int, size: int) -> bytes:
    """Bytes of a file of the repository: no more are received, whatever the server sends. Raises InputError."""
    if size == 0:
        return b""
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

    `checkpoint` has the repository's headers. Before a weight is asked for, the size is told, and refused where the
    disk has no room for it. Files that an earlier download has finished are not asked for again.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    cache, commit = Path(constants.HF_HUB_CACHE), repository.commit
    names = wanted(repository.sizes, [shard.name for shard in checkpoint.shards])
    with asking(repository.id, revision), _no_bars():
        # By the revision's name, which the cache then knows when the hub is away.
        hf_hub_download(repository.id, CONFIG, revision=revision)
        snapshot = Path(hf_hub_download(repository.id, CONFIG, revision=commit)).parent
        missing = [name for name in names if not (snapshot / name).exists()]
        size = sum(repository.sizes[name] for name in missing)
        free = shutil.disk_usage(cache).free
        line = f"{repository}: {_gib(size)} to download in {len(missing)} files; {_gib(free)} free in {cache}"
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


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 28 else f"{size / 2**20:.1f} MiB"

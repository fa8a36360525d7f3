"""The extension's copier: pieces into a file, holes, checksums, errors, signals."""

import os
import random
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekern import _C
from tests.helpers.digest import xxh3

MiB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """24 MiB, a third of it holes where the file system has them."""
    path = tmp_path / "source"
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(4):
            file.write(rng.bytes(4 * MiB + 123))
            file.seek(2 * MiB - 123, os.SEEK_CUR)
        file.truncate(24 * MiB)
    return path


def random_pieces(rng: random.Random, source: Path) -> tuple[list[Any], bytes, list[tuple[int, int]]]:
    """Pieces, the file they make, and a span for each."""
    data = source.read_bytes()
    pieces: list[Any] = []
    spans, want = [], b""
    for _ in range(rng.randrange(1, 10)):
        kind = rng.random()
        if kind < 0.5:
            part = rng.randbytes(rng.choice([0, 1, 100, 5 * MiB]))
            pieces.append(part if kind < 0.25 else ("made", len(part), lambda part=part: memoryview(part)))
        else:
            start = rng.randrange(len(data))
            part = data[start : start + rng.choice([0, 1, 4096, rng.randrange(len(data))])]
            pieces.append((str(source), start, len(part)))
        spans.append((len(want), len(want) + len(part)))
        want += part
    return pieces, want, spans


@pytest.mark.parametrize("copy", ["stream", "kernel"])
def test_pieces_become_the_file(copy: str, source: Path, tmp_path: Path) -> None:
    rng = random.Random(copy)
    for trial in range(12):
        pieces, want, spans = random_pieces(rng, source)
        out, seen = tmp_path / f"out{trial}", []
        cloned, holes, copied, digests = _C.write_file(str(out), pieces, spans, copy, seen.append)
        assert out.read_bytes() == want
        assert (cloned, cloned + holes + copied) == (0, len(want))
        assert seen == sorted(seen)
        assert seen[-1] == len(want)
        for piece, (start, stop), digest in zip(pieces, spans, digests, strict=True):
            if digest is not None:
                assert digest == xxh3(want[start:stop])
                continue
            assert not isinstance(piece, bytes), "it passes through memory"
            assert not callable(piece[2]), "it passes through memory"
            if copy == "stream":
                assert b"\0" in want[start:stop], "only bytes of a hole go without a checksum"


@pytest.mark.parametrize("copy", ["stream", "kernel"])
def test_columns_of_matrices(copy: str, source: Path, tmp_path: Path) -> None:
    """Of every size, rows longer than the window, matrices longer than a chunk; from whole blocks on ranges."""
    data, rng = np.fromfile(source, np.uint8), np.random.default_rng(7)
    shapes = [
        (1, 24, 1), (3001, 769, 1), (2111, 1027, 2), (1030, 777, 4), (5, 13, 3), (700, 45, 24), (1, 7, 3000),
        (2, 3_000_001, 1), (3, 700_001, 4), (1, 900, 4096), (2, 33, 5000), (24, 1, 2),
    ]  # fmt: skip
    pieces: list[Any] = [b"head"]
    want, spans = [np.frombuffer(b"head", np.uint8)], [(0, 4)]
    for number, (rows, width, size) in enumerate(shapes):
        share = (0.5, 0.02, 1.0)[number % 3]
        kept = np.flatnonzero(rng.random(width) < share) if width > 1 else np.arange(1)
        kept = kept if len(kept) else np.array([width - 1])
        offset = int(rng.integers(len(data) - rows * width * size + 1))
        pieces.append((str(source), offset, rows, width, size, kept.astype(np.int64).tobytes()))
        own = data[offset : offset + rows * width * size].reshape(rows, width, size)
        want.append(own[:, kept].ravel())
        spans.append((spans[-1][1], spans[-1][1] + want[-1].size))
    _, holes, copied, digests = _C.write_file(str(tmp_path / "out"), pieces, spans, copy)
    assert np.array_equal(np.fromfile(tmp_path / "out", np.uint8), np.concatenate(want))
    assert holes + copied == spans[-1][1]
    for piece, own, digest in zip(pieces, want, digests, strict=True):
        if piece == b"head" or piece[4] < 4096:
            assert digest == xxh3(own.tobytes())


def test_holes_stay_holes(source: Path, tmp_path: Path) -> None:
    if source.stat().st_blocks * 512 >= 24 * MiB:
        pytest.skip("this file system has no holes")
    for copy in ("stream", "kernel"):
        out = tmp_path / copy
        _, holes, _, _ = _C.write_file(str(out), [b"x" * 5000, (str(source), 0, 24 * MiB)], (), copy)
        assert holes > 7 * MiB
        assert out.stat().st_blocks * 512 < 18 * MiB
        assert out.read_bytes() == b"x" * 5000 + source.read_bytes()


def test_spans_may_leave_gaps_and_cross_pieces(tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(9 * MiB)
    source = tmp_path / "source"
    source.write_bytes(data)
    spans = [(0, 0), (5, 3 * MiB), (3 * MiB, 8 * MiB + 1), (9 * MiB - 1, 9 * MiB), (9 * MiB, 9 * MiB)]
    pieces = [(str(source), 0, 4 * MiB), data[4 * MiB : 5 * MiB], (str(source), 5 * MiB, 4 * MiB)]
    *_, digests = _C.write_file(str(tmp_path / "out"), pieces, spans)
    assert digests == [xxh3(data[start:stop]) for start, stop in spans]


class Watched(bytearray):
    """Bytes that a weak reference tells to be gone."""


@pytest.mark.parametrize("copy", ["stream", "kernel"])
@pytest.mark.parametrize("between", [b"", b"ab"])
def test_made_pieces_are_made_in_turn_and_never_held_together(tmp_path: Path, copy: str, between: bytes) -> None:
    """Sizes below, at and above the ring's chunks (4 MiB) and the kernel's (64 MiB)."""
    held: list[weakref.ref[Watched]] = []
    path, sizes = tmp_path / "out", [3, 64 * MiB, 65 * MiB + 1, 4 * MiB, 1]
    pieces: list[Any] = [b"head"]
    for number, size in enumerate(sizes):

        def make(number: int = number, size: int = size) -> Watched:
            assert [made() for made in held] == [None] * number, "what was made before is held"
            made = Watched(bytes([65 + number]) * size)
            held.append(weakref.ref(made))
            return made

        pieces += [("made", size, make), between]
    _C.write_file(str(path), pieces, (), copy)
    assert len(held) == 5
    assert [made() for made in held] == [None] * 5
    assert path.read_bytes() == b"head" + b"".join(bytes([65 + i]) * size + between for i, size in enumerate(sizes))


def test_ctrl_c_is_heard_by_what_makes_a_piece(tmp_path: Path) -> None:
    def make() -> bytes:
        signal.raise_signal(signal.SIGINT)
        return b"x"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _C.write_file(str(tmp_path / "out"), [("made", 1, make)])
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"0123456789")
    path = str(tmp_path / "out")
    _C.write_file(path, [b"ab", (str(source), 3, 4), b"", (str(source), 0, 0), (str(source), 9, 1)])
    assert Path(path).read_bytes() == b"ab34569"
    with pytest.raises(FileExistsError, match="File exists"):
        _C.write_file(path, [])
    for pieces, error, message in (
        ([(str(source), 5, 6)], OSError, "ends at byte 10, more was expected"),
        ([(str(source), 20, 6)], OSError, "ends at byte 10, more was expected"),
        ([(str(tmp_path / "none"), 0, 1)], FileNotFoundError, "none"),
        ([(str(source), -1, 2)], ValueError, r"\[write_file\] pieces: expected offset and length >= 0"),
        ([(str(source), 1)], TypeError, r"\[write_file\] pieces: expected bytes, \(path, offset, length\), "),
        *[
            (
                [(str(source), 0, 2, 5, 1, np.array(kept, np.int64).tobytes() + more)],
                ValueError,
                "expected columns that",
            )
            for kept, more in (([], b""), ([3, 1], b""), ([1, 1], b""), ([-1, 1], b""), ([1, 5], b""), ([1], b"x"))
        ],
        ([(str(source), 6, 2, 5, 1, np.array([0]).tobytes())], OSError, "ends at byte 10, more was expected"),
        (["text"], TypeError, r"\[write_file\] pieces"),
        ([b"x", ("made", 5, lambda: b"1234")], ValueError, r"\[write_file\] pieces: expected 5 bytes .*, got 4"),
        ([b"x", ("made", 5, lambda: "12345")], TypeError, "bytes-like"),
        ([b"x", ("made", 5, lambda: 1 // 0)], ZeroDivisionError, "zero"),
        ([b"x", ("made", -5, lambda: b"")], ValueError, r"\[write_file\] pieces: expected length >= 0"),
    ):
        for copy in ("stream", "kernel"):
            Path(path).unlink(missing_ok=True)
            with pytest.raises(error, match=message):
                _C.write_file(path, pieces, (), copy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[write_file\] copy: expected stream, kernel, .* got magic"):
        _C.write_file(path, [], (), "magic")
    with pytest.raises(ValueError, match=r"\[write_file\] spans: expected rising, disjoint spans"):
        _C.write_file(path, [], [(0, 2), (1, 3)])


def test_the_mode_honours_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _C.write_file(str(tmp_path / "out"), [b"x"])
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_ctrl_c_is_heard_while_c_writes(tmp_path: Path) -> None:
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    block = bytes(8 * MiB)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(KeyboardInterrupt):
            _C.write_file(str(tmp_path / "out"), [block] * 400)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "out").stat().st_blocks * 512 < 400 * len(block)


def test_what_progress_raises_ends_the_writing(tmp_path: Path) -> None:
    def refuse(done: int) -> None:
        raise RuntimeError("enough")

    for copy in ("stream", "kernel"):
        with pytest.raises(RuntimeError, match="enough"):
            _C.write_file(str(tmp_path / copy), [bytes(MiB)] * 100, (), copy, refuse)


def test_a_probe_leaves_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert _C.probe_copy(str(source), str(tmp_path / "there")) in ("reflink", "kernel", "stream")
    assert list((tmp_path / "there").iterdir()) == []
    with pytest.raises(FileNotFoundError):
        _C.probe_copy(str(source), str(tmp_path / "none"))

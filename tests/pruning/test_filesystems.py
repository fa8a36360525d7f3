"""Real file systems: blocks shared where they can be, holes kept, what cannot be written refused before it begins."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekern import _C
from moekern.plan.document import Plan
from tests.helpers.faulty import Bench, Ended, Snapshot, benches, checkpoint, finished, snapshot
from tests.helpers.mounts import MIB, disk_bytes, mounted, shared_bytes, used
from tests.helpers.refitted import computed, refit
from tests.helpers.synthetic import read

BLOCK = 4096
SIZES = {"xfs": 320 * MIB, "btrfs": 256 * MIB, "ext4": 64 * MIB, "tmpfs": 64 * MIB}
NOBODY = 65534


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Tensors of 20 KB: some blocks of each can be shared. The server's folder is for everybody to read."""
    with benches(tmp_path_factory.mktemp("filesystems"), rows=2500) as made:
        yield made


def moved(bench: Bench, folder: Path) -> Bench:
    """The bench with its source and results in another folder."""
    folder.mkdir()
    (folder / "runs").mkdir()
    shutil.copytree(bench.source, folder / "model")
    return Bench(bench.server, folder / "model", bench.plan, folder / "runs")


def shards(found: Snapshot) -> Snapshot:
    return {name: entry for name, entry in found.items() if name != "moekern_manifest.jsonl"}


def report(ended: Ended) -> dict[str, Any]:
    """What --json printed."""
    assert ended.code == 0, ended.said
    document: dict[str, Any] = json.loads(ended.said[ended.said.index("{\n") :].partition("\n}\n")[0] + "}")
    return document


@pytest.mark.parametrize("beside", [True, False], ids=["beside the source", "elsewhere"])
def test_blocks_are_shared_with_the_source_and_what_is_refitted(bench: Bench, tmp_path: Path, beside: bool) -> None:
    with mounted("xfs", SIZES["xfs"]) as point:
        here = moved(bench, point / "x")
        folder = (point if beside else tmp_path) / "refit"
        plan = refit(here.source, Plan.load(here.plan), folder)
        plan.save(point / "refitted.json")
        here = replace(here, plan=point / "refitted.json")
        out = here.fresh()
        told = report(here.prune(out, "--refitted", str(folder), "--json"))
        assert told["cloned"] > told["bytes_out"] / 4
        new = computed(folder)
        assert {name: tensor for name, tensor in read(out).items() if name in new} == new
        ended = here.prune(here.fresh(), "--refitted", str(folder), "--copy", "reflink")
        assert ended.code == (0 if beside else 2), ended.said
        assert beside or f"cannot share blocks with {folder}" in ended.line


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_blocks_are_shared(bench: Bench, kind: str) -> None:
    want = bench.want()
    with mounted(kind, SIZES[kind]) as point:
        here = moved(bench, point / "x")
        for copy in ("reflink", "auto"):
            out = here.fresh()
            before = used(point)
            told = report(here.prune(out, "--copy", copy, "--json"))
            files = sorted(out.glob("*.safetensors"))
            size = sum(path.stat().st_size for path in files)
            assert told["cloned"] + told["copied"] + told["holes"] == size
            # A range of 20,000 bytes has 3 whole blocks or 4; the rest of it cannot be shared. Headers move the phase
            # of a few tensors, so half of all bytes is far below what must be shared, and far above none.
            assert told["cloned"] > size / 2
            assert sum(map(shared_bytes, files)) == told["cloned"]
            # Besides the shared blocks: a head and a tail for each tensor, side files, a MiB of the system's own trees.
            tensors = told["tensors_out"]
            assert used(point) - before <= size - told["cloned"] + 2 * BLOCK * tensors + MIB
            assert shards(finished(out)) == shards(want)
        assert snapshot(here.source) == snapshot(bench.source)


def test_rows_of_whole_blocks_are_shared_where_a_matrix_loses_others() -> None:
    with mounted("xfs", SIZES["xfs"]) as point:
        data, kept = np.random.default_rng(0).integers(0, 256, 302 * BLOCK, np.uint8), np.arange(0, 300, 3)
        data.tofile(point / "source")
        piece = (str(point / "source"), 2 * BLOCK, 1, 300, BLOCK, kept.tobytes())
        for head, cloned in ((bytes(BLOCK), 100 * BLOCK), (bytes(100), 0)):
            out = point / f"out{len(head)}"
            made = _C.write_file(str(out), [head, piece], (), "reflink_or_stream")
            assert out.read_bytes() == head + data.reshape(-1, BLOCK)[2 + kept].tobytes()
            assert made[0] == cloned


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_shared_blocks_are_copies(bench: Bench, kind: str) -> None:
    """Writing to the result does not reach the source."""
    with mounted(kind, SIZES[kind]) as point:
        here = moved(bench, point / "x")
        out = here.fresh()
        assert here.prune(out, "--copy", "reflink").code == 0
        for path in out.glob("*.safetensors"):
            path.write_bytes(bytes(path.stat().st_size))
        assert snapshot(here.source) == snapshot(bench.source)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
@pytest.mark.parametrize("companions", ["odd", "gptq", "nvfp4"])
def test_tensors_that_lie_oddly(bench: Bench, tmp_path: Path, kind: str, companions: str) -> None:
    """Tensors of 15,015 bytes or of several sizes: the phases of source and output differ for most of them."""
    checkpoint(tmp_path / "model", companions=companions, rows=3003)
    (tmp_path / "runs").mkdir()
    plain = Bench(bench.server, tmp_path / "model", bench.plan, tmp_path / "runs")
    want = plain.want("--copy", "stream")
    with mounted(kind, SIZES[kind]) as point:
        here = moved(plain, point / "x")
        for copy in ("reflink", "auto", "kernel", "stream"):
            assert shards(here.want("--copy", copy)) == shards(want)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_kills_while_blocks_are_shared(bench: Bench, kind: str) -> None:
    with mounted(kind, SIZES[kind]) as point:
        here = moved(bench, point / "x")
        want = here.want("--copy", "reflink")
        for k in (1, 2, 5, 9):
            out = here.fresh()
            assert here.prune(out, "--copy", "reflink", rules=f"clone:{k}:KILL").code == -9
            assert here.prune(out, "--copy", "reflink").code == 0
            assert finished(out) == want


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_sharing_that_fails(bench: Bench, error: str) -> None:
    with mounted("xfs", SIZES["xfs"]) as point:
        here = moved(bench, point / "x")
        want = here.want("--copy", "reflink")
        for k in (1, 2, 7):
            out = here.fresh()
            ended = here.prune(out, "--copy", "reflink", rules=f"clone:{k}:{error}")
            assert ended.code == 2
            assert str(out.parent) in ended.line
            assert not out.exists()
            assert here.prune(out, "--copy", "reflink").code == 0
            assert finished(out) == want


def test_blocks_are_not_shared_between_file_systems(bench: Bench) -> None:
    want = bench.want("--copy", "stream")
    with mounted("xfs", SIZES["xfs"]) as one, mounted("xfs", SIZES["xfs"]) as other:
        here = moved(bench, one / "x")
        (other / "x").mkdir()
        out = other / "x/out"
        ended = here.prune(out, "--copy", "reflink")
        assert ended.code == 2
        assert "--copy reflink" in ended.line
        assert os.listdir(other / "x") == []
        told = report(here.prune(out, "--copy", "auto", "--json"))
        assert told["cloned"] == 0
        assert shards(finished(out)) == shards(want)


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_blocks_are_not_shared_where_the_file_system_cannot(bench: Bench, kind: str) -> None:
    with mounted(kind, SIZES[kind]) as point:
        here = moved(bench, point / "x")
        out = here.fresh()
        ended = here.prune(out, "--copy", "reflink")
        assert ended.code == 2
        assert "--copy reflink" in ended.line
        assert os.listdir(out.parent) == []
        assert shards(here.want("--copy", "auto")) == shards(bench.want())


def sparse(bench: Bench, folder: Path) -> Bench:
    """The bench with shards in which every second MiB is a hole, and one that is a hole from its header on."""
    checkpoint(folder / "model", rows=131072, embedding=1000, shards=4)  # tensors of 1 MiB
    files = sorted((folder / "model").glob("*.safetensors"))
    for path in files:
        data = path.read_bytes()
        with path.open("wb") as file:
            file.truncate(len(data))
            for at in range(0, len(data), 2 * MIB):
                os.pwrite(file.fileno(), data[at : at + MIB], at)
    size = files[-1].stat().st_size
    os.truncate(files[-1], MIB)
    os.truncate(files[-1], size)
    (folder / "runs").mkdir()
    return Bench(bench.server, folder / "model", bench.plan, folder / "runs")


@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "xfs"])
def test_holes_stay_holes(bench: Bench, kind: str) -> None:
    with mounted(kind, 320 * MIB) as point:
        (point / "x").mkdir()
        here = sparse(bench, point / "x")
        want = None
        for copy in ("stream", "kernel", "auto"):
            out = here.fresh()
            told = report(here.prune(out, "--copy", copy, "--json"))
            for path in out.glob("*.safetensors"):
                data, size = path.read_bytes(), path.stat().st_size
                zeros = sum(not any(data[at : at + MIB // 16]) for at in range(0, size, MIB // 16)) * MIB // 16
                # A stretch of 64 KiB of zeros that does not begin at a block takes one more block at its end.
                assert disk_bytes(path) <= size - zeros * 3 // 4 + MIB, path
            if copy != "auto":
                assert told["cloned"] == 0
                assert told["holes"] > told["copied"] / 2
            found = shards(finished(out))
            want = want or found
            assert found == want


def test_too_few_inodes(bench: Bench) -> None:
    """A file system with room for the bytes but not for the names."""
    with mounted("ext4", 32 * MIB, "-q", "-N", "64") as point:
        (point / "x").mkdir()
        with contextlib.suppress(OSError):
            for i in range(100):
                (point / f"file-{i}").touch()
        for i in range(6):
            (point / f"file-{i}").unlink()
        out = point / "x/out"
        ended = bench.prune(out)
        assert ended.code == 2
        assert "files" in ended.line
        assert os.listdir(out.parent) == []
        for path in point.glob("file-*"):
            path.unlink()
        assert bench.prune(out).code == 0
        assert finished(out) == bench.want()


def test_too_little_room(bench: Bench) -> None:
    with mounted("tmpfs", MIB // 2) as point:
        (point / "x").mkdir()
        ended = bench.prune(point / "x/out")
        assert ended.code == 2
        assert "free" in ended.line
        assert os.listdir(point / "x") == []


def test_a_file_system_that_is_read_only(bench: Bench) -> None:
    with mounted("tmpfs", MIB, mount=["ro"]) as point:
        ended = bench.server.run("prune", bench.source, bench.plan, "--out", point / "out")
        assert ended.code == 2
        assert str(point) in ended.line
        assert "read-only" in ended.line.lower() or "permission" in ended.line


@pytest.fixture
def anybody(bench: Bench) -> Iterator[Bench]:
    """The bench in a folder that everybody may enter, on a file system of its own."""
    with mounted("tmpfs", 32 * MIB) as point:
        point.parent.chmod(0o755)
        here = moved(bench, point / "x")
        plan = Path(shutil.copy(bench.plan, point))
        here.folder.chmod(0o777)
        yield Bench(bench.server, here.source, plan, here.folder)


def test_no_permission(anybody: Bench) -> None:
    out = anybody.fresh()  # its folder belongs to root, for nobody else
    ended = anybody.prune(out, uid=NOBODY)
    assert ended.code == 2
    assert "ermission" in ended.line
    out.parent.chmod(0o755)
    assert "ermission" in anybody.prune(out, uid=NOBODY).line
    assert os.listdir(out.parent) == []
    out.parent.chmod(0o777)
    assert anybody.prune(out, uid=NOBODY).code == 0
    assert {path.lstat().st_uid for path in [out, *out.rglob("*")]} == {NOBODY}


def test_a_source_that_may_not_be_read(anybody: Bench) -> None:
    out = anybody.fresh()
    out.parent.chmod(0o777)
    shard = anybody.source / "model-00003-of-00008.safetensors"
    shard.chmod(0)
    ended = anybody.prune(out, uid=NOBODY)
    assert ended.code == 2
    assert shard.name in ended.line
    assert "Permission denied" in ended.line
    assert os.listdir(out.parent) == []


def test_a_work_folder_of_somebody_else(anybody: Bench) -> None:
    out = anybody.fresh()
    out.parent.chmod(0o777)
    assert anybody.prune(out, rules="open@model-00005:1:KILL").code == -9
    ended = anybody.prune(out, uid=NOBODY)
    assert ended.code == 2
    assert "ermission" in ended.line
    assert not out.exists()
    assert anybody.prune(out).code == 0


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o000])
def test_the_umask_is_honoured(bench: Bench, umask: int) -> None:
    out = bench.fresh()
    killed = bench.prune(out, umask=umask, rules="open@model-00005:1:KILL")
    assert killed.code == -9
    assert bench.prune(out, umask=umask).code == 0
    for name, (mode, content) in finished(out).items():
        assert mode & 0o777 == (0o666 if content is not None else 0o777) & ~umask, name

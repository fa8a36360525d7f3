"""Prune options of the engine: parts, new shards, checksums, locks, what an earlier run left."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest

from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.files import work_path
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning import copying
from moekern.pruning.prune import MANIFEST, prune
from moekern.pruning.shards import BLOCK
from moekern.team import Part
from moekern.verification.tensors import verify
from tests.helpers.digest import xxh3
from tests.helpers.synthetic import qwen3, read, tree, write

KEEP = {"0": (0, 2, 3, 7), "1": (1, 4, 5, 6)}
PLAN = Plan({key: LayerPlan(kept) for key, kept in KEEP.items()}, {"criterion": "test"})
OTHER = Plan({key: LayerPlan((0, 1, 2, 3)) for key in KEEP}, {"criterion": "test"})


class Enough(Exception):
    pass


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in", *qwen3("fp8_block"), shards=5)


def stopped(source: Path, out: Path, share: float, plan: Plan = PLAN, **options: Any) -> None:
    """A run that ends when a share of the bytes is written."""

    def stop(done: int, total: int) -> None:
        if done > share * total:
            raise Enough

    with pytest.raises(Enough):
        prune(source, plan, out, progress=stop, **options)


def test_parts_give_the_bytes_of_one_process(source: Path, tmp_path: Path) -> None:
    prune(source, PLAN, tmp_path / "whole")
    reports = [prune(source, PLAN, tmp_path / "out", part=Part(i, 3)) for i in (2, 3, 1)]
    assert [report.finished for report in reports] == [False, False, True]
    whole = len(list((tmp_path / "whole").glob("*.safetensors")))
    assert whole > reports[0].waiting > reports[1].waiting > reports[2].waiting == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not work_path(tmp_path / "out").exists()


def test_more_parts_than_shards(source: Path, tmp_path: Path) -> None:
    prune(source, PLAN, tmp_path / "whole")
    reports = [prune(source, PLAN, tmp_path / "out", part=Part(i, 9)) for i in range(9, 0, -1)]
    assert [report.finished for report in reports] == [False] * 8 + [True]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_run_without_part_finishes_what_parts_began(source: Path, tmp_path: Path) -> None:
    prune(source, PLAN, tmp_path / "whole")
    prune(source, PLAN, tmp_path / "out", part=Part(1, 2))
    report = prune(source, PLAN, tmp_path / "out")
    assert report.finished
    assert 0 < report.reused < report.bytes_out
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_parts_run_side_by_side(source: Path, tmp_path: Path) -> None:
    prune(source, PLAN, tmp_path / "whole")
    PLAN.save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "moekern", "prune", str(source), "plan.json", "--out", "out", "--json"]
    torchrun = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "3"}
    started = [
        subprocess.Popen(command, cwd=tmp_path, env={**torchrun, "RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(3)
    ]
    reports = [json.loads(process.communicate(timeout=120)[0]) for process in started]
    assert sorted(report["finished"] for report in reports) == [False, False, True]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_part_that_makes_no_sense(text: str) -> None:
    with pytest.raises(InputError, match=f"--part {text}: expected I/N"):
        Part.parse(text)


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("x", "2"), ("", "2"), ("0", "0"), ("0", "1.5")])
def test_a_rank_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, rank: str, size: str) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"RANK={rank} and WORLD_SIZE={size} are no rank"):
        Part.of_torchrun()


def test_a_stopped_run_goes_on(source: Path, tmp_path: Path) -> None:
    prune(source, PLAN, tmp_path / "whole")
    stopped(source, tmp_path / "out", 0.6)
    assert not (tmp_path / "out").exists()
    done = sorted((work_path(tmp_path / "out") / "checkpoint").glob("model*.safetensors"))
    before = {path: path.stat().st_ino for path in done}
    assert done
    stopped(source, tmp_path / "out", 0.9)
    assert {path: path.stat().st_ino for path in done} == before, "what was done is not written again"
    report = prune(source, PLAN, tmp_path / "out")
    assert report.reused >= sum((tmp_path / "out" / path.name).stat().st_size for path in done)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_another_plan_takes_nothing_from_what_is_there(source: Path, tmp_path: Path) -> None:
    prune(source, PLAN, tmp_path / "whole")
    stopped(source, tmp_path / "out", 0.8)
    stopped(source, tmp_path / "out", 0.8, plan=OTHER)
    report = prune(source, PLAN, tmp_path / "out")
    assert report.reused == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_source_that_was_touched_is_copied_again(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "out", 0.8)
    for path in source.glob("*.safetensors"):
        os.utime(path, ns=(1, 1))
    assert prune(source, PLAN, tmp_path / "out").reused == 0


def test_a_source_that_changes_meanwhile_is_refused(source: Path, tmp_path: Path) -> None:
    first = sorted(source.glob("*.safetensors"))[0]
    with pytest.raises(InputError, match=f"{first.name} in {source} changed while it was copied"):
        prune(source, PLAN, tmp_path / "out", progress=lambda done, total: os.utime(first, ns=(done, done)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["*.safetensors", "notes.txt"])
def test_a_pipe_in_the_place_of_a_source_file_is_not_waited_for(source: Path, tmp_path: Path, name: str) -> None:
    (source / "notes.txt").write_text("a side file\n")
    path = sorted(source.glob(name))[-1]

    def swap(done: int, total: int) -> None:
        if path.is_file():
            path.unlink()
            os.mkfifo(path)

    with pytest.raises(InputError, match=f"{path.name} in {source} changed while it was copied"):
        prune(source, PLAN, tmp_path / "out", progress=swap)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tail", [b"garbage\n", b'{"shard": 1}\n', b"[]\n", b"\xff\xfe\n", b'{"shard": "model-0000'])
def test_a_spoiled_manifest_proves_less(source: Path, tmp_path: Path, tail: bytes) -> None:
    prune(source, PLAN, tmp_path / "whole")
    stopped(source, tmp_path / "out", 0.8)
    manifest = work_path(tmp_path / "out") / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    assert len(lines) > 1
    manifest.write_bytes(b"".join(lines[:-1]) + tail)
    report = prune(source, PLAN, tmp_path / "out")
    assert report.reused > 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_shard_of_another_size_or_time_is_written_again(source: Path, tmp_path: Path) -> None:
    prune(source, PLAN, tmp_path / "whole")
    stopped(source, tmp_path / "out", 0.9)
    first, second = sorted((work_path(tmp_path / "out") / "checkpoint").glob("model*.safetensors"))[:2]
    os.truncate(first, first.stat().st_size - 1)
    second.write_bytes(bytes(second.stat().st_size))
    prune(source, PLAN, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_only_one_process_writes_an_output(source: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def again(done: int, total: int) -> None:
        for part in (None, Part(1, 2)):
            with pytest.raises(InputError) as error:
                prune(source, PLAN, tmp_path / "out", part=part)
            refused.append(str(error.value))
        raise Enough

    patience, workfolder = 0.2, sys.modules["moekern.pruning.work_folder"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workfolder, "PATIENCE", patience)
        with pytest.raises(Enough):
            prune(source, PLAN, tmp_path / "out", progress=again)
    assert len(refused) == 2
    assert all(line.startswith(f"{tmp_path / 'out'}: another process is writing it, in ") for line in refused)


def test_only_one_process_writes_a_part(source: Path, tmp_path: Path) -> None:
    def again(done: int, total: int) -> None:
        with pytest.raises(InputError, match="--part 1/2: another process is writing this part of"):
            prune(source, PLAN, tmp_path / "out", part=Part(1, 2))
        with pytest.raises(InputError, match="--part 1/3: 1-of-2 of .* is being written"):
            prune(source, PLAN, tmp_path / "out", part=Part(1, 3))
        raise Enough

    with pytest.raises(Enough):
        prune(source, PLAN, tmp_path / "out", part=Part(1, 2), progress=again)


def test_what_a_kill_after_the_commit_leaves_goes(source: Path, tmp_path: Path) -> None:
    prune(source, PLAN, tmp_path / "out")
    work_path(tmp_path / "out").mkdir()
    (work_path(tmp_path / "out") / "manifest.jsonl").write_text("")
    with pytest.raises(InputError, match="exists already"):
        prune(source, PLAN, tmp_path / "out")
    assert not work_path(tmp_path / "out").exists()


def test_a_target_that_appears_meanwhile_is_kept(source: Path, tmp_path: Path) -> None:
    def make(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(InputError, match="exists already"):
        prune(source, PLAN, tmp_path / "out", progress=make)
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out").rmdir()
    assert prune(source, PLAN, tmp_path / "out").reused > 0


def manifest_of(folder: Path) -> dict[str, str | None]:
    lines = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    assert [line["shard"] for line in lines] == sorted(path.name for path in folder.glob("*.safetensors"))
    assert all(line["size"] == (folder / line["shard"]).stat().st_size for line in lines)
    return {name: digest for line in lines for name, digest in line["tensors"].items()}


def test_checksums(source: Path, tmp_path: Path) -> None:
    for name, options in {
        "default": {},
        "reread": {"reread": True},
        "kernel": {"copy": "kernel"},
        "kernel_reread": {"copy": "kernel", "reread": True},
        "blake3": {"checksum": "blake3"},
        "none": {"checksum": "none"},
    }.items():
        prune(source, PLAN, tmp_path / name, **options)  # type: ignore[arg-type]
    tensors = {name: raw for name, (_, _, raw) in read(tmp_path / "default").items()}
    want = {name: xxh3(raw).hex() for name, raw in tensors.items()}
    assert manifest_of(tmp_path / "default") == want
    assert manifest_of(tmp_path / "reread") == want
    assert manifest_of(tmp_path / "kernel_reread") == want
    assert manifest_of(tmp_path / "kernel") == dict.fromkeys(want)
    assert manifest_of(tmp_path / "none") == dict.fromkeys(want)
    assert manifest_of(tmp_path / "blake3") == {n: blake3.blake3(raw).hexdigest() for n, raw in tensors.items()}


def test_a_disk_that_gives_back_other_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file = copying._C.write_file

    def faulty(path: str, *arguments: Any) -> Any:
        made = write_file(path, *arguments)
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        return made

    monkeypatch.setattr(copying._C, "write_file", faulty)
    with pytest.raises(InputError, match="the disk gives back other bytes than were written; it is faulty"):
        prune(source, PLAN, tmp_path / "out", reread=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [1, 2000, 6000, 1 << 30])
def test_shards_made_anew(source: Path, tmp_path: Path, limit: int) -> None:
    prune(source, PLAN, tmp_path / "whole")
    report = prune(source, PLAN, tmp_path / "out", max_shard_size=limit)
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    assert verify(source, PLAN, tmp_path / "out").problems == ()
    checkpoint = open_checkpoint(tmp_path / "out")
    homes: dict[str, set[str]] = {}
    for shard in checkpoint.shards:
        experts = {entry.name.rsplit(".", 2)[0] for entry in shard.tensors if ".experts." in entry.name}
        for expert in experts:
            homes.setdefault(expert, set()).add(shard.name)
        assert shard.size - shard.data_start <= limit or len(experts) == 1 or len(shard.tensors) == 1
    assert all(len(home) == 1 for home in homes.values()), "an expert's tensors stay together"
    assert report.shards_out == len(checkpoint.shards) == (1 if limit == 1 << 30 else report.shards_out)


def test_a_single_file_becomes_several(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", *qwen3(), shards=1)
    prune(folder, PLAN, tmp_path / "out", max_shard_size=500)
    assert len(open_checkpoint(tmp_path / "out").shards) > 1
    assert verify(folder, PLAN, tmp_path / "out").problems == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copy": "magic"}, "--copy magic: expected one of auto, reflink, kernel, stream"),
        ({"checksum": "md5"}, "--checksum md5: expected one of xxh3, blake3, none"),
        ({"max_shard_size": 0}, "--max-shard-size 0: expected at least one byte"),
    ],
)
def test_options_are_checked(source: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(source, PLAN, tmp_path / "out", **options)


def test_blake3_is_an_extra(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(InputError, match=r"--checksum blake3: .* not installed; pip install 'moekern\[blake3\]'$"):
        prune(source, PLAN, tmp_path / "out", checksum="blake3")
    assert prune(source, PLAN, tmp_path / "out", reread=True).finished


def test_reflink_is_taken_or_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying._C, "probe_copy", lambda source, folder: "stream")
    with pytest.raises(InputError, match="--copy reflink: .* cannot share blocks with"):
        prune(source, PLAN, tmp_path / "out", copy="reflink")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_most_data_keeps_its_place_in_the_block(tmp_path: Path) -> None:
    config, tensors = qwen3(layers=1)
    big = {
        name: (dtype, [2048, *shape], raw * 2048) if ".experts." in name else (dtype, shape, raw)
        for name, (dtype, shape, raw) in tensors.items()
    }
    assert all(len(raw) % BLOCK == 0 for name, (_, _, raw) in big.items() if ".experts." in name)
    unpadded = open_checkpoint(write(tmp_path / "unpadded", config, big, shards=1)).shards[0].data_start
    folder = write(tmp_path / "in", config, big, shards=1, pad=-unpadded % 8)
    prune(folder, Plan({"0": LayerPlan(KEEP["0"])}), tmp_path / "out")
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "out")
    phases = {name: entry.start % BLOCK for name, entry in before.tensors.items()}
    same = 0
    for name, entry in after.tensors.items():
        source = name
        if ".experts." in name:
            layer, expert = name.split(".")[2], int(name.split(".")[5])
            source = ".".join([*name.split(".")[:5], str(KEEP[layer][expert]), *name.split(".")[6:]])
        same += entry.nbytes * (phases[source] == entry.start % BLOCK)
    assert same > 0.9 * after.nbytes


def test_the_source_is_not_changed(source: Path, tmp_path: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in source.iterdir()}
    stopped(source, tmp_path / "out", 0.5)
    prune(source, PLAN, tmp_path / "out", reread=True)
    after = {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in source.iterdir()}
    assert after == before
    shutil.rmtree(tmp_path / "out")


def test_memory_stays_bounded(tmp_path: Path) -> None:
    config, tensors = qwen3(layers=1)
    big = {name: ("BF16", [4 << 20, 4], b"") if ".experts." in name else tensor for name, tensor in tensors.items()}
    header, offset = {}, 0
    for name, (dtype, shape, _) in big.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    folder = write(tmp_path / "in", config, tensors, shards=1)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + offset)
    assert offset > 760_000_000
    script = f"""
import resource
from moekern.plan import LayerPlan, Plan
from moekern.pruning import prune
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = prune({str(folder)!r}, Plan({{"0": LayerPlan((0, 5))}}), {str(tmp_path / "out")!r})
print(report.bytes_out, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    written, kilobytes = map(int, done.stdout.split())
    assert written > 190_000_000
    assert kilobytes < 50_000

"""What a stopped run left is evidence: the next one believes what can be true, and writes the rest again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moekern.errors import InputError
from moekern.pruning.preflight import check_space
from tests.helpers.faulty import Bench, benches_in_memory, finished, refused, resumed, snapshot, work_of, write_plan
from tests.helpers.planted import plant

FIFTH = "model-00005-of-00008.safetensors"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with benches_in_memory(tmp_path_factory) as made:
        yield made


def interrupted(bench: Bench, out: Path) -> Path:
    """Killed when four of eight shards are proved; the manifest."""
    assert bench.prune(out, rules=f"open@{FIFTH}:1:KILL").code == -signal.SIGKILL
    (manifest,) = work_of(out).glob("manifest*.jsonl")
    assert len(manifest.read_text().splitlines()) == 4
    return manifest


def torn(manifest: Path) -> None:
    os.truncate(manifest, manifest.stat().st_size - 40)


def appended(data: bytes) -> Callable[[Path], None]:
    def spoil(manifest: Path) -> None:
        with manifest.open("ab") as file:
            file.write(data)

    return spoil


def edited(**change: object) -> Callable[[Path], None]:
    """The last line tells something else."""

    def spoil(manifest: Path) -> None:
        *lines, last = manifest.read_text().splitlines()
        manifest.write_text("".join(f"{line}\n" for line in [*lines, json.dumps(json.loads(last) | change)]))

    return spoil


def shard_cut(manifest: Path) -> None:
    shard = json.loads(manifest.read_text().splitlines()[-1])["shard"]
    (path,) = manifest.parent.rglob(shard)
    os.truncate(path, path.stat().st_size - 1)


def shard_folder(manifest: Path) -> None:
    shard = json.loads(manifest.read_text().splitlines()[-1])["shard"]
    (path,) = manifest.parent.rglob(shard)
    path.unlink()
    (path / "deep").mkdir(parents=True)


def strange_files(manifest: Path) -> None:
    for name in ("model-00009-of-00008.safetensors", "x.partial", "config.json"):
        (manifest.parent / "checkpoint" / name).write_bytes(b"old")
    (manifest.parent / "checkpoint/link").symlink_to("/")


MANIFESTS: dict[str, Callable[[Path], None]] = {
    "torn": torn,
    "empty": lambda manifest: os.truncate(manifest, 0),
    "garbage": appended(b"\xff\xfe\x00{]\n"),
    "garbage without an end": appended(b"\xff\xfe\x00{]"),
    "other documents": appended(b'[]\n{"shard": 3}\nnull\n"x"\n\n{}\n' + b"[" * 50_000 + b"\n"),
    "odd types": edited(shard=[1], tensors=None),
    "odd numbers": edited(size="many", mtime_ns=None),
    "another plan": edited(made_from="0" * 64),
    "odd checksums": edited(tensors={"x": 7}),
    "another size": edited(size=12),
    "twice": lambda manifest: manifest.write_bytes(manifest.read_bytes() * 2),
    "a shard cut short": shard_cut,
    "a shard that is a folder": shard_folder,
    "strange files": strange_files,
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_is_evidence_not_an_order(bench: Bench, what: str) -> None:
    out = bench.fresh()
    MANIFESTS[what](interrupted(bench, out))
    resumed(bench, out)


def test_without_a_manifest_nothing_says_whose_it_is(bench: Bench) -> None:
    out = bench.fresh()
    interrupted(bench, out).unlink()
    before = snapshot(work_of(out))
    line = refused(bench.prune(out), out)
    assert line.endswith("no manifest beside it says that moekern wrote what is in it; move it away")
    assert snapshot(work_of(out)) == before


def planted(what: str, path: Path, elsewhere: Path) -> None:
    if what == "second name":
        os.link(elsewhere / "mine.jsonl", path)
    elif what == "text":
        path.write_text("mine\n")
    elif what == "link to nothing":
        path.symlink_to(elsewhere / "nowhere")
    else:
        plant(what, path, elsewhere)
    if what == "folder":
        (path / "mine").mkdir()


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("name", ["checkpoint", "manifest.jsonl", "manifest.2-of-2.jsonl", "part-1-of-2.lock"])
def test_what_is_planted_is_not_followed_waited_for_or_removed(bench: Bench, name: str, stopped: bool) -> None:
    """Before the first run, or instead of what a stopped one left; with and without parts."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as at:
        elsewhere = Path(at)
        (elsewhere / "mine.jsonl").write_bytes(b'{"shard": "mine"')
        (elsewhere / "mine.safetensors").write_bytes(b"mine")
        before = snapshot(elsewhere)
        for what in ("link", "link to nothing", "pipe", "device", "second name", "text", "folder"):
            out = bench.fresh()
            interrupted(bench, out) if stopped else work_of(out).mkdir(parents=True)
            path = work_of(out) / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            planted(what, path, elsewhere)
            options = ("--part", "1/2") if "-of-" in name else ()
            if (what, name, stopped) == ("folder", "checkpoint", True):
                continue  # strange files beside a manifest are the pruner's to remove
            line = refused(bench.prune(out, *options), out)
            assert "move it away" in line, (what, line)
            assert str(path) in line
            assert os.path.lexists(path)
            assert snapshot(elsewhere) == before
            if what == "folder":
                assert (path / "mine").is_dir()
            shutil.rmtree(out.parent)


@pytest.mark.parametrize("what", ["link", "second name", "pipe"])
def test_a_shard_that_is_elsewhere_is_written_again(bench: Bench, what: str) -> None:
    """Though its size and time are the recorded ones."""
    out, shard = bench.fresh(), "model-00003-of-00008.safetensors"
    interrupted(bench, out)
    path, elsewhere = work_of(out) / "checkpoint" / shard, bench.fresh()
    path.rename(elsewhere)
    before = elsewhere.read_bytes()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to(elsewhere)
    else:
        path.hardlink_to(elsewhere)
    resumed(bench, out)
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize("what", ["checkpoint", "work folder", "nothing"])
@pytest.mark.parametrize("when", [f"fsync@{FIFTH}", "open@config.json", "open@model-00002"])
def test_a_folder_that_is_replaced_by_a_link_meanwhile_is_not_followed(bench: Bench, what: str, when: str) -> None:
    """Nothing becomes the target then, and nothing more than the file that is being written goes elsewhere."""
    out = bench.fresh()
    running = bench.start(out, rules=f"{when}:1:STOP")
    assert running.wait().stopped
    path = work_of(out) if what == "work folder" else work_of(out) / "checkpoint"
    moved = path.rename(bench.fresh())
    if what != "nothing":
        path.symlink_to(moved)
    running.send(signal.SIGCONT)
    line = refused(running.wait(), out)
    assert "was removed or replaced meanwhile" in line or "No such file or directory" in line
    assert moved.is_dir()
    if what != "nothing":
        assert path.is_symlink()


def test_a_finished_target_leaves_a_stranger_s_folder_alone(bench: Bench) -> None:
    out = bench.fresh()
    assert bench.prune(out).code == 0
    work_of(out).mkdir()
    for name in ("manifest.jsonl", "part-1-of-2.lock", "manifest.1-of-2.jsonl"):
        (work_of(out) / name).write_text("mine")
    before = snapshot(work_of(out))
    assert "exists already" in bench.prune(out).line
    assert bench.prune(out, "--part", "1/2").code == 0
    assert snapshot(work_of(out)) == before


def test_a_part_that_comes_late_is_told_that_all_is_done(bench: Bench, tmp_path: Path) -> None:
    out, other = bench.fresh(), write_plan(tmp_path / "other.json", keep=(1, 2, 3, 6))
    waiting = bench.start(out, "--part", "1/2", rules="mkdir@out.moekern:1:STOP")  # it has found no target
    assert waiting.wait().stopped
    assert bench.prune(out).code == 0
    waiting.send(signal.SIGCONT)
    for ended in (waiting.wait(), bench.prune(out, "--part", "2/2")):
        assert ended.code == 0, ended.said
        assert f"{out}: was finished before, from the same model by the same plan" in ended.said
    for late in (
        Bench(bench.server, bench.source, other, bench.folder).prune(out, "--part", "1/2"),
        bench.prune(out, "--part", "1/2", "--max-shard-size", "20000"),
    ):
        assert late.code == 2
        assert "exists already" in late.line
    (out / "model-00002-of-00008.safetensors").unlink()
    assert "exists already" in bench.prune(out, "--part", "1/2").line


def test_what_another_plan_left_is_not_used(bench: Bench, tmp_path: Path) -> None:
    other = Bench(bench.server, bench.source, write_plan(tmp_path / "other.json", keep=(1, 2, 3, 6)), bench.folder)
    out = bench.fresh()
    interrupted(other, out)
    resumed(bench, out)
    assert other.want() != bench.want()


def test_what_another_way_of_copying_left_is_used(bench: Bench) -> None:
    out = bench.fresh()
    interrupted(bench, out)
    assert bench.prune(out, "--copy", "kernel").code == 0
    want, found = bench.want(), finished(out)
    assert {name for name in want | found if want.get(name) != found.get(name)} <= {"moekern_manifest.jsonl"}


@pytest.mark.parametrize("what", ["file", "link", "dangling link"])
def test_a_work_folder_that_is_none(bench: Bench, tmp_path: Path, what: str) -> None:
    """What stands at its name is not the pruner's to remove or to follow."""
    out = bench.fresh()
    work, elsewhere = work_of(out), tmp_path / "elsewhere"
    if what == "file":
        work.write_text("mine")
    elif what == "link":
        (elsewhere / "checkpoint").mkdir(parents=True)
        (elsewhere / "checkpoint/mine.txt").write_text("mine")
        work.symlink_to(elsewhere)
    else:
        work.symlink_to(elsewhere)
    line = refused(bench.prune(out), out)
    assert str(work) in line
    assert os.path.lexists(work)
    if what == "link":
        assert (elsewhere / "checkpoint/mine.txt").read_text() == "mine"


def with_neighbours(out: Path) -> dict[str, bytes]:
    """What `run` and others keep in the work folder; some of it has names like the pruner's."""
    work = work_of(out)
    work.mkdir(parents=True)
    content = {
        name: name.encode()
        for name in ("statistics.safetensors", "plan.json", "manifest.mine.jsonl", "part-mine.lock", "checkpoint.txt")
    }
    for name, data in content.items():
        (work / name).write_bytes(data)
    return content


def neighbours(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in work_of(out).iterdir()}


@pytest.mark.parametrize("options", [(), ("--part", "1/1")])
def test_what_others_keep_in_the_work_folder_stays(bench: Bench, options: tuple[str, ...]) -> None:
    out = bench.fresh()
    want = with_neighbours(out)
    assert bench.prune(out, *options, rules=f"open@{FIFTH}:1:KILL").code == -signal.SIGKILL
    assert bench.prune(out, *options).code == 0
    assert neighbours(out) == want
    again = bench.prune(out, *options)
    assert "was finished before" in again.said if options else "exists already" in again.line
    assert neighbours(out) == want
    shutil.rmtree(work_of(out))
    assert finished(out) == bench.want()


def test_a_run_that_wrote_no_shard_removes_only_its_own(bench: Bench) -> None:
    out = bench.fresh()
    want = with_neighbours(out)
    refused(bench.prune(out, rules="open@model-00001:1:EIO"), out)
    assert neighbours(out) == want


def test_a_kill_after_the_commit_leaves_what_is_removed_later(bench: Bench) -> None:
    """At every call between the rename and the end, others' files in the folder or not."""
    for others in (False, True):
        probe = bench.fresh()
        if others:
            with_neighbours(probe)
        calls = bench.changes(out=probe)
        commit = max(k for k, (call, path) in enumerate(calls, 1) if call == "rename" and path.endswith(f" -> {probe}"))
        assert len(calls) > commit + 1
        for k in range(commit + 1, len(calls) + 1):
            out = bench.fresh()
            want = with_neighbours(out) if others else {}
            assert bench.prune(out, rules=f"change:{k}:KILL").code == -signal.SIGKILL
            assert "exists already" in bench.prune(out).line
            if others:
                assert neighbours(out) == want
            else:
                assert finished(out) == bench.want()


def test_only_the_checkpoint_counts_as_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others keep in the work folder will not be replaced."""
    out = bench.fresh()
    with_neighbours(out)
    (work_of(out) / "statistics.safetensors").write_bytes(bytes(1 << 20))
    status = list(os.statvfs(out.parent))
    status[4] = 0  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(status))
    with pytest.raises(InputError, match="has 0 B free"):
        check_space(out, 1 << 19, 1)
    (work_of(out) / "checkpoint").mkdir()
    (work_of(out) / "checkpoint/model.safetensors").write_bytes(os.urandom(1 << 20))
    check_space(out, 1 << 19, 1)

"""What the disk, the source, the user and other processes may do to a pruner: one clear line, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.faulty import (
    Bench,
    benches_in_memory,
    build_library,
    checkpoint,
    finished,
    nothing_or_all,
    read_log,
    refused,
    resumed,
    work_of,
    write_plan,
)
from tests.helpers.mounts import MIB, mounted

FIFTH = "model-00005-of-00008.safetensors"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with benches_in_memory(tmp_path_factory) as made:
        yield made


@pytest.mark.parametrize(
    ("error", "text", "calls"),
    [
        ("EIO", "Input/output error", None),
        ("ENOSPC", "No space left on device", ("open", "write", "mkdir", "truncate", "rename", "fallocate")),
        ("EDQUOT", "Disk quota exceeded", ("write", "fsync")),
    ],
)
def test_changes_that_fail(bench: Bench, error: str, text: str, calls: tuple[str, ...] | None) -> None:
    want, failures = bench.want(), 0
    # A shard makes 10 changes: with every third, each of them fails in some shard.
    for k, (call, path) in enumerate(bench.changes(), 1):
        if k % 3 or (calls is not None and call not in calls):
            continue
        out = bench.fresh()
        ended = bench.prune(out, rules=f"change:{k}:{error}")
        failures += ended.code != 0
        if ended.code != 0:
            assert text in ended.line, f"{call} {path}: {ended}"
            assert str(out.parent) in ended.line
        if not nothing_or_all(out, want):  # else the commit was made, and only its flush or the cleaning failed
            assert ended.code == 2, f"{call} {path}: {ended}"
            assert bench.prune(out).code == 0
        elif os.path.lexists(work_of(out)):
            assert "exists already" in bench.prune(out).line
        assert finished(out) == want
    assert failures > 5


@pytest.mark.parametrize("copy", ["stream", "kernel"])
def test_reads_that_fail(bench: Bench, copy: str) -> None:
    want, log = bench.want("--copy", copy), bench.server.folder / f"reads-{copy}"
    assert bench.prune(bench.fresh(), "--copy", copy, log=log).code == 0
    call = "read" if copy == "stream" else "copy"
    reads = sum(name == call and ".safetensors" in path for name, path in read_log(log))
    for k in random.Random(0).sample(range(1, reads + 1), min(reads, 8)):
        out = bench.fresh()
        ended = bench.prune(out, "--copy", copy, rules=f"{call}@.safetensors:{k}:EIO")
        assert ended.code == 2
        assert "Input/output error" in ended.line
        assert ".safetensors" in ended.line
        assert not os.path.lexists(out)
        assert bench.prune(out, "--copy", copy).code == 0
        assert finished(out) == want


@pytest.mark.parametrize("copy", ["stream", "kernel"])
def test_short_and_interrupted_calls_are_no_faults(bench: Bench, copy: str) -> None:
    want = bench.want("--copy", copy)
    for rules in (
        "read:1+:SHORT,write@checkpoint/:1+:SHORT,copy:1+:SHORT",
        "write@manifest:1+:SHORT",
        "read@.safetensors:20:EINTR,read@.safetensors:21:EINTR,write:3:EINTR,write:4:EINTR,copy:2:EINTR,copy:9:EINTR",
    ):
        out = bench.fresh()
        ended = bench.prune(out, "--copy", copy, rules=rules)
        assert ended.code == 0, (rules, ended.said)
        assert finished(out) == want


def test_a_short_write_does_not_tear_the_manifest(bench: Bench) -> None:
    out = bench.fresh()
    ended = bench.prune(out, rules=f"write@manifest:1+:SHORT,open@{FIFTH}:1:KILL")
    assert ended.code == -signal.SIGKILL
    (manifest,) = work_of(out).glob("manifest*.jsonl")
    lines = manifest.read_text().splitlines()
    assert [json.loads(line)["shard"] for line in lines] == [f"model-{i:05d}-of-00008.safetensors" for i in range(1, 5)]
    resumed(bench, out)


def test_a_file_system_without_hints_locks_and_holes(bench: Bench) -> None:
    out = bench.fresh()
    rules = "hint:1+:ENOSYS,lock:1+:ENOLCK,lseek@.safetensors:20+:EINVAL"
    ended = bench.prune(out, "--copy", "stream", rules=rules)
    assert ended.code == 0, ended.said
    assert finished(out) == bench.want("--copy", "stream")


def fill(ballast: Path) -> None:
    """Write until the file system is full."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_and_room_made(bench: Bench) -> None:
    """A real one: 4 MiB of memory, filled by another while the pruner is at its fifth shard."""
    with mounted("tmpfs", 4 * MIB) as small:
        out = small / "x/out"
        running = bench.start(out, rules=f"open@{FIFTH}:1:STOP")
        assert running.wait().stopped
        ballast = small / "ballast"
        fill(ballast)
        running.send(signal.SIGCONT)
        line = refused(running.wait(), out)
        assert "not finished" in line
        assert "No space left on device" in line
        assert "run the same command again" in line
        assert "free" in refused(bench.prune(out), out)  # before anything is written, and what is there stays
        assert work_of(out).is_dir()
        ballast.unlink()
        ended = bench.prune(out)
        assert ended.code == 0, ended.said
        assert finished(out) == bench.want()


@pytest.fixture
def own_source(bench: Bench) -> Iterator[Bench]:
    """The bench with a copy of its source, to be spoiled, on the same file system."""
    with tempfile.TemporaryDirectory(dir=bench.source.parent) as folder:
        source = Path(folder) / "model"
        shutil.copytree(bench.source, source)
        yield Bench(bench.server, source, bench.plan, bench.folder)


def replaced(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20_000:] = bytes(20_000)
    other = path.with_name("other")
    other.write_bytes(data)
    other.replace(path)


SPOILS: dict[str, tuple[Callable[[Path], None], str]] = {
    "vanishes": (Path.unlink, "No such file or directory"),
    "is truncated": (lambda path: os.truncate(path, 20_000), "ends at byte|changed|bytes"),
    "is replaced": (replaced, "changed"),
}


@pytest.mark.parametrize("copy", ["stream", "kernel"])
@pytest.mark.parametrize("what", SPOILS)
@pytest.mark.parametrize("when", [f"open@{FIFTH}", "open@model-00002", f"fsync@{FIFTH}"])
def test_a_shard_of_the_source(own_source: Bench, what: str, copy: str, when: str) -> None:
    """It changes before it is copied, or at the end of it; the rest of it is what the headers of before told."""
    bench, out = own_source, own_source.fresh()
    spoil, says = SPOILS[what]
    shard, saved = bench.source / FIFTH, bench.source.with_name("saved")
    shutil.copy2(shard, saved)
    running = bench.start(out, "--copy", copy, rules=f"{when}:1:STOP")
    assert running.wait().stopped
    spoil(shard)
    running.send(signal.SIGCONT)
    line = refused(running.wait(), out)
    assert FIFTH in line
    assert any(text in line for text in says.split("|")), line
    saved.replace(shard)
    resumed(bench, out, "--copy", copy)


@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "link"])
@pytest.mark.parametrize("when", [f"open@{FIFTH}", "open@config.json"])
def test_the_target_appears_meanwhile(bench: Bench, what: str, when: str) -> None:
    out = bench.fresh()
    running = bench.start(out, rules=f"{when}:1:STOP")
    assert running.wait().stopped
    if what == "file":
        out.write_text("mine")
    elif what == "link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if what == "folder":
            (out / "mine.txt").write_text("mine")
    running.send(signal.SIGCONT)
    ended = running.wait()
    assert ended.code == 2
    assert f"{out}: exists already" in ended.line
    if what == "file":
        assert out.read_text() == "mine"
        out.unlink()
    elif what == "link":
        assert os.readlink(out) == "nowhere"
        out.unlink()
    else:
        assert os.listdir(out) == ["mine.txt"][: what == "folder"]
        shutil.rmtree(out)
    resumed(bench, out)


def test_a_second_process_is_refused(bench: Bench) -> None:
    out = bench.fresh()
    running = bench.start(out, rules=f"open@{FIFTH}:1:STOP")
    assert running.wait().stopped
    before = sorted(work_of(out).rglob("*"))
    line = refused(bench.prune(out), out)
    assert "another process" in line
    assert sorted(work_of(out).rglob("*")) == before
    running.send(signal.SIGCONT)
    assert running.wait().code == 0
    assert finished(out) == bench.want()


def test_a_second_process_with_the_same_part_is_refused(bench: Bench) -> None:
    out = bench.fresh()
    running = bench.start(out, "--part", "1/2", rules="write@.partial:2:STOP")
    assert running.wait().stopped
    assert "1/2" in bench.prune(out, "--part", "1/2").line
    whole = bench.prune(out)
    assert whole.code == 2
    assert "another process" in whole.line
    assert bench.prune(out, "--part", "2/2").code == 0
    running.send(signal.SIGCONT)
    assert running.wait().code == 0
    assert finished(out) == bench.want()


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143)])
def test_a_polite_end_at_every_moment(bench: Bench, name: str, code: int) -> None:
    want = bench.want()
    changes = bench.changes()
    for k in range(3, len(changes) + 1, 7):
        out = bench.fresh()
        ended = bench.prune(out, rules=f"change:{k}:{name}")
        if nothing_or_all(out, want):
            if os.path.lexists(work_of(out)):
                assert "exists already" in bench.prune(out).line
        else:
            assert ended.code == code, (k, changes[k - 1], ended)
            assert "Traceback" not in ended.said
            assert bench.prune(out).code == 0
        assert finished(out) == want


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_line(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """The whole command, started as a user does; the signal comes while it copies the fifth shard."""
    library = build_library(tmp_path)
    if library is None:
        pytest.skip("needs a C compiler")
    source, plan, out = checkpoint(tmp_path / "model"), write_plan(tmp_path / "plan.json"), tmp_path / "runs/out"
    out.parent.mkdir()
    # A shell that starts the tests in the background lets them ignore Ctrl-C.
    heard = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moekern.cli.app import main; main()"
    )
    command = [sys.executable, "-c", heard, "prune", str(source), str(plan), "--out", str(out)]
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "MOEKERN_FAULT_UNDER": str(tmp_path),
        "MOEKERN_FAULT_RULES": f"write@{FIFTH}:1:STOP",
    }
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate()
    assert process.returncode == code
    lines = [line for line in said.splitlines() if line.startswith("moekern: ")]
    assert len(lines) == 1
    assert f"{out}: not finished" in lines[0]
    assert "run the same command again" in lines[0]
    assert "Traceback" not in said
    assert not out.exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert (out / "config.json").exists()
    assert os.listdir(out.parent) == ["out"]

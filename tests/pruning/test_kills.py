"""A pruner that is killed at any moment leaves what the same command finishes, with the same bytes; see faults.c."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moekern.plan.document import Plan
from moekern.verification.tensors import verify
from tests.helpers.faulty import Bench, Snapshot, benches_in_memory, finished, nothing_or_all, read_log, work_of

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with benches_in_memory(tmp_path_factory, shards=5) as made:  # the first, the last and some alike between them
        yield made


@pytest.fixture(scope="module")
def computing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Three shards with tensors that are computed when they are written."""
    with benches_in_memory(tmp_path_factory, shards=3, computed=True) as made:
        yield made


def kill_and_resume(bench: Bench, out: Path, rules: list[str], want: Snapshot, *options: str) -> None:
    """Run the command once for each rule, which kills it, and then once more."""
    for rule in rules:
        ended = bench.prune(out, *options, rules=rule)
        assert ended.code == KILLED, f"{rule}: {ended}"
        if nothing_or_all(out, want):
            break
    again(bench, out, want, *options)


def again(bench: Bench, out: Path, want: Snapshot, *options: str) -> None:
    """The same command, to its end. A run that was killed just after its commit leaves no more than a work folder."""
    complete = nothing_or_all(out, want)
    ended = bench.prune(out, *options)
    if complete and "--part" in options:
        assert ended.code == 0, ended.said
        assert "was finished before, from the same model by the same plan" in ended.said
    elif complete:
        assert "exists already" in ended.line
    else:
        assert ended.code == 0, ended.said
    assert finished(out) == want


def lines(out: Path) -> list[str]:
    """The shards that the manifests in the work folder tell to be complete."""
    text = b"".join(path.read_bytes() for path in sorted(work_of(out).glob("manifest*.jsonl")))
    return [str(json.loads(line)["shard"]) for line in text.split(b"\n")[:-1]]


def test_undisturbed_runs_are_right_and_alike(bench: Bench) -> None:
    out = bench.fresh()
    assert bench.prune(out).code == 0
    assert verify(bench.source, Plan.load(bench.plan), out).problems == ()
    want = finished(out)
    assert bench.want() == want
    kernel = bench.want("--copy", "kernel")
    assert kernel.keys() == want.keys()
    assert {name for name in want if kernel[name] != want[name]} <= {"moekern_manifest.jsonl"}


@pytest.mark.parametrize("copy", ["stream", pytest.param("kernel", marks=pytest.mark.whole)])
def test_killed_before_every_change_of_what_is_computed(computing: Bench, copy: str) -> None:
    options = ("--copy", copy)
    want, changes = computing.want(*options), computing.changes(*options)
    lines = [json.loads(line) for line in str(want["moekern_manifest.jsonl"][1], "utf-8").splitlines()]  # type: ignore[arg-type]
    assert sum(len(line["computed"]) for line in lines) == 3
    second, third = (next(k for k, (_, path) in enumerate(changes, 1) if f"model-0000{n}-" in path) for n in (2, 3))
    for k in sorted({*range(second, third), *range(1, len(changes) + 1, 5)}):  # all of one shard, some of the others
        kill_and_resume(computing, computing.fresh(), [f"change:{k}:KILL"], want, *options)
    for k in range(1, sum(call == "write" for call, _ in changes) + 1):
        kill_and_resume(computing, computing.fresh(), [f"write:{k}:TORN"], want, *options)


# A shard makes 10 changes: with every third, each of them is met in some shard.
@pytest.mark.parametrize(
    ("copy", "step"),
    [("stream", 3), *(pytest.param(*case, marks=pytest.mark.whole) for case in (("stream", 1), ("kernel", 3)))],
)
def test_killed_before_every_change(bench: Bench, copy: str, step: int) -> None:
    options = ("--copy", copy)
    want, changes = bench.want(*options), bench.changes(*options)
    assert len(changes) > 60
    rng = random.Random(1)
    for k in range(1, len(changes) + 1, step):
        rules = [f"change:{k}:KILL"]
        if k // step % 3 == 0:  # the run that resumes is killed too, at its latest when it commits
            rules.append(rng.choice([f"change:{rng.randint(1, 8)}:KILL", f"rename@{bench.folder}:1:KILL"]))
        kill_and_resume(bench, bench.fresh(), rules, want, *options)


def test_killed_inside_every_write(bench: Bench) -> None:
    want = bench.want()
    writes = [path for call, path in bench.changes() if call == "write"]
    assert any("manifest" in path for path in writes)
    for k in range(1, len(writes) + 1):
        kill_and_resume(bench, bench.fresh(), [f"write:{k}:TORN"], want)


@pytest.mark.parametrize("tries", [8, pytest.param(30, marks=pytest.mark.whole)])
def test_killed_at_any_time(bench: Bench, tries: int) -> None:
    """Kills by the clock: wherever the reader and writer threads happen to be."""
    want, rng, kills = bench.want(), random.Random(2), 0
    start = time.perf_counter()
    bench.want()
    span = time.perf_counter() - start
    for _ in range(tries):
        out = bench.fresh()
        while True:
            running = bench.start(out)
            time.sleep(rng.uniform(0, span))
            running.send(signal.SIGKILL)
            ended = running.wait()
            kills += ended.code == KILLED
            if nothing_or_all(out, want) or rng.random() < 0.5:
                break
        again(bench, out, want)
    assert kills >= tries // 2


def test_only_the_rename_touches_the_target(bench: Bench) -> None:
    out = bench.fresh()
    touched = [(call, path) for call, path in bench.changes(out=out) if f"{out}/" in f"{path}/"]
    assert len(touched) == 1
    assert touched[0][0] == "rename"
    assert touched[0][1].endswith(f" -> {out}")


@pytest.mark.parametrize("copy", ["stream", "kernel"])
def test_the_disk_holds_what_is_proved_and_what_is_committed(bench: Bench, copy: str) -> None:
    """Nothing is named in the manifest, or becomes the target, before it and its name were flushed."""
    out = bench.fresh()
    unsafe: set[str] = set()  # files and folders changed since they were last flushed
    committed = proofs = 0
    for call, path in bench.changes("--copy", copy, out=out):
        is_manifest = call == "write" and path.endswith(".jsonl") and "manifest" in path
        held = {name for name in unsafe if "/checkpoint" in name}
        if is_manifest and "/checkpoint/" not in path:
            proofs += 1
            assert not held, f"{path} is written while {held} are not on the disk"
        source, _, target = path.partition(" -> ")
        if call == "rename" and target == str(out):
            committed += 1
            assert not held, f"{held} are not on the disk at the commit"
            unsafe = {name for name in unsafe if not name.startswith(source)} | {str(out.parent)}
        elif call == "rename":
            assert source not in unsafe, f"{source} is not on the disk and gets its name"
            unsafe |= {os.path.dirname(source), os.path.dirname(target)}
        elif call == "fsync":
            unsafe.discard(path)
        elif call in ("mkdir", "unlink", "rmdir"):
            unsafe = {name for name in unsafe if name != path} | {os.path.dirname(path)}
        elif call == "open":
            unsafe |= {path, os.path.dirname(path)}
        else:
            unsafe.add(path)
    assert committed == 1
    assert proofs == 5
    log = bench.server.folder / "after"
    again_out = bench.fresh()
    assert bench.prune(again_out, "--copy", copy, log=log).code == 0
    calls = read_log(log)
    commit = max(i for i, (call, path) in enumerate(calls) if call == "rename" and path.endswith(f" -> {again_out}"))
    assert ("fsync", str(again_out.parent)) in calls[commit:]


def test_what_is_proved_is_not_written_again(bench: Bench) -> None:
    want = bench.want()
    for shards in (1, 2, 4):
        out, log = bench.fresh(), bench.server.folder / f"resumed-{shards}"
        assert bench.prune(out, rules=f"open@model-{shards + 1:05d}:1:KILL").code == KILLED
        proved = lines(out)
        assert len(proved) == shards
        assert bench.prune(out, log=log).code == 0
        touched = {path for call, path in read_log(log) if call in ("open", "write", "copy", "truncate")}
        assert not [path for path in touched for shard in proved if shard in path.removeprefix(str(bench.source))]
        assert finished(out) == want


def test_parts_killed_and_resumed(bench: Bench) -> None:
    want, halves = bench.want(), [("--part", "1/2"), ("--part", "2/2")]
    for last in (0, 1):
        other, killed = halves[1 - last], halves[last]
        out = bench.fresh()
        assert bench.prune(out, *other).code == 0
        assert not out.exists()
        count = len(bench.changes(*killed, out=out))  # this one finishes
        assert finished(out) == want
        for k in range(1 + 3 * last, count + 1, 6):  # by both together each of a shard's changes is met in some shard
            out = bench.fresh()
            assert bench.prune(out, *other).code == 0
            kill_and_resume(bench, out, [f"change:{k}:KILL"], want, *killed)


def test_a_part_killed_before_the_other_comes(bench: Bench) -> None:
    want = bench.want()
    proof = max(k for k, (call, _) in enumerate(bench.changes("--part", "1/2"), 1) if call == "write")
    for k in range(1, proof + 1, 3):  # before its last shard is proved
        out = bench.fresh()
        assert bench.prune(out, "--part", "1/2", rules=f"change:{k}:KILL").code == KILLED
        ended = bench.prune(out, "--part", "2/2")
        assert ended.code == 0, ended.said
        assert not out.exists()
        again(bench, out, want, "--part", "1/2")


@pytest.mark.parametrize("tries", [3, pytest.param(8, marks=pytest.mark.whole)])
def test_parts_at_once_killed_at_any_time(bench: Bench, tries: int) -> None:
    want, rng = bench.want(), random.Random(3)
    for _ in range(tries):
        out = bench.fresh()
        parts = [("--part", f"{i}/3") for i in (1, 2, 3)]
        for _ in range(2):
            running = [bench.start(out, *part) for part in parts]
            time.sleep(rng.uniform(0, 0.15))
            for one in running:
                one.send(signal.SIGKILL)
            for one in running:
                one.wait()
            if nothing_or_all(out, want):
                break
        if not nothing_or_all(out, want):
            ended = [one.wait() for one in [bench.start(out, *part) for part in parts]]
            assert all(one.code == 0 for one in ended), ended
        again(bench, out, want, *parts[0])

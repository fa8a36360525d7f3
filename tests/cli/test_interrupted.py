"""Commands that are stopped, meet a full disk or each other, or find strange things: one line, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from moekern import files
from moekern.calibration.calibrate import Job
from moekern.cli import pipeline
from moekern.plan.document import LayerPlan, Plan
from tests.helpers.commands import contents, document, model_and_ids, moekern
from tests.helpers.mounts import mounted
from tests.helpers.planted import plant

Command = Callable[[Path], tuple[object, ...]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, token ids, two statistics and a plan."""
    folder = model_and_ids(tmp_path_factory.mktemp("interrupted"))
    for seed in (0, 1):
        assert moekern(*calibrate(folder, seed)(folder / f"s{seed}.safetensors")).returncode == 0
    assert moekern("plan", folder / "s0.safetensors", "--keep", 4, "--out", folder / "plan.json").returncode == 0
    return folder


def text(work: Path) -> tuple[object, ...]:
    return ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 40, "--tokens", 200)


def calibrate(work: Path, seed: int = 0) -> Command:
    return lambda out: ("calibrate", work / "model", *text(work), "--seed", seed, "--out", out)


def run(work: Path, keep: int = 4) -> Command:
    options = ("--keep", keep, "--no-forward", "--no-quality")
    return lambda out: ("run", work / "model", *text(work), *options, "--out", out)


def iterate(work: Path, rounds: int = 3) -> Command:
    return lambda out: ("iterate", work / "model", *text(work), "--keep", 2, "--rounds", rounds, "--out", out)


def commands(work: Path) -> dict[str, Command]:
    """Those that write: name -> target -> arguments."""
    statistics, plan = work / "s0.safetensors", work / "plan.json"
    return {
        "calibrate": calibrate(work),
        "merge": lambda out: ("merge", statistics, work / "s1.safetensors", "--out", out),
        "plan": lambda out: ("plan", statistics, "--keep", 4, "--out", out),
        "convert": lambda out: ("convert", plan, "--to", "moekern", "--out", out),
        "iterate": iterate(work),
        "run": run(work),
        "prune": lambda out: ("prune", work / "model", plan, "--out", out),
    }


COMMANDS = ("calibrate", "merge", "plan", "convert", "iterate", "run", "prune")
MEASURED = ("calibrate", "iterate", "run")


def refused(*arguments: object) -> str:
    """The one line about an error; other lines tell how it went before."""
    done = moekern(*arguments)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("moekern: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return lines[0]


def unmeasured(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Job, "run", lambda *arguments: pytest.fail("it was measured"))
    patch.setattr(pipeline, "iterate", lambda *arguments, **options: pytest.fail("it was measured"))


@pytest.fixture(scope="module")
def full() -> Iterator[Path]:
    """A file system with not a block left."""
    with mounted("tmpfs", 1 << 16) as small:
        with (small / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield small


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(work: Path, full: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(full)
    monkeypatch.setattr(pipeline, "iterate", lambda *arguments, **options: pytest.fail("it was measured"))
    line = refused(*commands(work)[name](full / "out"))
    assert line.startswith(f"moekern: {full / 'out'}")
    assert "No space left on device" in line or "free" in line
    assert contents(full) == before


def test_room_for_statistics_is_taken_before_the_first_layer(
    work: Path, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = sys.modules["moekern.calibration.calibrate"]  # the package has a function of that name
    monkeypatch.setattr(stage._FirstPass, "loaded", lambda *arguments: pytest.fail("it was measured"))
    assert "bytes are needed" in refused(*calibrate(work)(full / "out"))


@contextmanager
def at_work(name: str, out: Path) -> Iterator[None]:
    """Another process that makes the same target."""
    if name == "prune":
        from moekern.pruning.work_folder import open_work

        with open_work(out, None):
            yield
    elif name in ("iterate", "run"):
        with files.working(out):
            yield
    else:
        with files.replacing(out):
            yield


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_writer_is_refused(work: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with at_work(name, out):
        before = contents(tmp_path)
        unmeasured(monkeypatch)
        line = refused(*commands(work)[name](out))
        assert line.startswith(f"moekern: {out}: another process is writing it, in {tmp_path}")
        assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["calibrate", "merge", "plan", "convert", "iterate"])
def test_what_appears_meanwhile_is_not_written_over(
    work: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has made the same target between the check and the end."""
    out, claimed = tmp_path / "out", files.claimed

    def late(path: Path, target: Path, **options: bool) -> int:
        if target == out:
            out.write_bytes(b"other")
        return claimed(path, target, **options)

    monkeypatch.setattr(files, "claimed", late)
    assert f"--out {out}: exists already" in refused(*commands(work)[name](out))
    assert out.read_bytes() == b"other"


def denied(patch: pytest.MonkeyPatch, name: str) -> None:
    """The system no longer lets a file have this name."""
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return replace(self, target)

    patch.setattr(Path, "replace", refuse)


@pytest.mark.parametrize("name", ["calibrate", "run"])
def test_what_was_measured_is_kept_where_it_cannot_get_its_name(work: Path, tmp_path: Path, name: str) -> None:
    out, command = tmp_path / "out", commands(work)[name]
    statistics = out if name == "calibrate" else files.work_path(out) / "statistics.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        denied(patch, statistics.name)
        line = refused(*command(out))
    assert "Permission denied; it is whole in" in line
    assert "run the same command again" in line
    with pytest.MonkeyPatch.context() as patch:
        unmeasured(patch)
        done = moekern(*command(out))
    assert done.returncode == 0, done.stderr
    assert "using what an earlier run has measured" in done.stderr
    assert statistics.read_bytes() == (work / "s0.safetensors").read_bytes()
    assert not files.temporary_path(statistics).exists()


@pytest.mark.parametrize("what", ["text", "--tier"])
def test_what_a_stopped_run_has_measured_otherwise_is_refused_or_begun_anew(
    work: Path, tmp_path: Path, what: str
) -> None:
    out, command = tmp_path / "out", calibrate(work)
    left = files.temporary_path(out)
    if what == "--tier":
        assert moekern(*command(left), "--tier", "weights").returncode == 0
    else:
        shutil.copy(work / "s1.safetensors", left)
    before = contents(tmp_path)
    line = refused(*command(out))
    assert line.startswith(f"moekern: {left}: of an earlier run, with another {what} (")
    assert "--restart begins anew" in line
    assert contents(tmp_path) == before
    assert moekern(*command(out), "--restart").returncode == 0
    assert contents(tmp_path) == {"out": (work / "s0.safetensors").read_bytes()}


@pytest.mark.parametrize("what", ["half", "nothing"])
def test_what_a_stopped_run_left_of_no_use_is_measured_anew(work: Path, tmp_path: Path, what: str) -> None:
    out, command = tmp_path / "out", calibrate(work)
    left = files.temporary_path(out)
    shutil.copy(work / "s0.safetensors", left)
    if what == "half":
        left.write_bytes(bytes(8) + left.read_bytes()[8:])
    elif what == "nothing":
        os.truncate(left, 0)
    done = moekern(*command(out))
    assert done.returncode == 0, done.stderr
    assert "earlier run" not in done.stderr
    assert contents(tmp_path) == {"out": (work / "s0.safetensors").read_bytes()}


def test_a_run_that_was_stopped_while_it_verified_goes_on_with_that(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify_both", stop)
        assert moekern(*run(work)(out)).returncode == 130
    made = contents(tmp_path)
    assert "out/config.json" in made
    with pytest.MonkeyPatch.context() as patch:
        unmeasured(patch)
        done = moekern(*run(work)(out))
        assert done.returncode == 0, done.stderr
    assert "was finished before, from the same model by the same plan" in done.stderr
    assert "verified" in done.stderr
    assert contents(tmp_path) == made


def test_a_target_that_is_another_s_is_refused_before_anything_is_measured(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert moekern(*run(work)(out)).returncode == 0
    made = contents(tmp_path)
    unmeasured(monkeypatch)
    assert f"--out {out}: exists already" in refused(*run(work, keep=6)(out))
    assert f"--out {out}: exists already" in refused(*run(work)(out), "--seed", 3)
    (out / "config.json").write_text("{}")
    assert f"--out {out}: exists already" in refused(*run(work)(out))
    shutil.rmtree(files.work_path(out))
    assert f"--out {out}: exists already" in refused(*run(work)(out))
    assert contents(tmp_path) == {n: d for n, d in made.items() if n.startswith("out/")} | {"out/config.json": b"{}"}


@pytest.mark.parametrize("what", ["link", "pipe", "device", "folder"])
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("run", "statistics.safetensors"),
        ("run", ".statistics.safetensors.moekern.tmp"),
        ("run", "plan.json"),
        ("run", ".plan.json.moekern.tmp"),
        ("run", files.LOCK),
        ("iterate", "round-1.json"),
        ("iterate", "round-2.json"),
        ("iterate", ".round-2.json.moekern.tmp"),
        ("iterate", "../.out.moekern.tmp"),
        ("iterate", files.LOCK),
        ("calibrate", ".out.moekern.tmp"),
    ],
)
def test_what_is_planted_is_not_followed_waited_for_or_removed(
    work: Path, tmp_path: Path, command: str, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "here" / "out"
    shutil.copy(work / ("s0.safetensors" if "statistics" in name or command == "calibrate" else "plan.json"), elsewhere)
    before = elsewhere.read_bytes()
    out.parent.mkdir()
    files.work_path(out).mkdir()
    path = (out.parent / name) if command == "calibrate" else (files.work_path(out) / name)
    path = path.parent.resolve() / path.name
    plant(what, path, elsewhere)
    unmeasured(monkeypatch)
    assert f"{path}: a link, pipe or other thing that moekern did not write" in refused(*commands(work)[command](out))
    assert elsewhere.read_bytes() == before
    assert os.path.lexists(path)
    assert {*out.parent.rglob("*")} <= {path, files.work_path(out)}


def test_rounds_and_temporaries_of_killed_runs_are_removed(work: Path, tmp_path: Path) -> None:
    """Of a run with more rounds; of one that was killed when it had saved its plan."""
    out = tmp_path / "out"
    side = files.work_path(out)
    side.mkdir()
    for name in ("round-2.json", "round-7.json", ".round-3.json.moekern.tmp"):
        shutil.copy(work / "plan.json", side / name)
    (side / files.LOCK).touch()
    (side / "round-9.json").write_text("mine")
    (side / ".round-8.json.moekern.tmp").symlink_to(work / "plan.json")
    assert moekern(*iterate(work, rounds=2)(out)).returncode == 0
    assert {path.name for path in side.iterdir()} == {"round-9.json", ".round-8.json.moekern.tmp"}
    shutil.rmtree(side)
    layers = Plan.load(out).provenance["earlier_rounds"][0]
    side.mkdir()
    Plan({key: LayerPlan(tuple(keep)) for key, keep in layers.items()}).save(side / "round-1.json")
    assert f"--out {out}: exists already" in refused(*iterate(work, rounds=2)(out))
    assert not side.exists()


def test_rounds_that_a_plan_was_not_made_from_are_kept(work: Path, tmp_path: Path) -> None:
    """A target that something else has made meanwhile must not cost the rounds that are done."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        denied(patch, "round-2.json")
        assert "Permission denied" in refused(*iterate(work)(out))
    shutil.copy(work / "plan.json", out)
    before = contents(tmp_path)
    assert "out.moekern/round-1.json" in before
    assert f"--out {out}: exists already" in refused(*iterate(work)(out))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["run", "prune", "part"])
@pytest.mark.parametrize("what", ["checkpoint", "checkpoint/mine", "manifest.jsonl", "part-1-of-2.lock"])
def test_what_is_in_the_pruner_s_way_is_told_before_anything_is_measured(
    work: Path, tmp_path: Path, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = lambda out: (*commands(work)["prune"](out), "--part", "1/1")  # noqa: E731
    out = tmp_path / "out"
    path = files.work_path(out) / what
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    unmeasured(monkeypatch)
    assert f"{files.work_path(out)}" in refused(*{**commands(work), "part": part}[name](out))
    assert contents(tmp_path) == {f"out.moekern/{what}": b"mine"}


@pytest.mark.parametrize("what", ["num_experts_per_tok", "seed"])
def test_statistics_of_another_config_are_not_used(work: Path, tmp_path: Path, what: str) -> None:
    model, out, fresh = tmp_path / "model", tmp_path / "out", tmp_path / "fresh"
    shutil.copytree(work / "model", model)
    command = lambda out, *more: ("run", model, *text(work), "--keep", 4, "--no-forward", *more, "--out", out)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        denied(patch, "plan.json")
        assert "Permission denied" in refused(*command(out))
    options: tuple[object, ...] = ("--seed", 1)
    if what != "seed":
        config, options = json.loads((model / "config.json").read_text()), ()
        (model / "config.json").write_text(json.dumps({**config, what: 1}))
    line = refused(*command(out, *options))
    assert f"{out}.moekern/statistics.safetensors: of an earlier run, with another " in line
    assert ("text (" if what == "seed" else "config.json") in line
    done = moekern(*command(out, *options), "--restart")
    assert done.returncode == 0, done.stderr
    assert moekern(*command(fresh, *options)).returncode == 0
    assert contents(files.work_path(out)) == contents(files.work_path(fresh))
    assert contents(out) == contents(fresh)


@pytest.mark.parametrize("name", [*COMMANDS, "demo"])
def test_names_are_looked_at_first(work: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured(monkeypatch)
    monkeypatch.chdir(tmp_path)
    command = {**commands(work), "demo": lambda out: ("demo", "--out", out)}[name]
    for out in ("", ".", "/", ".."):
        if name != "plan":  # plans go into a folder that is there
            assert ": names no new f" in refused(*command(out))  # type: ignore[arg-type]
    assert "the name is longer than" in refused(*command(tmp_path / ("x" * 250)))
    assert "the name is not UTF-8" in refused(*command(tmp_path / "a\udcff"))
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_refused_takes_nothing_from_the_next(work: Path, tmp_path: Path) -> None:
    assert refused("merge", work / "s0.safetensors", work / "s0.safetensors", "--out", tmp_path / "out")
    assert document(*commands(work)["merge"](tmp_path / "out"))["tokens"] == {"a": 400}

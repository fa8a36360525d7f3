"""Was the text enough? What the commands tell of it, and `--until-stable`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moekern.calibration.calibrate import calibrate
from moekern.cli import pipeline
from moekern.files import replacing
from moekern.model import journal
from moekern.model.layerwise import LayerwiseModel
from moekern.statistics.file import Statistics
from tests.helpers.commands import contents, document, model_and_ids, moekern


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = model_and_ids(tmp_path_factory.mktemp("enough"), 600)
    done = moekern(*_calibrate(folder, folder / "s.safetensors"))
    assert done.returncode == 0, done.stderr
    return folder


def _calibrate(work: Path, out: Path, *more: object) -> tuple[object, ...]:
    data = ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 20, "--chunk", 1)
    return ("calibrate", work / "model", *data, "--out", out, *more)


def test_inspect_tells_of_statistics(work: Path) -> None:
    found: Any = document("inspect", work / "s.safetensors", "--keep", 4, "--criterion", "reap")
    told = found["enough"]
    assert (told["criterion"], told["keep"], list(told["domains"])) == ("reap", "4", ["all"])
    one = told["domains"]["all"]
    assert set(one["layers"]) == set(Statistics.load(work / "s.safetensors").layers)
    assert one["coverage"]["tokens"] == 600
    assert 0 < one["mean"]["kept"] <= 1
    table = moekern("inspect", work / "s.safetensors", "--criterion", "reap", "--keep", 4)
    assert f"{one['mean']['kept']:.3f}" in table.stdout
    unknown = moekern("inspect", work / "s.safetensors", "--criterion", "hope")
    assert "is not known of hope" in unknown.stderr
    wrong = moekern("inspect", work / "s.safetensors", "--keep", 99)
    assert (wrong.returncode, wrong.stderr[:20]) == (2, "moekern: --keep 99: ")


def test_calibrate_tells_the_same(work: Path, tmp_path: Path) -> None:
    found = document(*_calibrate(work, tmp_path / "s", "--keep", 4))
    assert found["enough"] == document("inspect", work / "s.safetensors", "--keep", 4)["enough"]
    late = moekern(*_calibrate(work, tmp_path / "t", "--keep", 1))
    assert late.returncode == 0
    assert "whether the text was enough is not known: --keep 1" in late.stderr


def test_a_plan_of_little_text_is_doubted(work: Path, tmp_path: Path) -> None:
    done = moekern("plan", work / "s.safetensors", "--keep", 4, "--out", tmp_path / "p.json", "--json")
    notes = [json.loads(line).get("note", "") for line in done.stderr.splitlines()]
    assert [note for note in notes if note.startswith("warning: little text decides what gated_norm keeps: of 600 ")]


def test_until_stable_goes_on_with_the_part_that_it_was_in(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measured = tmp_path / "s", []

    def count(checkpoint: object, data: Any, *more: Any, **options: Any) -> Statistics:
        measured.append(data.recipe["part"]["a"])
        if measured == [[0, 2], [2, 4], [4, 8]]:
            raise KeyboardInterrupt
        return calibrate(checkpoint, data, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "calibrate", count)
    command = _calibrate(work, out, "--until-stable", 1, "--criterion", "reap", "--keep", 3)
    assert moekern(*command).returncode == 130
    assert (tmp_path / "s.moekern" / "part-1.safetensors").exists()
    done = moekern(*command)
    assert done.returncode == 0, done.stderr
    assert measured[3] == [4, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
    run = Statistics.load(out).header["runs"][0]
    assert run["chunks"] == {"a": measured[-1][1]}
    assert run["data"]["until_stable"] == {"threshold": 1.0, "criterion": "reap", "keep": [3]}


def _stopped(patch: pytest.MonkeyPatch, command: tuple[object, ...]) -> None:
    """The command, ended by Ctrl-C: in its second part, or in layer 2 of all the text, and that is written down."""
    load, parts = LayerwiseModel._load, []

    def stop(self: LayerwiseModel, i: int, after: int | None) -> None:
        parts.append(i)
        if i == 2 and (parts.count(2) == 2 or "--until-stable" not in command):
            raise KeyboardInterrupt
        load(self, i, after)

    with patch.context() as patched:
        patched.setattr(LayerwiseModel, "_load", stop)
        patched.setattr(journal, "SHARE", 0)
        assert moekern(*command).returncode == 130


@pytest.mark.parametrize("parts_first", [True, pytest.param(False, marks=pytest.mark.whole)])
def test_text_in_parts_and_all_at_once_do_not_take_each_others_place(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts_first: bool
) -> None:
    """What one has left is named, untouched, to be gone on with, or removed to begin anew."""
    whole = _calibrate(work, tmp_path / "s")
    first, then = (*whole, "--until-stable", 1), whole
    first, then = (first, then) if parts_first else (then, first)
    _stopped(monkeypatch, first)
    before = contents(tmp_path)
    done = moekern(*then)
    assert done.returncode == 2
    kept = f"a stopped run {'with' if parts_first else 'without'} --until-stable is kept there"
    assert kept in done.stderr.splitlines()[-1]
    assert before == {name: data for name, data in contents(tmp_path).items() if not name.endswith("work.lock")}
    assert "going on at layer" in moekern(*first).stderr
    (tmp_path / "s").unlink()
    _stopped(monkeypatch, first)
    assert moekern(*then, "--restart").returncode == 0
    assert set(contents(tmp_path)) == {"s"}


def test_a_part_that_was_begun_goes_with_those_that_are_done(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = _calibrate(work, tmp_path / "s", "--until-stable", 1)
    _stopped(monkeypatch, command)
    assert any("part-1" in name for name in contents(tmp_path))
    done = moekern(*command[:-1], 0.01, "--restart")
    assert (done.returncode, done.stderr.count("sets kept by the two halves")) == (0, 1)  # the first part is enough
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.whole
def test_parts_go_though_the_run_was_killed_when_all_was_measured(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 20, "--chunk", 1, "--until-stable", 1)
    run = ("run", work / "model", *data, "--keep", 4, "--no-forward", "--no-quality", "--out", tmp_path / "out")
    calibrate = _calibrate(work, tmp_path / "s", "--until-stable", 1)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "remove_parts", lambda side: None)
        assert moekern(*calibrate).returncode == moekern(*run).returncode == 0
    assert sum("part-0" in name for name in contents(tmp_path)) == 2
    assert "exists already" in moekern(*calibrate).stderr
    shutil.rmtree(tmp_path / "out")
    assert "using the statistics of an earlier run" in moekern(*run).stderr
    assert not any("part-" in name or name.startswith("s.") for name in contents(tmp_path))


def test_what_is_measured_of_all_text_at_once_takes_a_pass_of_its_own(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the text that was enough: what a calibration of that text alone measures; killed there, it goes on there."""
    tiers = ("--tier", "outliers", "--tier", "replay", "--replay-tokens", 30)
    command = _calibrate(work, tmp_path / "s", *tiers, "--until-stable", 0.01)
    measure, stopped = pipeline.calibrate, list[Any]()

    def interrupted(*arguments: Any, tiers: Any = (), **more: Any) -> Any:
        if tiers and not stopped:
            stopped.append(tiers)
            raise KeyboardInterrupt
        return measure(*arguments, tiers=tiers, **more)

    monkeypatch.setattr(pipeline, "calibrate", interrupted)
    assert moekern(*command).returncode == 130
    done = moekern(*command)
    assert (done.returncode, done.stderr.count("using the statistics of an earlier run")) == (0, 1), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    found = Statistics.load(tmp_path / "s")
    assert (found.tiers, found.header["tokens"]) == (("dimensions", "outliers", "replay"), {"a": 40})
    assert found.header["runs"][0]["chunks"] == {"a": 2}
    alone = _calibrate(work, tmp_path / "alone", *tiers, "--tokens", 40)
    assert moekern(*alone).returncode == 0
    one = Statistics.load(tmp_path / "alone")
    for key in one.layers:
        sums = found.layer(key).tensors()
        assert all(value.equal(sums[name]) for name, value in one.layer(key).tensors().items())


def test_another_process_that_measures_all_of_the_text_is_noticed_first(work: Path, tmp_path: Path) -> None:
    with replacing(tmp_path / "s") as temporary:
        done = moekern(*_calibrate(work, tmp_path / "s", "--until-stable", 1))
        assert temporary.exists()
    assert (done.returncode, done.stderr.count("tokens: sets kept")) == (2, 0)
    assert "another process is writing it" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--until-stable", 1.2), "--until-stable 1.2: expected a share"),
        (("--until-stable", 0.9, "--criterion", "hope"), "--until-stable: what hope keeps is not known"),
        (("--until-stable", 0.9, "--keep", 1), "--keep 1: "),
        (("--keep", "much"), "--keep much: "),
    ],
)
def test_what_cannot_be_is_refused(options: tuple[object, ...], message: str, work: Path, tmp_path: Path) -> None:
    done = moekern(*_calibrate(work, tmp_path / "s", *options))
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert done.stderr.startswith(f"moekern: {message}")


def test_run_stops_early_and_is_taken_over(work: Path, tmp_path: Path) -> None:
    data = ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 20, "--chunk", 1)
    command = ("run", work / "model", *data, "--keep", 4, "--until-stable", 0.3, "--no-forward", "--no-quality")
    first: Any = document(*command, "--out", tmp_path / "out")
    header = Statistics.load(first["statistics"]).header
    assert 0 < header["tokens"]["a"] < 600
    again = moekern(*command, "--out", tmp_path / "out")
    assert "using the statistics of an earlier run" in again.stderr


def test_flags_of_the_other_kind_of_source_are_refused_by_name(work: Path) -> None:
    for name, flag, value in (
        ("s.safetensors", "--revision", "main"), ("model", "--keep", 4), ("model", "--criterion", "reap"),
    ):  # fmt: skip
        refused = moekern("inspect", work / name, flag, value)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert f"{flag} {value}: goes with a" in refused.stderr

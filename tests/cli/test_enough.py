"""Was the text enough? What the commands tell of it, and `--until-stable`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moekern.calibration.calibrate import calibrate
from moekern.cli import pipeline
from moekern.statistics.file import Statistics
from tests.helpers.commands import document, model_and_ids, moekern


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--until-stable", 1.2), "--until-stable 1.2: expected a share"),
        (("--until-stable", 0.9, "--criterion", "hope"), "--until-stable: what hope keeps is not known"),
        (("--until-stable", 0.9, "--tier", "replay"), "--until-stable: --tier replay is measured of the whole text"),
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

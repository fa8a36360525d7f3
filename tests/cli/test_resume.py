"""Commands that are stopped while text streams through a model go on, and end with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moekern import files
from moekern.errors import InputError
from moekern.model import journal, state_folder
from moekern.model.layerwise import LayerwiseModel
from moekern.plan.document import LayerPlan, Plan
from moekern.statistics.store import FileStore
from tests.helpers import killed
from tests.helpers.commands import Done, contents, model_and_ids, moekern
from tests.helpers.planted import plant

Command = Callable[[Path], tuple[object, ...]]
TIERS = ("outliers", "coalitions", "vocabulary", "gradient", "weights", "replay")


COMMANDS = ("evaluate", "refit", *(pytest.param(n, marks=pytest.mark.whole) for n in ("iterate", "tiers", "run")))
KILLS, MANY = 1, 13  # of each command; with --whole 52 of all


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, token ids, and a plan."""
    folder = model_and_ids(tmp_path_factory.mktemp("resume"))
    layers = {str(i): LayerPlan(tuple(range(i, i + 4))) for i in range(4)}
    Plan(layers, {}).save(folder / "plan.json")
    return folder


def text(work: Path, tokens: int = 200) -> tuple[object, ...]:
    return ("--data", f"a={work / 'ids.npy'}", "--data", f"b={work / 'ids.npy'}:2", "--sequence-length", 40,
            "--tokens", tokens, "--dtype", "fp32")  # fmt: skip


def commands(work: Path) -> dict[str, Command]:
    """Name -> target -> arguments."""
    model = work / "model"
    tiers = [each for tier in TIERS for each in ("--tier", tier)]
    narrow = ("--width", 16, "--no-forward")
    options = ("--keep", 4, "--rounds", 2, "--criterion", "reap")
    return {
        "calibrate": lambda out: ("calibrate", model, *text(work), "--out", out),
        "tiers": lambda out: ("calibrate", model, *text(work), *tiers, "--replay-tokens", 20, "--out", out),
        "iterate": lambda out: ("iterate", model, *text(work), *options, "--out", out),
        "evaluate": lambda out: ("evaluate", model, work / "plan.json", *text(work), "--json", "--spill", out.parent),
        "refit": lambda out: ("refit", model, work / "plan.json", *text(work, 800), "--refine", *narrow, "--out", out),
        "run": lambda out: ("run", model, *text(work, 400), "--keep", 4, "--no-forward", "--out", out),
    }


def left(folder: Path, done: Done) -> dict[str, object]:
    """All that a command has made: its files, and what a program reads of it."""
    assert done.returncode == 0, done.stderr
    return {**contents(folder), "printed": done.stdout if done.stdout.startswith("{") else ""}


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_again_and_again(work: Path, tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    """At any call that writes down how far a run is, or writes what it makes; each time the command is given again."""
    command, told, draw = commands(work)[name], tmp_path / "told", random.Random(name)
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    done = killed.command(command(tmp_path / "whole" / "out"), told)
    assert done is not None
    want, calls = left(tmp_path / "whole", done), killed.calls(told)
    out, kills, midway = tmp_path / "killed" / "out", 0, 0
    wanted = MANY if request.config.getoption("--whole") else KILLS
    while kills < wanted or out.parent.exists():
        out.parent.mkdir(exist_ok=True)
        done = killed.command(command(out), told, draw.randint(1, calls * 3 // 4) if kills < wanted else None)
        if done is None:
            kills += 1
            midway += any(path.name == state_folder.POSITION for path in out.parent.rglob("*"))
            continue
        if name != "run" and "exists already" in done.stderr:  # it was killed when all was done
            assert {**contents(out.parent), "printed": ""} == want
        else:
            assert left(out.parent, done) == want
        shutil.rmtree(out.parent)
    assert midway or wanted == KILLS  # as chance will have it


def stopped(command: tuple[object, ...], layer: int, number: int = 1) -> Done:
    """The command, ended by Ctrl-C when a layer is to be loaded for the n-th time."""
    load, met = LayerwiseModel._load, []

    def stop(self: LayerwiseModel, i: int, after: int | None) -> None:
        met.append(i)
        if met.count(layer) == number:
            raise KeyboardInterrupt
        load(self, i, after)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerwiseModel, "_load", stop)
        patch.setattr(journal, "SHARE", 0)
        done = moekern(*command)
    assert done.returncode == 130
    return done


def loaded(command: tuple[object, ...], *more: object) -> tuple[Done, list[int]]:
    """How the command ends, and the layers that it loads."""
    load, met = LayerwiseModel._load, []

    def note(self: LayerwiseModel, i: int, after: int | None) -> None:
        met.append(i)
        load(self, i, after)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerwiseModel, "_load", note)
        return moekern(*command, *more), met


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(work: Path, tmp_path: Path) -> None:
    command = commands(work)["calibrate"](tmp_path / "out")
    line = stopped(command, 2).stderr.splitlines()[-1]
    assert line == "moekern: stopped by Ctrl-C; the same command goes on at layer 3 of 4 (first pass)"
    assert (tmp_path / "out.moekern" / "state" / state_folder.POSITION).is_file()
    done, met = loaded(command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("going on at layer 3 of 4 (first pass), where a stopped run was") == 1
    assert met == [2, 3]
    assert moekern(*commands(work)["calibrate"](tmp_path / "fresh")).returncode == 0
    found = contents(tmp_path)
    assert set(found) == {"out", "fresh"}
    assert found["out"] == found["fresh"]


def test_an_error_says_how_to_go_on_too(work: Path, tmp_path: Path) -> None:
    command, finished = commands(work)["calibrate"](tmp_path / "out"), FileStore.put

    def refuse(self: FileStore, key: str, sums: Any) -> None:
        if key == "2":
            raise InputError("no more")
        finished(self, key, sums)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileStore, "put", refuse)
        patch.setattr(journal, "SHARE", 0)
        done = moekern(*command)
    assert done.returncode == 2
    assert done.stderr.endswith("moekern: no more; the same command goes on at layer 3 of 4 (first pass)\n")
    assert loaded(command)[1] == [2, 3]


def test_stopped_before_the_first_layer_nothing_is_left(work: Path, tmp_path: Path) -> None:
    assert stopped(commands(work)["calibrate"](tmp_path / "out"), 0).stderr.endswith("stopped by Ctrl-C\n")
    assert not list(tmp_path.iterdir())


def test_rounds_go_on_in_the_round_and_layer_that_was_stopped(work: Path, tmp_path: Path) -> None:
    command = commands(work)["iterate"](tmp_path / "out")
    assert "goes on at layer 4 of 4 (round 2)" in stopped(command, 3, 2).stderr
    done, met = loaded(command)
    assert (done.returncode, met) == (0, [3])
    assert set(contents(tmp_path)) == {"out"}


def changed(work: Path, folder: Path) -> Path:
    """The same model with another config."""
    shutil.copytree(work / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    return folder


@pytest.mark.parametrize(
    ("name", "what"),
    [("calibrate", "--tier"), ("calibrate", "text"), ("iterate", "--seed"), ("iterate", "config.json"),
     *(pytest.param(*each, marks=pytest.mark.whole) for each in (
         ("calibrate", "--dtype"), ("calibrate", "config.json"), ("iterate", "--rounds")))],
)  # fmt: skip
def test_what_has_changed_is_refused_by_name_or_begun_anew(work: Path, tmp_path: Path, name: str, what: str) -> None:
    out, fresh = tmp_path / "here" / "out", tmp_path / "fresh" / "out"
    out.parent.mkdir()
    fresh.parent.mkdir()
    command = commands(work)[name]
    stopped(command(out), 2)
    before = contents(out.parent)
    other = {"--seed": 3, "--dtype": "bf16", "--tier": "reap", "--rounds": 4}
    model = {"config.json": changed(work, tmp_path / "other") if what == "config.json" else work / "model"}
    arguments = lambda out: [  # noqa: E731
        model.get(what, each) if each == work / "model" else each for each in command(out)
    ] + ([what, other[what]] if what in other else ["--tokens", 120] if what == "text" else [])  # fmt: skip
    done = moekern(*arguments(out))
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"moekern: {out.with_name('out.moekern')}/state: a stopped run is kept there, with another")
    assert what in line
    assert what != "--tier" or "--tier (none then, reap now)" in line
    assert "or --restart begins anew" in line
    assert contents(out.parent) == before
    done, met = loaded(tuple(arguments(out)), "--restart")
    assert done.returncode == 0, done.stderr
    assert met[0] == 0
    assert moekern(*arguments(fresh)).returncode == 0
    assert contents(out.parent) == contents(fresh.parent)


def test_another_evaluation_leaves_the_stopped_one_alone(work: Path, tmp_path: Path) -> None:
    command = commands(work)["evaluate"](tmp_path / "out")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    command = (*command[:-1], tmp_path / "link")  # --spill
    stopped(command, 2)
    before = contents(tmp_path)
    assert before
    other = loaded(command, "--seed", 1)
    assert (other[0].returncode, other[1]) == (0, [0, 1, 2, 3])
    assert contents(tmp_path) == before
    assert loaded(command)[1] == [2, 3]
    assert not list((tmp_path / "real").iterdir())


def test_an_evaluation_leaves_nothing_in_the_model(work: Path, tmp_path: Path) -> None:
    """A stopped one's states would be copied with the model's side files."""
    (tmp_path / "link").symlink_to(work / "model")
    done = moekern(*commands(work)["evaluate"](tmp_path / "link" / "out"))
    assert done.returncode == 2
    assert f"--spill {tmp_path / 'link'}: lies inside the model" in done.stderr


@pytest.mark.parametrize(
    ("name", "what"),
    [("", "link"), ("state", "link"), ("state", "pipe"), ("state/position.json", "link"),
     ("state/states-0.0", "pipe"), ("state/states-0.0", "folder")],
)  # fmt: skip
def test_what_is_planted_is_refused(work: Path, tmp_path: Path, name: str, what: str) -> None:
    out, elsewhere = tmp_path / "here" / "out", tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    path = files.work_path(out) / name
    path.parent.mkdir(parents=True)
    plant(what, path, elsewhere)
    done = moekern(*commands(work)["calibrate"](out))
    assert done.returncode == 2
    assert f"{path}: " in done.stderr.splitlines()[-1]
    assert elsewhere.read_text() == "mine"
    assert os.path.lexists(path)
    assert not out.exists()


def test_what_is_not_moekerns_stays(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files.state_path(out).mkdir(parents=True)
    (files.state_path(out) / "mine").write_text("mine")
    stopped(commands(work)["calibrate"](out), 2)
    assert moekern(*commands(work)["calibrate"](out)).returncode == 0
    assert set(contents(tmp_path)) == {"out", "out.moekern/state/mine"}


@pytest.mark.parametrize("damage", ["no JSON", "{}", "layer", "file", "statistics"])
def test_what_is_damaged_is_one_line(work: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    command = commands(work)["calibrate"](out)
    stopped(command, 2)
    position = files.state_path(out) / state_folder.POSITION
    found = json.loads(position.read_text())
    if damage == "file":
        (position.parent / found["files"][0]).write_bytes(b"0123")
    elif damage == "statistics":
        os.truncate(files.temporary_path(out), 0)
    elif damage == "layer":
        position.write_text(json.dumps({**found, "layer": -1}))
    else:
        position.write_text(damage)
    done = moekern(*command)
    assert done.returncode == 2
    assert "is damaged" in done.stderr.splitlines()[-1]
    assert moekern(*command, "--restart").returncode == 0
    assert set(contents(tmp_path)) == {"out"}


def test_a_disk_without_room_is_told_and_the_run_goes_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *arguments: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "write_states", full)
    done = moekern(*commands(work)["calibrate"](tmp_path / "out"))
    assert done.returncode == 0
    assert done.stderr.count("it is not written down how far this run is (No space left on device)") == 1
    assert set(contents(tmp_path)) == {"out"}


def test_killed_between_the_name_and_the_end(work: Path, tmp_path: Path) -> None:
    """Statistics that are there are refused as ever; what is left beside them is removed."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["moekern.calibration.calibrate"], "removed", lambda folder: None)
        assert moekern(*commands(work)["calibrate"](out)).returncode == 0
        assert moekern(*commands(work)["run"](tmp_path / "run")).returncode == 0
    state = "run.moekern/statistics.safetensors.moekern/state/position.json"
    assert {"out.moekern/state/position.json", state} <= set(contents(tmp_path))
    assert "exists already" in moekern(*commands(work)["calibrate"](out)).stderr
    shutil.rmtree(tmp_path / "run")
    assert moekern(*commands(work)["run"](tmp_path / "run")).returncode == 0
    assert not any("state" in name or name.startswith("out.") for name in contents(tmp_path))

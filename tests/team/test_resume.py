"""A run of several processes, one of which is killed, goes on with any number of them, to the bytes of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moekern import files
from moekern.model import journal, state_folder
from moekern.plan.document import LayerPlan, Plan
from tests.helpers.commands import Done, contents, model_and_ids
from tests.helpers.ranks import torchrun

pytestmark = pytest.mark.xdist_group("stopped ranks")  # they are forked from one process
GOING_ON = "where a stopped run was"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, token ids, and a plan."""
    folder = model_and_ids(tmp_path_factory.mktemp("resume"))
    Plan({str(i): LayerPlan(tuple(range(i, i + 4))) for i in range(4)}, {}).save(folder / "plan.json")
    return folder


def command(work: Path, name: str, out: Path) -> Sequence[object]:
    """What each of them does: two passes with tiers, gradients, two rounds, losses of a plan, all of it."""
    ids = work / "ids.npy"
    text = ("--data", f"a={ids}", "--data", f"b={ids}:2", "--sequence-length", 16, "--tokens", 160, "--chunk", 1)
    tiers = ("--tier", "outliers", "--tier", "replay", "--replay-tokens", 10)
    rounds = ("--keep", 4, "--rounds", 2, "--criterion", "reap")
    model, dtype = work / "model", ("--dtype", "fp32")
    return {
        "calibrate": ("calibrate", model, *text, *dtype, *tiers, "--out", out),
        "gradients": ("calibrate", model, *text, *dtype, "--tier", "gradient", "--out", out),
        "iterate": ("iterate", model, *text, *dtype, *rounds, "--out", out),
        "evaluate": ("evaluate", model, work / "plan.json", *text[:-2], *dtype, "--batch-size", 1, "--layers",
                     "--spill", out.parent, "--json"),
        "run": ("run", model, *text, *dtype, "--keep", 4, "--no-forward", "--out", out),
    }[name]  # fmt: skip


def made(folder: Path, done: Done) -> dict[str, object]:
    """All that a command has made: its files, and what a program reads of it."""
    assert done.returncode == 0, done.stderr
    found = {name: value for name, value in contents(folder).items() if "manifest" not in name}
    return {**found, "printed": json.loads(done.stdout) if done.stdout.startswith("{") else ""}


def after_every_layer(rank: int) -> None:
    journal.SHARE = 0


def killed_at_layer(number: int, killed: int, rank: int) -> None:
    """How far the run is is written down after every layer; one rank is killed when the n-th of all is to be loaded."""
    from moekern.model.layerwise import LayerwiseModel

    after_every_layer(rank)
    load, loads = LayerwiseModel._load, 0

    def counted(self: LayerwiseModel, i: int, after: int | None) -> None:
        nonlocal loads
        loads += 1
        if loads == number and rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        load(self, i, after)

    LayerwiseModel._load = counted  # type: ignore[method-assign]


def killed_while_written(step: str, number: int, killed: int, rank: int) -> None:
    """One rank is killed before a step of writing down how far the run is is taken for the n-th time."""
    after_every_layer(rank)
    place: Any = {"write_states": journal, "write_bytes": files, "_drop": journal.Journal}[step]
    take, taken = getattr(place, step), 0

    def counted(*arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == number and rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(*arguments)

    setattr(place, step, counted)


def stopped(folder: Path, size: int, words: Sequence[object], layer: int, rank: int) -> list[Done]:
    done = torchrun(folder / "said", size, *words, before=partial(killed_at_layer, layer, rank))
    shutil.rmtree(folder / "said")
    assert all(each.returncode for each in done), done
    return done


def gone_on(folder: Path, size: int, words: Sequence[object]) -> Done:
    done = torchrun(folder / "said", size, *words, before=after_every_layer)
    shutil.rmtree(folder / "said")
    assert [each.returncode for each in done] == [0] * size, done
    assert [(each.stdout, each.stderr) for each in done[1:]] == [("", "")] * (size - 1)
    return done[0]


# Layers are loaded 4 times a pass: the command, then (ranks, layer that is come to, rank that is killed) of each try.
TRIES: list[Any] = [
    ("calibrate", [(2, 3, 1), (1, 4, 0)]),  # the first pass at layer 3, the second at 2
    pytest.param("gradients", [(2, 7, 1), (1, 4, 0)], marks=pytest.mark.whole),  # the way forward, and the way back
    pytest.param("calibrate", [(2, 3, 1), (3, 4, 0), (1, 2, 0), (2, 1, 1)], marks=pytest.mark.whole),
    pytest.param("iterate", [(2, 3, 1), (1, 5, 0)], marks=pytest.mark.whole),  # both rounds
    ("evaluate", [(2, 2, 0), (3, 2, 1)]),
    pytest.param("run", [(2, 4, 1), (1, 3, 0)], marks=pytest.mark.whole),  # while it calibrates, and evaluates
]


@pytest.mark.parametrize(("name", "tries"), TRIES)
def test_any_number_of_ranks_goes_on(work: Path, tmp_path: Path, name: str, tries: list[tuple[int, int, int]]) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole = gone_on(tmp_path, 1, command(work, name, tmp_path / "whole" / "out"))
    want = made(tmp_path / "whole", whole)
    words = command(work, name, tmp_path / "killed" / "out")
    for number, (size, layer, rank) in enumerate(tries):
        done = stopped(tmp_path, size, words, layer, rank)
        assert number == 0 or size == 1 or rank == 0 or GOING_ON in done[0].stderr
        assert any(path.name == state_folder.POSITION for path in (tmp_path / "killed").rglob("*"))
    done = gone_on(tmp_path, 3 if tries[-1][0] != 3 else 2, words)
    assert GOING_ON in done.stderr
    assert made(tmp_path / "killed", done) == want


# (ranks, step, time, rank that is killed), each after the other: none comes further than two layers.
STEPS: list[tuple[int, str, int, int]] = [
    (2, "write_states", 2, 1),
    (2, "write_bytes", 2, 0),  # the position, when all states are there
    (3, "_drop", 1, 0),  # the position is there, and states of the one before too
]
MORE = [(3, "write_states", 1, 0), (2, "_drop", 2, 1)]


@pytest.mark.parametrize(
    "steps", [STEPS, pytest.param([STEPS[0], MORE[0], *STEPS[1:], MORE[1]], marks=pytest.mark.whole)]
)
def test_killed_while_it_is_written_down(work: Path, tmp_path: Path, steps: list[tuple[int, str, int, int]]) -> None:
    gone_on(tmp_path, 1, command(work, "calibrate", tmp_path / "whole"))
    words = command(work, "calibrate", tmp_path / "out")
    for size, step, number, killed in steps:
        done = torchrun(tmp_path / "said", size, *words, before=partial(killed_while_written, step, number, killed))
        assert done[killed].returncode == -signal.SIGKILL, (step, done)
        assert (tmp_path / "out.moekern" / "state" / state_folder.POSITION).exists()
    assert GOING_ON in gone_on(tmp_path, 3, words).stderr
    assert set(contents(tmp_path)) == {"out", "whole"}
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_rank_that_died_is_named_and_how_to_go_on(work: Path, tmp_path: Path) -> None:
    done = stopped(tmp_path, 3, command(work, "calibrate", tmp_path / "out"), 3, 2)
    said = [line for each in done for line in each.stderr.splitlines() if line.startswith("moekern: ")]
    assert len(said) == 1
    assert said[0].startswith("moekern: rank 2 (on ")
    assert said[0].endswith(
        "has died; the run ends on all ranks; the same command goes on at layer 3 of 4 (first pass)"
    )


def without_the_folder(blind: int, rank: int) -> None:
    """A rank for which nothing is there that another one writes down."""
    after_every_layer(rank)
    if rank == blind:
        there = os.path.lexists
        os.path.lexists = lambda path: "state" not in Path(path).parts and there(path)  # type: ignore[assignment]


def test_a_folder_that_not_all_nodes_see(work: Path, tmp_path: Path) -> None:
    words = command(work, "calibrate", tmp_path / "out")
    done = torchrun(tmp_path / "said", 2, *words, before=partial(without_the_folder, 1))
    assert [each.returncode for each in done] == [0, 0], done
    line = f"{tmp_path / 'out.moekern' / 'state'}: rank 1 does not see what is written there, as all nodes must"
    assert done[0].stderr.count(f"{line}; if this run is stopped, it begins anew") == 1
    assert not (tmp_path / "out.moekern").exists()
    (tmp_path / "out").unlink()
    stopped(tmp_path, 2, words, 3, 1)
    before = contents(tmp_path)
    done = torchrun(tmp_path / "said", 2, *words, before=partial(without_the_folder, 1))
    assert [each.returncode for each in done] == [2, 2]
    assert done[0].stderr.splitlines()[-1] == (
        f"moekern: {line}, to go on where a stopped run was; share that folder, or --restart begins anew"
    )
    shutil.rmtree(tmp_path / "said")
    assert contents(tmp_path) == before
    assert gone_on(tmp_path, 1, words).returncode == 0


def no_room(rank: int) -> None:
    def full(self: journal.Journal, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    after_every_layer(rank)
    if rank == 1:
        journal.Journal._check_room = full  # type: ignore[method-assign]


def test_a_rank_without_room_is_told_and_the_run_goes_on(work: Path, tmp_path: Path) -> None:
    done = torchrun(tmp_path / "said", 2, *command(work, "calibrate", tmp_path / "out"), before=no_room)
    assert [each.returncode for each in done] == [0, 0], done
    assert done[0].stderr.count("it is not written down how far this run is (No space left on device)") == 1
    assert done[1].stderr == ""
    shutil.rmtree(tmp_path / "said")
    assert set(contents(tmp_path)) == {"out"}

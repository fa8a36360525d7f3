"""What a stopped run goes on from: written after a layer, within bounds, read as it was written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern import files
from moekern.calibration.calibrate import calibrate
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.model import journal, state_folder
from moekern.model.compute import Compute
from moekern.model.journal import Resume, opened
from moekern.model.layerwise import LayerwiseModel
from moekern.model.position import differences
from moekern.model.state_files import StateFiles, write_states
from moekern.model.states import State, States
from tests.helpers import families

MakeCheckpoint = Callable[[str], Path]
# Hidden states alone, with what an indexer has chosen beside them, and whole forward passes, which are not kept.
FAMILIES = [
    ("qwen3_moe", "outliers", True),
    ("qwen3_moe", "gradient", True),
    ("glm_moe_dsa", "outliers", True),
    ("inkling2_text", "outliers", False),
]


def states(*names: Any) -> States:
    found = States()
    for number, name in enumerate(names):
        hidden = torch.full((2, 3), number + 0.5, dtype=torch.bfloat16)
        found.put(name, State(hidden, {("mask", 1): torch.tensor([number])}), lasting=isinstance(name, tuple))
    return found


def test_states_of_several_writers_are_found_by_name(tmp_path: Path) -> None:
    write_states(tmp_path / "states-0.0", states(0, ("input", 1, 0)), [0, ("input", 1, 0)])
    write_states(tmp_path / "states-0.1", states(7), [7])
    found = StateFiles([tmp_path / "states-0.0", tmp_path / "states-0.1"])
    assert set(found) == {0, ("input", 1, 0), 7}
    for name, number in ((0, 0), (("input", 1, 0), 1), (7, 0)):
        assert found[name].hidden.dtype == torch.bfloat16
        assert torch.equal(found[name].hidden, torch.full((2, 3), number + 0.5, dtype=torch.bfloat16))
        assert found[name].beside[("mask", 1)].tolist() == [number]
    found.close()


@pytest.mark.parametrize("cut", [0, 7, 20, 200])
def test_a_file_that_is_cut_is_no_file_of_states(tmp_path: Path, cut: int) -> None:
    write_states(tmp_path / "states-0.0", states(0, 1), [0, 1])
    os.truncate(tmp_path / "states-0.0", cut)
    with pytest.raises(ValueError):  # noqa: PT011  whatever it is, it is told of the folder
        StateFiles([tmp_path / "states-0.0"])


def test_states_that_never_change_are_written_once(tmp_path: Path) -> None:
    resume, held = Resume(tmp_path / "state", tell=lambda line: None), states(("input", 1, 0), 0)
    with pytest.MonkeyPatch.context() as patch, opened(resume, {}, ["a"]) as mine:
        patch.setattr(journal, "SHARE", 0)
        assert mine is not None
        for layer in (1, 2, 3):
            mine.stage("a").save(layer, 4, held, lambda: None, {})
            held.take(0)
            held.put(0, State(torch.full((1,), float(layer)), {}))
            held.put(("input", layer + 1, 0), State(torch.zeros(1), {}), lasting=True)
    assert {path.name for path in resume.folder.iterdir()} == {
        "position.json", "lasting-0.0", "lasting-1.0", "lasting-2.0", "states-0.0"
    }  # fmt: skip
    with opened(resume, {}, ["a"]) as again:
        assert again is not None
        assert again.found is not None
        assert again.found.layer == 3
        other = States()
        again.stage("a").take_over(other)
        assert set(other.there) == {("input", 1, 0), ("input", 2, 0), ("input", 3, 0), 0}
        assert other.take(0).hidden.tolist() == [2.0]
        assert other.take(("input", 1, 0)).hidden[0, 0] == 0.5
    state_folder.removed(resume.folder)
    assert not list(tmp_path.iterdir())


def test_states_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    resume = Resume(tmp_path / "state", tell=lambda line: None)
    with opened(resume, {}, ["a"]) as mine:
        assert mine is not None
        mine.stage("a").save(1, 2, states(0, 1), lambda: None, {})
    with opened(resume, {}, ["a"]) as again:
        assert again is not None
        again.stage("a").take_over(States(), [0, 1])
        with pytest.raises(InputError, match="what a stopped run has left there lacks some of the text"):
            again.stage("a").take_over(States(), [0, 1, 2])


def test_writing_takes_no_more_than_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second to write, ten seconds to compute a layer: written every second or third layer, and at the end."""
    now = [0.0]

    def write(*arguments: Any) -> None:
        now[0] += 1

    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(journal, "write_states", write)
    written = []
    with opened(Resume(tmp_path / "state"), {}, ["a"]) as mine:
        assert mine is not None
        for layer in range(1, 12):
            now[0] += 10
            before = mine.position
            mine.stage("a").save(layer, 11, states(0), lambda: None, {})
            written += [layer] if mine.position is not before else []
    assert written == [1, 3, 5, 7, 9, 11]


def test_two_processes_with_one_folder(tmp_path: Path) -> None:
    said: list[str] = []
    resume = Resume(tmp_path / "state", tell=said.append)
    with opened(resume, {}, ["a"]) as one, opened(resume, {}, ["a"]) as two:
        assert one is not None
        assert two is None
    assert [line for line in said if "another process is at work there" in line] == said != []


def test_what_differs_is_named() -> None:
    then = {"model": "a" * 64, "--dtype": "float32", "text": {"ids": "b" * 64, "recipe": {"seed": 0}}, "old": 1}
    now = {"model": "c" * 64, "--dtype": "bfloat16", "text": {"ids": "b" * 64, "recipe": {"seed": 1}}}
    said = "model, --dtype (float32 then, bfloat16 now), text (recipe (seed (0 then, 1 now))), old (1 then, none now)"
    assert differences(then, now) == said
    assert differences(then, then) == ""


def test_a_position_without_a_key_is_told_of_its_folder(tmp_path: Path) -> None:
    resume = Resume(tmp_path / "state")
    with opened(resume, {"a": 1}, ["a"]) as mine:
        assert mine is not None
        mine.stage("a").save(1, 2, states(0), lambda: None, {})
    found = json.loads(resume.position.read_text())
    resume.position.write_text(json.dumps({**found, "key": []}))
    message = f"{resume.folder}: what a stopped run has left there is damaged .*; --restart begins anew"
    with pytest.raises(InputError, match=message), opened(resume, {"a": 1}, ["a"]):
        pass


def of_family(name: str) -> TokenData:
    batches = [Batch(domain, families.input_ids(name, 2, 12, seed)) for seed, domain in enumerate("aab")]
    return TokenData(tuple(batches), {"seeds": 3})


@pytest.mark.parametrize(("name", "tier", "kept"), FAMILIES)
@pytest.mark.filterwarnings("ignore:decoder layer")
def test_families_go_on_with_the_layer_they_were_in(
    name: str, tier: str, kept: bool, family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped whenever a third layer is to be loaded."""
    monkeypatch.setattr(journal, "SHARE", 0)
    said: list[str] = []
    arguments = (family_checkpoint(name), of_family(name), Compute("cpu"))
    calibrate(*arguments, tiers=[tier], out=tmp_path / "whole")
    load, loads = LayerwiseModel._load, 0

    def stop(self: LayerwiseModel, i: int, after: int | None) -> None:
        nonlocal loads
        loads += 1
        if loads % 3 == 0:
            raise KeyboardInterrupt
        load(self, i, after)

    monkeypatch.setattr(LayerwiseModel, "_load", stop)
    resume, stops = Resume(files.state_path(tmp_path / "out"), tell=said.append), 0
    while not (tmp_path / "out").exists():
        try:
            calibrate(*arguments, tiers=[tier], out=tmp_path / "out", resume=resume)
        except KeyboardInterrupt:
            stops += 1
            if not kept:
                break
    assert stops
    if kept:
        assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
        assert sum("going on" in line for line in said) >= stops - 1
        assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    else:
        assert any("nothing is written down" in line for line in said)


def test_another_key_is_refused_by_name(tmp_path: Path) -> None:
    resume = Resume(files.state_path(tmp_path / "out"))
    with opened(resume, {}, ["a"]) as mine:
        assert mine is not None
        mine.stage("a").save(1, 2, states(0), lambda: None, {})
    message = r"with another a key \(none then, 1 now\); give the same again and it goes on at layer 2 of 2"
    with pytest.raises(InputError, match=message), opened(resume, {"a key": 1}, ["a"]):
        pass

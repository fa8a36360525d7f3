"""The stage: what it leaves and goes on with, what is best, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.evaluation.losses import Loss
from moekern.pruning.prune import prune
from moekern.recovery import Recovery, Training, recover
from moekern.recovery.recover import BEST, STATE, _Run
from moekern.recovery.steps import Steps
from moekern.recovery.trained import Trained
from tests.helpers import families, remote_code
from tests.helpers.commands import contents
from tests.helpers.in_flight import random_plan
from tests.helpers.recovering import FLOAT32, data, predictions

STEPS = Training(train=("router", "norms"), step_tokens=64, top=8, every=1)  # 4 steps, 5 looks


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """What is run in threads has other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(_one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, half of it, and what an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("work")
    model = families.save("qwen3_moe", folder / "model")
    prune(model, random_plan(find_layout(open_checkpoint(model)), 0), folder / "half")
    trained(folder, folder / "want")
    return folder


def trained(work: Path, out: Path, training: Training = STEPS, **options: Any) -> Recovery:
    return recover(work / "half", work / "model", data(20), out, training, FLOAT32, **options)


class Stopped(Exception):
    pass


def test_losses_fall_and_the_best_state_is_told(work: Path, tmp_path: Path) -> None:
    found = trained(work, tmp_path)
    looks = [each for each in found.curve if "held" in each]
    assert [each["step"] for each in looks] == [0, 1, 2, 3, 4]
    assert [each["step"] for each in found.curve if "rate" in each] == list(range(1, 5))
    assert found.best == min(looks, key=lambda each: each["held"]["a"]["kl"])["step"] > 0
    assert found.held[0] == {"a": Loss(**looks[0]["held"]["a"])}
    assert found.held[1] == {"a": Loss(**looks[found.best]["held"]["a"])}
    assert found.held[1]["a"].kl < found.held[0]["a"].kl
    assert (found.judged[0]["a"].tokens, found.held[0]["a"].tokens) == (2 * 15, 15)
    assert found.steps == 4
    assert contents(tmp_path) == contents(work / "want")


@pytest.mark.parametrize(
    "stop", ["step", "best", "written", *(pytest.param(each, marks=pytest.mark.whole) for each in ("look", "saved"))]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    stop: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, at a look, between the best state and how far it is, and while the tensors are written."""
    owner, name, at = {
        "step": (Steps, "step", 3), "look": (Steps, "look", 4), "saved": (Trained, "save", 4),
        "best": (Trained, "save", 3), "written": (_Run, "finished", 1),
    }[stop]  # fmt: skip
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and stop != "written":
            raise Stopped
        found = original(*arguments, **options)
        if calls == at:
            raise Stopped
        return found

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(Stopped):
            trained(work, tmp_path)
    said: list[str] = []
    found = trained(work, tmp_path, tell=said.append)
    assert any("going on after step" in line for line in said)
    assert contents(tmp_path) == contents(work / "want")
    assert [each["step"] for each in found.curve if "rate" in each] == list(range(1, 5))


def test_a_stopped_run_of_another_kind_is_refused_by_name(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, changed = tmp_path / "out", tmp_path / "config"
    with monkeypatch.context() as patch:
        step = Steps.step
        patch.setattr(Steps, "step", lambda self, *rest: stop() if self.trained.steps == 2 else step(self, *rest))
        with pytest.raises(Stopped):
            trained(work, out)
    before = contents(out)
    shutil.copytree(work / "half", changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    same = (work / "half", work / "model", data(20), STEPS, FLOAT32)
    for what, place, other in (
        ("config.json", 0, changed),
        ("model", 0, work / "model"),
        ("original", 1, work / "half"),
        ("text", 2, data(22)),
        ("training", 3, replace(STEPS, rate=0.02)),
        ("--dtype", 4, replace(FLOAT32, dtype="bfloat16")),
    ):
        pruned, original, text, training, compute = (*same[:place], other, *same[place + 1 :])  # type: ignore[misc]
        with pytest.raises(InputError, match=f"a stopped run is kept there, with another {what}.*--restart begins"):
            recover(pruned, original, text, out, training, compute)
        assert contents(out) == before
    trained(work, out)
    assert contents(out) == contents(work / "want")


def stop() -> None:
    raise Stopped


def test_restart_begins_anew(work: Path, tmp_path: Path) -> None:
    trained(work, tmp_path, replace(STEPS, rate=0.02))
    with pytest.raises(InputError, match="another training"):
        trained(work, tmp_path)
    trained(work, tmp_path, restart=True)
    assert contents(tmp_path) == contents(work / "want")


def test_what_was_left_and_is_spoilt_is_one_line(work: Path, tmp_path: Path) -> None:
    out, training = tmp_path / "out", replace(STEPS, rate=0.3)  # the best state is not the last
    assert trained(work, out, training).best < 4
    for name in (STATE, BEST):
        whole = (out / name).read_bytes()
        for how in ("cut", "other", "empty"):
            if how == "other":
                save_file({"value/other": torch.zeros(2)}, out / name, {"said": "{}"})
            else:
                (out / name).write_bytes(whole[:-40] if how == "cut" else b"")
            with pytest.raises(InputError, match="damaged .*; --restart begins anew|with another "):
                trained(work, out, training)
        (out / name).write_bytes(whole)
    trained(work, out, training)


def test_training_ends_where_looks_bring_nothing_and_the_best_state_is_written(work: Path, tmp_path: Path) -> None:
    training = replace(STEPS, rate=0.3, every=1, patience=2, warmup=0.0)
    found = trained(work, tmp_path, training)
    held = [each["held"]["a"]["kl"] for each in found.curve if "held" in each]
    assert found.steps == len(held) - 1 < 4
    assert held.index(min(held)) == found.best == found.steps - 2
    assert f"ended after step {found.steps} of 4: 2 looks brought nothing" in found.notes or found.best == 0
    best, state = load_file(tmp_path / BEST), load_file(tmp_path / STATE)
    for path in found.folder.iterdir():
        for name, value in load_file(path).items():
            assert torch.equal(value, best[f"value/{name}"])
    assert any(not torch.equal(value, state[name]) for name, value in best.items())


@pytest.mark.parametrize(
    "train", ["lora", *(pytest.param(kind, marks=pytest.mark.whole) for kind in ("router", "scale", "experts"))]
)
def test_where_nothing_is_better_everything_stays_as_it_was(train: str, work: Path, tmp_path: Path) -> None:
    training = Training(train=(train,), step_tokens=64, top=8, rate=30.0, warmup=0.0)
    found = trained(work, tmp_path, training)
    assert found.best == 0
    assert found.held[0] == found.held[1]
    assert found.judged[0] == found.judged[1]
    assert any("nothing is changed; a lower --rate may help" in note for note in found.notes)
    before = {name: value for path in (work / "half").glob("*.safetensors") for name, value in load_file(path).items()}
    for path in found.folder.iterdir():
        for name, value in load_file(path).items():
            assert value.view(torch.int32).equal(before[name].view(torch.int32)), name


def test_numbers_that_are_not_finite_are_one_line(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Trained.save

    def spoilt(self: Trained, *arguments: Any) -> None:
        save(self, *arguments)
        self.numbers["value", "model.layers.1.mlp.gate.weight"][0] = torch.inf

    monkeypatch.setattr(Trained, "save", spoilt)
    with pytest.raises(InputError, match="layer 1: .*not finite"):
        trained(work, tmp_path)


def test_too_little_text_is_told(work: Path, tmp_path: Path) -> None:
    found = recover(work / "half", work / "model", data(3), tmp_path, STEPS, FLOAT32)
    assert found.held == found.judged == ({}, {})
    assert found.best == found.steps == 1
    assert any("nothing chooses the best state, so the last one is written" in note for note in found.notes)
    with pytest.raises(InputError, match="no sequence of two tokens is there to train on"):
        recover(work / "half", work / "model", data(3, 1), tmp_path / "other", STEPS, FLOAT32)


@pytest.mark.parametrize(
    ("training", "line"),
    [
        (Training(train=("bias",)), "--train bias: qwen3_moe: its routers have no bias"),
        (Training(train=("scale", "down")), "--train scale,down: .* cannot train in two ways at once"),
        (Training(train=("lora", "all")), "cannot train in two ways at once"),
        (Training(train=("nothing",)), "--train nothing: expected some of bias"),
        (Training(train=()), "--train: name what trains"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_computed(
    training: Training, line: str, work: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=line):
        trained(work, tmp_path, training)
    assert not predictions(tmp_path)


def test_an_original_of_another_vocabulary_is_one_line(work: Path, tmp_path: Path) -> None:
    def config() -> Any:
        made = families.FAMILIES["qwen3_moe"]()
        made.vocab_size = 128
        return made

    families.build("qwen3_moe", config=config).save_pretrained(tmp_path / "other")
    for top in (8, "vocabulary"):
        with pytest.raises(InputError, match="128 .* 96"):
            recover(work / "half", tmp_path / "other", data(20), tmp_path / "out", replace(STEPS, top=top), FLOAT32)
    assert not predictions(tmp_path / "out")


def test_code_that_changes_numbers_in_place_is_one_line(tmp_path: Path) -> None:
    own = remote_code.write(tmp_path / "own", "in_place", layers=2)
    trusting = replace(FLOAT32, trust_remote_code=True)
    with pytest.raises(InputError, match="^recover: .*: its code changes numbers in place that gradients need$"):
        recover(own, None, data(20), tmp_path / "work", Training(kl=0, next=1), trusting)

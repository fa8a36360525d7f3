"""Rounds of dropping and training: what each has, what is left after a kill, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.checkpoint.recovery import RECOVERY
from moekern.errors import InputError
from moekern.recovery import Training, lottery
from moekern.recovery.lottery import PAPER, Drawn, Lottery
from tests.helpers import families
from tests.helpers.commands import contents, moekern
from tests.helpers.recovering import FLOAT32, data

TRAINING = Training(train=("router", "norms"), step_tokens=64, top=8)
METHOD = Lottery(4, 2, "gated_norm", 200, training=TRAINING)  # of 8 experts


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save("qwen3_moe", tmp_path_factory.mktemp("lottery") / "model")


def drawn(model: Path, place: Path, method: Lottery = METHOD, **options: Any) -> Drawn:
    return lottery.lottery(model, data(48), method, place / "out", place / "work", FLOAT32, **options)


@pytest.fixture(scope="module")
def want(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Drawn]:
    place = tmp_path_factory.mktemp("want")
    return place, drawn(model, place)


def test_experts_go_in_rounds_and_what_stays_is_trained(want: tuple[Path, Drawn], model: Path) -> None:
    place, found = want
    assert [(each.experts, each.tokens) for each in found.rounds] == [
        (6, 192),
        (4, 192),
    ]  # of 200 asked, in whole batches
    assert found.control is not None
    assert (found.control.experts, found.control.tokens) == (4, 384)
    for each in (*found.rounds, found.control):
        assert each.trained["a"].nll != each.dropped["a"].nll
        assert each.trained["a"].tokens == found.original["a"].tokens
    assert found.original["a"].kl == 0 < found.rounds[0].dropped["a"].kl
    assert find_layout(open_checkpoint(place / "out")).num_experts == 4
    record = json.loads((place / "out" / RECOVERY).read_text())
    assert (record["lottery"]["rounds"], record["of_round"]) == (2, "round-2")
    plan = json.loads((place / "out" / "moekern_plan.json").read_text())
    assert set(plan["source"]["recovery"]["tensors"]) == set(record["tensors"])  # the first round's, under the second's


def test_each_round_has_text_of_its_own_and_the_first_is_a_cut_with_part_of_it(want: tuple[Path, Drawn]) -> None:
    texts = [json.loads(path.read_text())["record"]["text"]["recipe"]["portion"]
             for path in sorted((want[0] / "work").glob("round-*/done.json"))]  # fmt: skip
    assert texts == [[0, 0.5], [0.5, 1]]


class Stopped(Exception):
    pass


STOPS = [("iterate", 2), ("prune", 1), ("recover", 2), ("write_replaced", 1), ("evaluate", 1)]


@pytest.mark.parametrize(
    ("stage", "call"),
    [stop if stop[0] == "recover" else pytest.param(*stop, marks=pytest.mark.whole) for stop in STOPS],
)
def test_one_that_is_stopped_goes_on_to_the_same_bytes(
    stage: str, call: int, want: tuple[Path, Drawn], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, own = list[int](), getattr(lottery, stage)

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == call:
            raise Stopped
        return own(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lottery, stage, stopped)
        with pytest.raises(Stopped):
            drawn(model, tmp_path)
    again = drawn(model, tmp_path)
    assert again.rounds == want[1].rounds
    assert again.control == want[1].control
    assert contents(tmp_path / "out") == contents(want[0] / "out")


def test_another_run_is_not_taken_over(want: tuple[Path, Drawn], model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="with another method .*tokens.*--restart begins anew"):
        lottery.lottery(model, data(48), replace(METHOD, tokens=100), tmp_path / "out", want[0] / "work", FLOAT32)


def test_tokens_stay_or_double() -> None:
    assert [METHOD.tokens_of(n) for n in (1, 2, 3)] == [200, 200, 200]
    doubling = replace(METHOD, tokens=200_000, doubling=True, rounds=4)
    assert ([doubling.tokens_of(n) for n in (1, 2, 3)], doubling.total) == ([200_000, 400_000, 800_000], 3_000_000)
    assert (PAPER.rate, PAPER.kl, PAPER.next) == (1e-6, 0, 1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--rounds", "9"), "--rounds 9: expected 1 to 4"),
        (("--tokens-per-round", "few"), "--tokens-per-round few: expected a number"),
        (("--paper", "1234.5678"), "--paper 1234.5678: expected 2504.05586"),
        (("--train", "heads"), "--train heads: expected some of bias"),
        ((), "lottery: it trains on text: give --data"),
    ],
)
def test_the_command_refuses_in_one_line(options: tuple[str, ...], line: str, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", data(40).batches[0].input_ids.repeat(1, 80)[0].numpy())
    text = ("--data", tmp_path / "a.npy", "--sequence-length", 16) if options else ()
    done = moekern("lottery", model, "--keep", 4, "--out", tmp_path / "out", *text, *options)
    assert done.returncode == 2
    assert line in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_a_command_leaves_that_was_killed_at_its_very_end_goes_with_the_next(
    want: tuple[Path, Drawn], model: Path, tmp_path: Path
) -> None:
    shutil.copytree(want[0] / "out", tmp_path / "out")
    (tmp_path / "out.moekern" / "lottery").mkdir(parents=True)
    done = moekern("lottery", model, "--keep", 4, "--out", tmp_path / "out", "--data", tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [tmp_path / "out"])

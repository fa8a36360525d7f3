"""Text that there is no room for is taken in groups of batches: the bits of one pass, stopped or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError, NoRoomForText
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import Evaluation
from moekern.model import journal, state_folder
from moekern.model.compute import Compute
from moekern.model.journal import Journal, Resume
from moekern.model.layerwise import LayerwiseModel
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.groups import merge_recipe
from moekern.tasks.questions import Question, answers
from tests.helpers import families
from tests.helpers.tight import little_room

MakeCheckpoint = Callable[[str], Path]
F32 = Compute(dtype="float32")
TOKEN = 4 * 32  # bytes of a hidden state
PLANS = {
    "half": Plan({str(i): LayerPlan((0, 2, 5, 7)) for i in range(4)}),
    "two": Plan({str(i): LayerPlan((1, 3)) for i in range(4)}),
}
DATA = TokenData(tuple(Batch(d, families.input_ids("qwen3_moe", 2, 8, n)) for n, d in enumerate("ababa")), {})


def alike(one: Evaluation, other: Evaluation) -> bool:
    """Sums of each sequence too, and those of buckets and layers."""
    rows = [(one[name][domain], other[name][domain]) for name in other for domain in other[name]]
    more = [(a.buckets or {}, b.buckets or {}) for a, b in rows]
    return (
        one == other
        and all(torch.equal(a.sums, b.sums) for a, b in rows if a.sums is not None and b.sums is not None)
        and all(a.layers == b.layers for a, b in rows)
        and all(torch.equal(a[axis], b[axis]) for a, b in more for axis in {**a, **b})
    )


@pytest.fixture
def two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two of the five batches, of the original and of two plans."""
    little_room(monkeypatch, 20 * TOKEN, 80 * TOKEN)


def test_losses_are_those_of_one_pass(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, counted = family_checkpoint("qwen3_moe"), list[tuple[float, int]]()
    whole = evaluate(folder, DATA, PLANS, F32)
    little_room(monkeypatch, 20 * TOKEN, 80 * TOKEN)
    with caplog.at_level("INFO", "moekern"):
        found = evaluate(folder, DATA, PLANS, F32, progress=lambda done, total: counted.append((done, total)))
    assert alike(found, whole)
    assert sum("the text is taken in 3 groups, each a pass over the weights" in line for line in caplog.messages) == 1
    assert counted[-1] == (12, 12)
    assert counted == sorted(counted)


def stopped(folder: Path, state: Path, layers: int) -> tuple[Evaluation | None, list[int]]:
    """Losses, or None where it was interrupted when so many layers were loaded; and which were."""
    load, met = LayerwiseModel._load, list[int]()

    def stop(self: LayerwiseModel, i: int, after: int | None) -> None:
        if len(met) == layers:
            raise KeyboardInterrupt
        met.append(i)
        load(self, i, after)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerwiseModel, "_load", stop)
        patch.setattr(journal, "SHARE", 0)
        try:
            return evaluate(folder, DATA, PLANS, F32, layers=True, resume=Resume(state, tell=lambda line: None)), met
        except KeyboardInterrupt:
            return None, met


def test_a_stopped_run_goes_on_in_the_group_and_layer_that_it_was_in(
    family_checkpoint: MakeCheckpoint, two_batches: None, tmp_path: Path
) -> None:
    """In the middle of the second group, then right behind it; nothing is left in the end."""
    folder = family_checkpoint("qwen3_moe")
    with pytest.MonkeyPatch.context() as patch:
        little_room(patch, 1 << 30, 0)
        whole = evaluate(folder, DATA, PLANS, F32, layers=True)
    assert stopped(folder, tmp_path, 6) == (None, [0, 1, 2, 3, 0, 1])
    assert stopped(folder, tmp_path, 2) == (None, [2, 3])
    found, met = stopped(folder, tmp_path, 100)
    assert met == [0, 1, 2, 3]
    assert found is not None
    assert alike(found, whole)
    assert not list(tmp_path.iterdir())


def test_without_room_to_write_states_down_whole_groups_are_kept(
    family_checkpoint: MakeCheckpoint, two_batches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Journal, nbytes: int) -> None:
        if nbytes:
            raise InputError("no room")

    folder = family_checkpoint("qwen3_moe")
    monkeypatch.setattr(Journal, "_check_room", full)
    assert stopped(folder, tmp_path, 6)[0] is None
    assert stopped(folder, tmp_path, 100)[1] == [0, 1, 2, 3] * 2


def test_less_room_on_the_way(family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is divided anew."""
    folder, load, met = family_checkpoint("qwen3_moe"), LayerwiseModel._load, list[int]()
    whole = evaluate(folder, DATA, PLANS, F32)

    def shrinking(self: LayerwiseModel, i: int, after: int | None) -> None:
        met.append(i)
        little_room(monkeypatch, 0, 50 * TOKEN)
        load(self, i, after)

    monkeypatch.setattr(LayerwiseModel, "_load", shrinking)
    little_room(monkeypatch, 20 * TOKEN, 80 * TOKEN)
    assert alike(evaluate(folder, DATA, PLANS, F32), whole)
    assert met == [0, 1, 2, 3] * 5


def test_a_batch_that_there_is_no_room_for_is_refused(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    little_room(monkeypatch, 0, 47 * TOKEN)
    with pytest.raises(NoRoomForText, match="240 tokens take 30.0 KiB of hidden states: memory has room for 0 B"):
        evaluate(family_checkpoint("qwen3_moe"), DATA, PLANS, F32)


def test_positions_that_cannot_be(family_checkpoint: MakeCheckpoint, two_batches: None, tmp_path: Path) -> None:
    folder = family_checkpoint("qwen3_moe")
    stopped(folder, tmp_path, 6)
    (path,) = tmp_path.rglob(state_folder.POSITION)
    path.write_text(path.read_text().replace('"batches": [', '"batches": [7, '))
    with pytest.raises(InputError, match="what a stopped run has left there is damaged"):
        stopped(folder, tmp_path, 100)


def test_answers_are_those_of_one_pass(family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family_checkpoint("qwen3_moe")
    questions = [Question(tuple(range(20, 24 + n)), 2) for n in range(6)]
    whole = answers(folder, questions, PLANS, F32)
    little_room(monkeypatch, 0, 40 * TOKEN)
    assert answers(folder, questions, PLANS, F32) == whole
    little_room(monkeypatch, 0, TOKEN)
    with pytest.raises(NoRoomForText):
        answers(folder, questions, PLANS, F32)


def test_plans_that_are_not_of_the_originals_weights_are_refused(family_checkpoint: MakeCheckpoint) -> None:
    """Of losses and answers alike: nothing would say that a refit is left out. What groups make of them is there."""
    folder, ask = family_checkpoint("qwen3_moe"), [Question((20, 21, 22), 1)]
    refit = {"recipe": "0" * 64, "layers": {"0": {}}}
    refitted = {"b": replace(PLANS["half"], provenance={"refit": refit})}
    for plans, words in ((refitted, "b: its layers were refitted"), ({"original": PLANS["half"]}, "named 'original'")):
        with pytest.raises(InputError, match=words):
            evaluate(folder, DATA, plans, F32)
        with pytest.raises(InputError, match=words):
            answers(folder, ask, plans, F32)
    groups = (((0, 1.0), (1, 2.0)), ((2, 1.0),), ((5, 1.0),), ((7, 1.0),))
    merged = Plan({str(i): LayerPlan((0, 2, 5, 7), groups=groups) for i in range(4)})
    made = {**refit, "recipe": merge_recipe(merged, open_checkpoint(folder).fingerprint)}
    found = answers(folder, ask, {"merged": merged, "written": replace(merged, provenance={"refit": made})}, F32)
    assert found["written"] == found["merged"]

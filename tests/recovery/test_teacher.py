"""What the original predicts, in a file: its numbers, what it is good for, and what becomes of it after a kill."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch
from moekern.errors import InputError
from moekern.model import journal
from moekern.model.layerwise import LayerwiseModel
from moekern.recovery import teacher as module
from moekern.recovery.course import Sample
from moekern.recovery.taught import taught
from moekern.recovery.teacher import Predicted, Teaching
from tests.helpers import families
from tests.helpers.commands import contents
from tests.helpers.recovering import FLOAT32, predictions
from tests.helpers.tight import little_room

MakeCheckpoint = Callable[[str], Path]
SIZES = ((2, 9), (1, 1), (1, 5))  # sequences and their length; nothing follows a single token
TEXT = tuple(Sample(n, Batch("a", families.input_ids("", *size, n))) for n, size in enumerate(SIZES))


def made(folder: Path, out: Path, top: int | str = 5, text: tuple[Sample, ...] = TEXT, **options: Any) -> Any:
    out.mkdir(exist_ok=True)
    return taught(open_checkpoint(folder), text, out, top, FLOAT32, families.VOCAB, **options)


@pytest.mark.parametrize("top", [1, 5, 200, "vocabulary"])
def test_the_file_holds_what_the_original_predicts(
    top: int | str, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any], tmp_path: Path
) -> None:
    teacher = made(family_checkpoint("qwen3_moe"), tmp_path / "work", top)
    file = load_file(*predictions(tmp_path / "work"))
    start = 0
    for sample in TEXT:
        logits = families.forward(whole_model("qwen3_moe"), sample.batch.input_ids)[:, :-1].flatten(0, 1)
        want, own = logits.double().log_softmax(-1), teacher.of(sample.place)
        rows = slice(start, start := start + len(want))
        if top == "vocabulary":
            assert own.ids is None
            torch.testing.assert_close(file["logp"][rows], want.float(), rtol=0, atol=1e-5)
            assert torch.equal(own.logp, file["logp"][rows])
        else:
            likeliest = want.topk(min(int(top), families.VOCAB), dim=1)
            assert (file["ids"].dtype, file["logp"].dtype) == (torch.int32, torch.float16)
            assert torch.equal(file["ids"][rows].long(), likeliest.indices)
            torch.testing.assert_close(file["logp"][rows].double(), likeliest.values, rtol=2**-10, atol=1e-5)
            assert torch.equal(own.ids, likeliest.indices)
            assert torch.equal(own.logp, file["logp"][rows].float())
        assert torch.equal(own.likeliest, want.argmax(1))
    assert len(file["logp"]) == start == 2 * 8 + 4
    assert not (tmp_path / "work" / "teaching").exists()


def test_it_is_computed_once_for_a_text_a_model_and_a_number_of_tokens(
    family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = family_checkpoint("qwen3_moe"), tmp_path / "work"
    other = families.save("qwen3_moe", tmp_path / "other", seed=1)
    made(model, out)
    before, runs, run = contents(out), list[int](), Teaching.run

    def counted(self: Teaching, *arguments: Any) -> None:
        runs.append(1)
        run(self, *arguments)

    monkeypatch.setattr(Teaching, "run", counted)
    made(model, out)
    assert (len(runs), contents(out)) == (0, before)
    changed = replace(TEXT[2], batch=Batch("a", TEXT[2].batch.input_ids + 1))
    cases: list[tuple[Path, int | str, tuple[Sample, ...]]] = [
        (other, 5, TEXT), (model, 6, TEXT), (model, 5, (*TEXT[:2], changed)),
    ]  # fmt: skip
    for count, (folder, top, text) in enumerate(cases, 1):
        made(folder, out, top, text)
        assert len(runs) == count
    made(model, out)
    assert len(runs) == len(cases)
    assert {name: data for name, data in contents(out).items() if name in before} == before
    made(model, out, restart=True)
    assert len(runs) == len(cases) + 1
    spoilt = next(name for name in before if name.endswith(".safetensors"))
    (out / spoilt).write_bytes(before[spoilt][:-4])
    made(model, out)
    assert len(runs) == len(cases) + 2
    assert {name: data for name, data in contents(out).items() if name in before} == before


def test_text_that_there_is_no_room_for_is_taken_in_groups(
    family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, stopped in the second group or not."""
    model, loads, told, token = family_checkpoint("qwen3_moe"), list[int](), list[float](), 4 * 32
    made(model, tmp_path / "want")
    load = LayerwiseModel._load

    def stop(self: LayerwiseModel, i: int, after: int | None) -> None:
        loads.append(i)
        if len(loads) == 7:
            raise Stopped
        load(self, i, after)

    monkeypatch.setattr(journal, "SHARE", 0)
    monkeypatch.setattr(LayerwiseModel, "_load", stop)
    little_room(monkeypatch, 8 * token, 10 * token)
    with pytest.raises(Stopped):
        made(model, tmp_path / "work")
    assert loads == [0, 1, 2, 3, 0, 1, 2]
    assert contents(tmp_path / "work") != contents(tmp_path / "want")
    made(model, tmp_path / "work", progress=lambda what, done, total: told.append(done / total))
    assert loads[7:] == [2, 3]
    assert (told[-1], told) == (1, sorted(told))
    assert contents(tmp_path / "work") == contents(tmp_path / "want")


class Stopped(Exception):
    pass


@pytest.mark.parametrize("layer", [0, 2, 3, "logits"])
def test_one_that_was_stopped_goes_on(
    layer: int | str, family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said, loads = family_checkpoint("qwen3_moe"), list[str](), list[int]()
    made(model, tmp_path / "want")
    monkeypatch.setattr(journal, "SHARE", 0)
    with monkeypatch.context() as patch:
        load, forward = LayerwiseModel._load, Teaching.forward

        def stop(self: LayerwiseModel, i: int, after: int | None) -> None:
            if i == layer:
                raise Stopped
            load(self, i, after)

        def stop_late(self: Teaching, task: Any) -> None:
            forward(self, task)
            if layer == "logits" and task.place == 1:  # behind the last layer
                raise Stopped

        patch.setattr(LayerwiseModel, "_load", stop)
        patch.setattr(Teaching, "forward", stop_late)
        with pytest.raises(Stopped):
            made(model, tmp_path / "work")
    load = LayerwiseModel._load
    monkeypatch.setattr(LayerwiseModel, "_load", lambda self, i, after: (loads.append(i), load(self, i, after))[1])
    made(model, tmp_path / "work", tell=said.append)
    assert loads == list(range(3 if layer == "logits" else int(layer), 4))
    assert len([line for line in said if "going on" in line]) == (layer != 0)
    assert contents(tmp_path / "work") == contents(tmp_path / "want")


def test_a_full_disk_is_one_line(
    family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "reserve", full)
    with pytest.raises(InputError, match="no room for what the original predicts .*No space.*smaller --top, take less"):
        made(family_checkpoint("qwen3_moe"), tmp_path / "work")
    assert not predictions(tmp_path / "work")


def test_a_vocabulary_whose_first_token_is_ruled_out(
    family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some models mask entries of the vocabulary that stand for nothing."""
    compute = LayerwiseModel.compute

    def masked(self: LayerwiseModel, batch: Batch) -> Any:
        found = compute(self, batch)
        found.logits[..., 0] = -torch.inf
        return found

    monkeypatch.setattr(LayerwiseModel, "compute", masked)
    own = made(family_checkpoint("qwen3_moe"), tmp_path / "work", "vocabulary").of(0)
    assert bool((own.logp[:, 0] == -torch.inf).all())


def test_what_is_not_finite_is_one_line(tmp_path: Path) -> None:
    folder = families.save("qwen3_moe", tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][3, 0] = np.nan
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="lm_head.weight"):
        made(folder, tmp_path / "work")


def test_predictions_of_rows_and_of_ties() -> None:
    own = Predicted.of(torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]), 2)
    assert own.ids is not None
    assert own.ids.tolist() == [[1, 2], [0, 2]]
    assert own.rows(slice(1, 2)).ids.tolist() == [[0, 2]]  # type: ignore[union-attr]
    assert own.likeliest.tolist() == [1, 0]
    assert Predicted.of(torch.zeros(2, 3), None).ids is None

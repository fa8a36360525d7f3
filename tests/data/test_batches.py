"""Batches that a caller makes are looked at before a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekern.calibration.calibrate import calibrate
from moekern.data.batches import SEGMENTS, Batch, TokenData
from moekern.demo import MODEL
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.held_out import held_back
from moekern.iteration.rounds import Method, iterate
from moekern.model.position import text_key


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1, 2]], TypeError, "input_ids: expected Tensor, got list"),
        (torch.arange(4), InputError, r"Batch of text: input_ids: expected int64 \[B, S\] on the CPU, got .* \[4\]"),
        (torch.ones(1, 4), InputError, r"expected int64 \[B, S\] on the CPU, got torch.float32 \[1, 4\] on cpu"),
        (torch.ones(1, 4, dtype=torch.int64, device="meta"), InputError, "on the CPU, got .* on meta"),
        (torch.tensor([[1, -1]]), InputError, "input_ids: -1 is no token id"),
    ],
)
def test_ids_that_are_no_batch_are_refused(ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Batch("text", ids)


@pytest.mark.parametrize("batch", ["text", Batch("mine", torch.tensor([[1, 10**6]]))], ids=["type", "vocabulary"])
def test_every_stage_looks_at_a_callers_batches(batch: Any) -> None:
    data = TokenData((Batch("text", torch.tensor([[1, 2]])), batch), {})
    folder = Path(MODEL)
    wanted: tuple[type[Exception], str] = (
        (InputError, "data: domain mine: token id 1000000 does not fit the model's vocabulary of [0-9]+")
        if isinstance(batch, Batch)
        else (TypeError, "data.batches: expected Batch, got str")
    )
    for stage in (
        lambda: calibrate(folder, data),
        lambda: evaluate(folder, data, {}),
        lambda: iterate(folder, data, Method("reap", keep=0.5)),
    ):
        with pytest.raises(wanted[0], match=wanted[1]):
            stage()


@given(st.lists(st.integers(1, 3 * SEGMENTS), min_size=1, max_size=3))
def test_each_domain_is_cut_into_segments_of_about_one_size(counts: list[int]) -> None:
    rows = tuple(Batch(str(d), torch.zeros(2 * n, 4, dtype=torch.int64)) for d, n in enumerate(counts))
    data = TokenData(rows, {}, chunk=2).by_chunk()
    for d, n in enumerate(counts):
        found = [s for batch, s in zip(data.batches, data.segments, strict=True) if batch.domain == str(d)]
        sizes = [found.count(s) for s in range(min(SEGMENTS, n))]
        assert found == sorted(found)
        assert sum(sizes) == len(found) == n
        assert max(sizes) - min(sizes) <= 1


def test_marks_of_answers_stay_with_their_sequences() -> None:
    ids = torch.arange(24).view(6, 4)
    marks = ids % 3 == 0
    batches = tuple(Batch("a", ids[n : n + 1], marks[n : n + 1]) for n in range(5)) + (Batch("a", ids[5:]),)
    data = TokenData(batches, {}, chunk=2)
    chunks = data.by_chunk().batches
    assert [len(batch.input_ids) for batch in chunks] == [2, 2, 1, 1]  # those without marks are a chunk of their own
    assert chunks[-1].answers is None
    kept, held = held_back(data)
    for batch in (*chunks, *kept.batches, *held.batches):
        if batch.answers is not None:
            assert torch.equal(batch.answers, batch.input_ids % 3 == 0)
    assert [batch.predicted for batch in chunks] == [int(marks[:2, 1:].sum()), int(marks[2:4, 1:].sum()), 1, 3]
    plain = TokenData(tuple(Batch("a", batch.input_ids) for batch in batches), {}, chunk=2)
    assert text_key(plain)["ids"] != text_key(data)["ids"]
    with pytest.raises(InputError, match=r"answers: expected bool \[1, 4\] on the CPU"):
        Batch("a", ids[:1], torch.ones(1, 3, dtype=torch.bool))

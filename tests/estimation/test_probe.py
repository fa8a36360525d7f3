"""The probe measures what it says at any shapes, and leaves nothing behind. How fast is no matter here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.estimation import probe as module
from moekern.estimation.probe import Shapes, probe, read_rate, seconds

MakeCheckpoint = Callable[[str], Path]
SHAPES = Shapes(64, 32, 48, 24, 8, 2, 4, 12, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.01)
    monkeypatch.setattr(module, "PROBED", 32 << 20)


@pytest.mark.parametrize(
    "shapes",
    [SHAPES, replace(SHAPES, dtype=torch.bfloat16), replace(SHAPES, tokens=1, sequence=1, experts=1, top_k=1, heads=1)],
    ids=["float32", "bfloat16", "one of each"],
)
def test_every_rate_is_a_number(shapes: Shapes, family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    rates = probe(open_checkpoint(family_checkpoint("qwen3_moe")), shapes, tmp_path)
    assert rates.transfer is None
    found = [rate for rate in vars(rates).values() if rate is not None]
    assert all(math.isfinite(rate.value) and rate.value > 0 for rate in found)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_an_expert_are_filled_up_as_they_are_when_measured() -> None:
    assert [replace(SHAPES, tokens=tokens).rows for tokens in (8, 64, 80, 81)] == [16, 16, 24, 24]


def test_wide_layers_are_timed_with_fewer_tokens() -> None:
    wide = replace(SHAPES, tokens=1 << 20, hidden=1 << 20, top_k=8)
    assert wide.timed * 8 << 20 <= 1 << 28
    assert replace(SHAPES, tokens=1 << 20).timed == 2048


def test_a_hole_says_nothing_of_a_disk(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(family_checkpoint("qwen3_moe"))
    assert read_rate(checkpoint).known == "measured"
    holes = tuple(replace(shard, path=tmp_path / shard.name) for shard in checkpoint.shards)
    for hole, shard in zip(holes, checkpoint.shards, strict=True):
        with hole.path.open("wb") as file:
            file.truncate(shard.path.stat().st_size)
    assert read_rate(replace(checkpoint, shards=holes)).known == "assumed"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none"):
        module.write_rate(tmp_path / "none")


def test_seconds_are_a_median_without_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now, spent = [0.0], iter([0.008, 0.001, 0.002, 0.001, 0.5])
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(spent)

    assert seconds(run) == pytest.approx(0.001)

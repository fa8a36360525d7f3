"""The table of tiers, and how tiers are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from moekern import kernels
from moekern.errors import InputError
from moekern.measurement.tiers import BY_BATCH, TABLE, wanted_tiers
from moekern.statistics.file import Statistics
from moekern.statistics.layer import HALVES, TIERS, LayerStatistics
from tests.helpers.commands import moekern as command

MakeCheckpoint = Callable[[str], Path]


def test_the_table_is_whole() -> None:
    assert set(TABLE) == set(TIERS) == {f.metadata["tier"] for f in fields(LayerStatistics)} - {"routed", HALVES}
    assert {op for tier in TABLE.values() for op in tier.ops} <= set(kernels.OPS)
    assert {other for tier in TABLE.values() for other in tier.implies} <= set(TABLE)
    assert BY_BATCH == (
        "dimensions", "constants", "stream", "vocabulary", "token_counts", "coalitions", "reap", "mixture", "gram"
    )  # fmt: skip


def test_names_of_tiers() -> None:
    assert wanted_tiers(("reap", "outliers", "routed"), TIERS, "x") == ("dimensions", "outliers", "reap")
    assert wanted_tiers(("routed",), TIERS, "x") == ()
    with pytest.raises(InputError, match="--tier magic: unknown; expected one of routed, dimensions"):
        wanted_tiers(("magic",), TIERS, "calibrate")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--tier", "magic"), "--tier magic: unknown; expected one of routed, "),
        (("--tier", "replay", "--replay-tokens", 0), "--replay-tokens 0: expected 1 or more"),
    ],
)
def test_flags_that_cannot_be(
    arguments: tuple[object, ...], error: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [20, 21, 22, 23]}')
    model = family_checkpoint("qwen3_moe")
    calibrate_ = ("calibrate", model, "--data", tmp_path / "ids.jsonl", "--out", tmp_path / "s.safetensors")
    done = command(*calibrate_, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert error in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "s.safetensors").exists()


def test_tiers_by_flag(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [' + ", ".join(str(20 + i % 70) for i in range(90)) + "]}")
    out = tmp_path / "s.safetensors"
    calibrate_ = ("calibrate", family_checkpoint("qwen3_moe"), "--data", tmp_path / "ids.jsonl", "--out", out)
    for flags, expected in (
        ((), ()),
        (("--tier", "routed"), ()),
        (("--criterion", "ean_dim", "--criterion", "reap", "--criterion", "naee"), ("dimensions", "replay")),
        (("--tier", "vocabulary", "--tier", "replay", "--replay-tokens", 7), ("vocabulary", "replay")),
    ):
        done = command(*calibrate_, *flags)
        assert done.returncode == 0, done.stderr
        sums = Statistics.load(out).layer("0")
        assert sums.tiers == expected
        assert int(sums.replay_tokens) == (7 if "--replay-tokens" in flags else 90 if "replay" in expected else 0)
        out.unlink()


def test_run_measures_what_the_criterion_needs(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [' + ", ".join(str(20 + i % 70) for i in range(90)) + "]}")
    out = tmp_path / "out"
    done = command(
        "run", family_checkpoint("qwen3_moe"), "--data", tmp_path / "ids.jsonl", "--keep", 4,
        "--criterion", "leave_one_out", "--out", out, "--no-forward",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Statistics.load(tmp_path / "out.moekern" / "statistics.safetensors").layer("0").tiers == ("replay",)

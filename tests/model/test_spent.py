"""What a run took, in time, and what the text will take."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from moekern.calibration import calibrate
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.model import spent
from moekern.model.expert_groups import Takes
from tests.helpers import families
from tests.helpers.commands import moekern

MakeCheckpoint = Callable[[str], Path]


def test_what_is_neither_waiting_nor_filling_is_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(spent.time, "monotonic", lambda: now)
    run = spent.Spent(begun=0)
    with run.waiting():
        now = 1
    with run.filling():
        now = 3
    now = 10
    assert run.shares == pytest.approx({"disk": 0.1, "loading": 0.2, "compute": 0.7})
    assert run.described.startswith("bound by computing: 70% computing, 20% ")


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_says_what_it_takes_and_what_bounded_it(
    family_checkpoint: MakeCheckpoint, tmp_path: Path, as_json: bool
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(16, 96, 256))
    flags = ["--sequence-length", 32, *(["--json"] if as_json else [])]
    data = f"a={tmp_path / 'ids.npy'}"
    done = moekern("calibrate", family_checkpoint("qwen3_moe"), "--data", data, "--out", tmp_path / "s", *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    (memory,) = (n for n, line in enumerate(lines) if "memory: " in line and "of hidden states" in line)
    (bound,) = (n for n, line in enumerate(lines) if "bound by " in line)
    assert memory < bound
    assert ("note" in lines[bound]) == as_json


class _Usage(NamedTuple):
    free: int


@pytest.mark.parametrize(("tiers", "what"), [((), "72 tokens take"), (("gradient",), "inputs of 5 layers take")])
def test_text_without_room_is_refused_before_anything_is_computed(
    tiers: tuple[str, ...], what: str, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: _Usage(100))
    monkeypatch.setattr(Takes, "room", property(lambda self: 100))
    data = TokenData((Batch("a", families.input_ids("qwen3_moe", 6, 12)),), {}, 1)
    with pytest.raises(InputError, match=f"{what} .*memory has room for 100 B, and .* for 100 B") as refused:
        calibrate(family_checkpoint("qwen3_moe"), data, tiers=tiers)
    assert refused.value.kind in ("memory", "option")

"""A layer that is larger than the budget is run in groups of experts, and gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekern.calibration import calibrate
from moekern.data.batches import Batch, TokenData
from moekern.model.compute import Compute
from tests.helpers import families
from tests.helpers.tight import cuts_of, tighten

MakeCheckpoint = Callable[[str], Path]
F32 = Compute(dtype=torch.float32)
TANGLED = ("inkling2", "inkling2_text", "mistral_large4")
RUN = [name for name in families.FAMILIES if name not in families.NO_CALIBRATION]


def text(name: str) -> TokenData:
    batches = [Batch(domain, families.input_ids(name, 3, 12, seed)) for seed, domain in enumerate(("a", "b"))]
    return TokenData(tuple(batches), {"seed": 0}, 1)


@pytest.mark.parametrize("name", [name for name in RUN if name not in TANGLED])
def test_statistics_are_those_of_whole_layers_bit_for_bit(
    name: str, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = family_checkpoint(name)
    tiers = ("dimensions", "coalitions")
    calibrate(folder, text(name), F32, tiers=tiers, out=tmp_path / "whole")
    tighten(monkeypatch, folder, F32)
    assert cuts_of(folder, F32) > 1
    calibrate(folder, text(name), F32, tiers=tiers, out=tmp_path / "groups")
    assert (tmp_path / "groups").read_bytes() == (tmp_path / "whole").read_bytes()

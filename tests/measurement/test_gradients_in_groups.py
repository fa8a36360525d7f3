"""The gradient tier of layers that are larger than the budget against that of whole layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekern import files
from moekern.architectures import family_named, find_layout
from moekern.calibration import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.measurement import gradients
from moekern.measurement.gradients import measure_gradients
from moekern.model import expert_groups, journal, paged
from moekern.model.compute import Compute
from moekern.model.journal import Resume
from moekern.model.layerwise import open_layerwise
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics
from tests.helpers import families
from tests.helpers.measured import close_gradients
from tests.helpers.tight import cuts_of, tighten

MakeCheckpoint = Callable[[str], Path]
F32 = Compute(dtype=torch.float32)
FIELDS = [f.name for f in fields(LayerStatistics) if f.metadata["tier"] == "gradient"]
WHOLE = {"jetmoe", "longcat_flash", "nemotron_h-latent"}  # whose experts, or other layers, cannot be divided
USUAL = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "dbrx")  # a kind of experts' call each
RUN = [
    name
    for name in families.FAMILIES
    if name not in {*families.NO_CALIBRATION, *WHOLE} and not family_named(name.split("-")[0]).no_gradient  # type: ignore[union-attr]
]


def text(name: str) -> TokenData:
    """Two batches of one domain, one of another, a sequence at a time."""
    batches = [Batch(domain, families.input_ids(name, 2, 12, seed)) for seed, domain in enumerate("aba")]
    return TokenData(tuple(batches), {}, 1)


def alike(got: Statistics, want: Statistics) -> None:
    for key, domains in want.layers.items():
        for domain, sums in domains.items():
            assert float(sums.gradient_norm_sum.max()) > 0
            for field in FIELDS:
                close_gradients(field, getattr(got.layers[key][domain], field), getattr(sums, field))


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.whole) for name in RUN]
)
def test_gradients_are_those_of_whole_layers(
    name: str, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint(name)
    whole = calibrate(folder, text(name), F32, tiers=("gradient",))
    tighten(monkeypatch, folder, F32)
    assert cuts_of(folder, F32) > 1
    alike(calibrate(folder, text(name), F32, tiers=("gradient",)), whole)
    assert torch.is_grad_enabled()


def test_neither_files_nor_the_number_of_groups_change_a_bit(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, compute = family_checkpoint("qwen3_moe"), Compute(dtype=torch.float32, spill=tmp_path)
    with monkeypatch.context() as patch:
        tighten(patch, folder, F32)
        held, groups = calibrate(folder, text("qwen3_moe"), compute, tiers=("gradient",)), cuts_of(folder, F32)
    tighten(monkeypatch, folder, F32, share=0.4)
    assert cuts_of(folder, F32) > groups
    monkeypatch.setattr(expert_groups.Takes, "room", property(lambda self: 4000))
    spilled = calibrate(folder, text("qwen3_moe"), compute, tiers=("gradient",))
    assert not list(tmp_path.iterdir())
    for key, domains in held.layers.items():
        for domain, sums in domains.items():
            for field in FIELDS:
                assert torch.equal(getattr(sums, field), getattr(spilled.layers[key][domain], field))


def test_each_group_is_read_once_and_then_for_each_domain(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint("qwen3_moe")
    tighten(monkeypatch, folder, F32)
    checkpoint = open_checkpoint(folder)
    with open_layerwise(checkpoint, find_layout(checkpoint), F32) as model:
        started: list[int] = []
        start, found = model.reader.start, dict[str, Mapping[str, Tensor]]()
        monkeypatch.setattr(model.reader, "start", lambda i: (started.append(i), start(i))[1])
        measure_gradients(model, text("qwen3_moe"), lambda key, domain, fields: found.update({key + domain: fields}))
        numbers, L = model.groups.numbers, len(model.layers)
        groups = {i: [numbers[i, g] for g in range(len(model.groups.cuts[i]))] for i in range(L)}
    forward = [n for i in range(L) for n in (i, *groups[i])]
    assert started == forward + [n for i in reversed(range(L)) for n in (i, *groups[i] * 3)]
    assert len(found) == 2 * L


def test_a_stopped_run_goes_on_with_the_layer_it_was_in(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped on the way forward, and in several places of the way back."""
    folder = family_checkpoint("qwen3_moe")
    tighten(monkeypatch, folder, F32)
    calibrate(folder, text("qwen3_moe"), F32, tiers=("gradient",), out=tmp_path / "whole")
    fill, fills, stops = expert_groups.ExpertGroups.fill, 0, {13, 21, 25, 33}

    def stop(self: expert_groups.ExpertGroups, *arguments: Any) -> Any:
        nonlocal fills
        fills += 1
        if fills in stops:
            raise KeyboardInterrupt
        return fill(self, *arguments)

    monkeypatch.setattr(journal, "SHARE", 0)
    monkeypatch.setattr(expert_groups.ExpertGroups, "fill", stop)
    said: list[str] = []
    resume = Resume(files.state_path(tmp_path / "out"), tell=said.append)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            calibrate(folder, text("qwen3_moe"), F32, tiers=("gradient",), out=tmp_path / "out", resume=resume)
    calibrate(folder, text("qwen3_moe"), F32, tiers=("gradient",), out=tmp_path / "out", resume=resume)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sum("going on" in line for line in said) == len(stops)


def test_a_disk_without_room_for_gradients_is_one_line(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(file: int, size: int) -> None:
        raise OSError(28, f"No space left on device; {size} bytes are needed")

    folder = family_checkpoint("qwen3_moe")
    tighten(monkeypatch, folder, F32)
    monkeypatch.setattr(paged, "reserve", full)
    with pytest.raises(InputError, match="no room for gradients beyond --memory: No space left .* bytes are needed"):
        calibrate(folder, text("qwen3_moe"), Compute(dtype=torch.float32, spill=tmp_path), tiers=("gradient",))
    assert not list(tmp_path.iterdir())


def test_sums_that_are_not_finite_are_refused(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint("qwen3_moe")
    tighten(monkeypatch, folder, F32)
    plain: Any = gradients.taylor
    monkeypatch.setattr(gradients, "taylor", lambda parts, totals: plain(parts, totals) * torch.nan)
    with pytest.raises(InputError, match="layer 3, domain a: taylor_sum for experts 0, .*: the gradients overflow"):
        calibrate(folder, text("qwen3_moe"), F32, tiers=("gradient",))

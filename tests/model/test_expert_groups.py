"""A layer that is larger than the budget is run in groups of experts, and gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern.architectures import find_layout
from moekern.calibration import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.iteration import Method, iterate
from moekern.model import expert_groups, layerwise
from moekern.model.budget import Budget
from moekern.model.compute import Compute
from moekern.plan.document import LayerPlan, Plan
from tests.helpers import families
from tests.helpers.passes import Given
from tests.helpers.tight import cuts_of, taken, tighten

MakeCheckpoint = Callable[[str], Path]
F32 = Compute(dtype=torch.float32)
TANGLED = ("inkling2", "inkling2_text", "mistral_large4")  # forward passes are suspended, which wait within layers
APART = {"jetmoe": "outside of their module", "longcat_flash": "not divided by experts alone"}
RUN = [  # without one whose layers without experts are the largest, and one that predicts no tokens
    name for name in families.FAMILIES if name not in {*families.NO_CALIBRATION, *TANGLED, *APART, "nemotron_h-latent"}
]
USUAL = ("qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "dbrx", "step3p7")  # a kind of experts' call each


def text(name: str, sequences: int = 3) -> TokenData:
    batches = [Batch(domain, families.input_ids(name, sequences, 12, seed)) for seed, domain in enumerate(("a", "b"))]
    return TokenData(tuple(batches), {"seed": 0}, 1)


def plans(folder: Path) -> dict[str, Plan]:
    """Two plans that keep half of the experts, others each."""
    layers = find_layout(open_checkpoint(folder)).layers.items()
    halves = {"some": (0, 1, 4, 5), "others": (2, 3, 6, 7)}
    return {name: Plan({key: LayerPlan(tuple(keep)) for key, _ in layers}) for name, keep in halves.items()}


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.whole) for name in RUN]
)
def test_statistics_are_those_of_whole_layers_bit_for_bit(
    name: str, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, tiers = family_checkpoint(name), ("dimensions", "coalitions", "reap", "mixture", "gram", "outliers")
    calibrate(folder, text(name), F32, tiers=tiers, out=tmp_path / "whole")
    tighten(monkeypatch, folder, F32)
    assert cuts_of(folder, F32) > 1
    calibrate(folder, text(name), F32, tiers=tiers, out=tmp_path / "groups")
    assert (tmp_path / "groups").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        name if name == "qwen3_moe" else pytest.param(name, marks=pytest.mark.whole)
        for name in RUN
        if name != "openai_privacy_filter"
    ],
)
def test_losses_of_plans_are_those_of_whole_layers(
    name: str, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint(name)
    chosen = plans(folder) if name in USUAL else {}
    whole = evaluate(folder, text(name), chosen, F32)
    tighten(monkeypatch, folder, F32)
    groups = evaluate(folder, text(name), chosen, F32)
    for plan, row in whole.items():
        for domain, loss in row.items():
            assert groups[plan][domain].nll == pytest.approx(loss.nll, rel=2**-20)
    if name == "qwen3_moe":  # whose experts transformers runs by the same products
        assert groups == whole


@pytest.mark.parametrize("rounds", [1, 2])
def test_iterated_plans_are_those_of_whole_layers(
    rounds: int, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, method = family_checkpoint("qwen3_moe"), Method("reap", 4, rounds)
    whole = iterate(folder, text("qwen3_moe"), method, F32)
    tighten(monkeypatch, folder, F32)
    assert iterate(folder, text("qwen3_moe"), method, F32).to_json() == whole.to_json()


def test_rows_beyond_the_memory_are_kept_in_a_file(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = family_checkpoint("qwen3_moe")
    calibrate(folder, text("qwen3_moe"), F32, out=tmp_path / "whole")
    tighten(monkeypatch, folder, F32)
    monkeypatch.setattr(expert_groups.Takes, "room", property(lambda self: 4000))
    calibrate(folder, text("qwen3_moe"), F32, out=tmp_path / "groups")
    assert (tmp_path / "groups").read_bytes() == (tmp_path / "whole").read_bytes()


def test_each_group_is_read_once_for_all_text(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint("qwen3_moe")
    tighten(monkeypatch, folder, F32)
    checkpoint = open_checkpoint(folder)
    with layerwise.open_layerwise(checkpoint, find_layout(checkpoint), F32) as model:
        started: list[int] = []
        start = model.reader.start
        monkeypatch.setattr(model.reader, "start", lambda i: (started.append(i), start(i))[1])
        ids = families.input_ids("qwen3_moe", 2, 12)
        model.run([0, 1, 2], Given(lambda task: model.compute(Batch("text", ids))))
        groups = model.groups.cuts
        wanted = [n for i in range(4) for n in (i, *(model.groups.numbers[i, g] for g in range(len(groups[i]))))]
    assert started == wanted


def test_no_group_is_read_where_no_rows_are_wanted(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint("qwen3_moe")
    tighten(monkeypatch, folder, F32)
    checkpoint = open_checkpoint(folder)
    with layerwise.open_layerwise(checkpoint, find_layout(checkpoint), F32) as model:
        assert model.groups.cuts
        assert list(model.filled(0, [], 1)) == []


@pytest.mark.parametrize("name", [*APART, "inkling2"])
def test_layers_that_cannot_be_divided_are_one_line(
    name: str, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint(name)
    tighten(monkeypatch, folder, F32)
    with pytest.raises(InputError, match=APART.get(name, "hand on more")) as refused:
        evaluate(folder, text(name), {}, F32)
    assert refused.value.kind == "memory"
    assert "give more (--memory" in str(refused.value) or "give more (memory" in str(refused.value)


def test_a_budget_below_the_smallest_groups_says_what_is_needed(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint("qwen3_moe")
    monkeypatch.setattr(layerwise, "budget_of", lambda compute: Budget(1000))
    with pytest.raises(InputError, match="not enough memory: .* for the largest of them"):
        evaluate(folder, text("qwen3_moe"), {}, F32)


def test_the_tier_that_needs_whole_layers_is_refused(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint("qwen3_moe")
    tighten(monkeypatch, folder, F32)
    with pytest.raises(InputError, match="tier replay is not measured of layers that are run in groups"):
        calibrate(folder, text("qwen3_moe"), F32, tiers=("replay",))


def test_a_weight_that_is_not_finite_is_blamed_by_its_experts_own_number(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = _with_nan(family_checkpoint("qwen3_moe"), tmp_path, "model.layers.1.mlp.experts.5.up_proj.weight")
    tighten(monkeypatch, folder, F32)
    with pytest.raises(InputError, match=r"layer 1: .*gate_up_proj is not finite for expert 5"):
        evaluate(folder, text("qwen3_moe", 8), {}, F32)


def _with_nan(folder: Path, target: Path, name: str) -> Path:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def test_experts_are_converted_piece_by_piece(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_checkpoint("gpt_oss")
    whole = evaluate(folder, text("gpt_oss"), {}, F32)
    size = taken(folder, F32).weights // 8
    monkeypatch.setattr(expert_groups, "PIECE", size)
    monkeypatch.setattr(expert_groups.Takes, "within", lambda self, share=1: share == 1)
    pieces: list[range] = []
    fill = expert_groups.ExpertGroups.fill
    monkeypatch.setattr(
        expert_groups.ExpertGroups,
        "fill",
        lambda self, i, experts, t: (pieces.append(experts), fill(self, i, experts, t))[1],
    )
    assert evaluate(folder, text("gpt_oss"), {}, F32) == whole
    assert len(pieces) > 4

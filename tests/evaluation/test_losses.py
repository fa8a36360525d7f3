"""Losses of plans against the whole model in memory, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL, difference, means, student
from moekern.model import layerwise
from moekern.model.compute import Compute
from moekern.model.stepwise import Stepwise, Tangled
from moekern.plan.constants import measured, replacing
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.replacement import KINDS, Replacement
from moekern.pruning.prune import prune
from moekern.statistics.file import Statistics
from tests.helpers import families
from tests.helpers.narrow import narrow_plan, random_channels, save_narrow
from tests.helpers.tight import tighten

MakeCheckpoint = Callable[[str], Path]


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.whole)])
def test_constants_are_those_of_the_folder(
    name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that replaces what it drops, evaluated on the original, and the folder that it makes, to the bit; with all
    experts of a layer in memory and in groups."""
    folder, ids = family_checkpoint(name), families.input_ids(name, 2, 12, 1)
    data = TokenData((Batch("a", ids), Batch("b", ids.flip(1))), {"a": 24, "b": 24})
    compute = Compute(dtype=torch.float32)
    calibrate(folder, data, compute, tiers=("dimensions", "constants"), out=tmp_path / "s.safetensors")
    statistics = Statistics.load(tmp_path / "s.safetensors")
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    uneven = Plan({key: LayerPlan((0, 3, 5)[: 1 + i]) for i, key in enumerate(layout.layers)})
    plans = {kind: replacing(uneven, kind, statistics) for kind in KINDS}
    found = evaluate(folder, data, plans, compute, statistics=tmp_path / "s.safetensors")
    assert len({row["a"].nll for row in found.values()}) == 4
    with pytest.raises(InputError, match="--statistics: plan .* give the file they are made of"):
        evaluate(folder, data, plans, compute)
    plan, out = plans["least-squares"], tmp_path / "out"
    prune(folder, plan, out, vectors=measured(statistics, plan.replace or Replacement("zero"), checkpoint, layout))
    assert evaluate(out, data, {}, compute)[ORIGINAL]["b"].nll == found["least-squares"]["b"].nll
    with pytest.raises(InputError, match="are constants already, and plans are for the original"):
        evaluate(out, data, {"x": plans["zero"]}, compute)
    tighten(monkeypatch, folder, compute)
    again = evaluate(folder, data, plans, compute, statistics=tmp_path / "s.safetensors")
    for kind, row in found.items():
        assert again[kind]["a"].nll == pytest.approx(row["a"].nll, abs=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "longcat_flash", "llama4_text", "deepseek_v4"])
def test_loss_divergence_and_agreement(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = family_checkpoint(name)
    batches = [Batch(domain, families.input_ids(name, 2, 12, seed)) for seed, domain in enumerate("aba")]
    layers = find_layout(open_checkpoint(folder)).layers
    plan = Plan({key: LayerPlan((0, 2, 5, 7)) for key in layers}, {})
    found = evaluate(folder, TokenData(tuple(batches), {}), {"half": plan}, Compute(dtype=torch.float32))
    prune(folder, plan, tmp_path / "half")
    models = {ORIGINAL: whole_model(name), "half": families.load(tmp_path / "half")}
    for domain in "ab":
        for row, model in models.items():
            nll, kl, same = list[float](), list[float](), list[bool]()
            for batch in batches:
                if batch.domain != domain:
                    continue
                p = families.forward(models[ORIGINAL], batch.input_ids).double().softmax(-1)
                q = families.forward(model, batch.input_ids).double().softmax(-1)
                for b, ids in enumerate(batch.input_ids):
                    for t in range(len(ids) - 1):
                        nll.append(-float(q[b, t, ids[t + 1]].log()))
                        kl.append(float((p[b, t] * (p[b, t] / q[b, t]).log()).sum()))
                        same.append(int(p[b, t].argmax()) == int(q[b, t].argmax()))
            got = found[row][domain]
            assert got.tokens == len(nll)
            if row != ORIGINAL:  # the very bits of the checkpoint that the plan makes
                alone = evaluate(tmp_path / "half", TokenData(tuple(batches), {}), {}, Compute(dtype=torch.float32))
                assert got.nll == alone[ORIGINAL][domain].nll
            assert got.nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)
            assert got.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4, abs=1e-6)
            assert got.top1 == sum(same) / len(same)
    assert found[ORIGINAL]["a"].kl == 0
    assert found[ORIGINAL]["a"].top1 == 1 > found["half"]["a"].top1


@torch.no_grad()
def test_losses_of_plans_with_channels_are_those_of_the_narrow_checkpoint(
    family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any], tmp_path: Path
) -> None:
    """Beside a plan that leaves channels alone, whichever comes first."""
    folder, keep = family_checkpoint("deepseek_v3"), (0, 2, 5, 7)
    layout = find_layout(open_checkpoint(folder))
    data = TokenData(tuple(Batch("d", families.input_ids("deepseek_v3", 2, 12, seed)) for seed in range(2)), {})
    narrow = narrow_plan(layout, keep, 16, 0)
    plans = {"a": narrow, "whole": Plan({key: LayerPlan(keep) for key in layout.layers}), "b": narrow}
    found = evaluate(folder, data, plans, Compute(dtype=torch.float32))
    channels = random_channels(layout, dict.fromkeys(layout.layers, keep), 16, 0)
    out = save_narrow(whole_model("deepseek_v3"), layout, narrow, channels, tmp_path / "out")
    alone = evaluate(out, data, {}, Compute(dtype=torch.float32))
    assert found["a"]["d"] == found["b"]["d"]
    assert found["a"]["d"].nll == alone[ORIGINAL]["d"].nll
    assert found["whole"] == evaluate(folder, data, {"whole": plans["whole"]}, Compute(dtype=torch.float32))["whole"]
    assert found["whole"]["d"].nll != found["a"]["d"].nll


@pytest.mark.filterwarnings("ignore:.*the pass begins again")
def test_a_pass_that_begins_again_with_a_plan_applied(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tangled(self: Stepwise, layer: int, *arguments: Any) -> None:
        through(self, layer, *arguments)
        if layer == 1 and arguments[1].plan is not None:
            raise Tangled(layer)

    folder, through = family_checkpoint("qwen3_moe"), Stepwise.through
    plan = Plan({key: LayerPlan((0, 2, 5, 7)) for key in find_layout(open_checkpoint(folder)).layers})
    data = TokenData((Batch("d", families.input_ids("qwen3_moe", 2, 12)),), {})
    want = evaluate(folder, data, {"half": plan}, Compute(dtype=torch.float32))
    monkeypatch.setattr(layerwise, "_TANGLED", set[type]())
    monkeypatch.setattr(Stepwise, "through", tangled)
    assert evaluate(folder, data, {"half": plan}, Compute(dtype=torch.float32)) == want


def test_errors_are_those_of_a_ratio_of_means() -> None:
    """By the literal formula, for sequences of unequal length."""
    rows = torch.tensor([[3.0, 0.5, 1, 2], [2.0, 0.1, 2, 3], [8.0, 1.5, 1, 4], [1.0, 0.4, 1, 1]]).double()
    loss = means(["p"], [("p", "d", rows[:2]), ("p", "d", rows[2:])])["p"]["d"]
    assert (loss.nll, loss.kl, loss.top1) == pytest.approx((14 / 10, 2.5 / 10, 5 / 10))
    assert (loss.tokens, loss.sequences) == (10, 4)
    squares = sum((kl - 0.25 * n) ** 2 for _, kl, _, n in rows.tolist())
    assert loss.kl_error == pytest.approx((squares * 4 / 3) ** 0.5 / 10)
    assert means(["p"], [("p", "d", rows[0])])["p"]["d"].kl_error is None


def test_paired_differences_cover_the_truth_as_often_as_they_say() -> None:
    """Two plans whose KL differs by 0.1 a token, on texts of 6 sequences that differ much more among themselves."""
    generator = torch.Generator().manual_seed(0)
    covered, told, trials = 0, 0, 400
    for _ in range(trials):
        tokens = torch.full((6, 1), 20.0).double()
        shared = torch.randn(6, 1, generator=generator).double() * 20
        noise = torch.randn(6, 2, generator=generator).double()
        kl = {"near": 40 + shared + noise[:, :1], "far": 42 + shared + noise[:, 1:]}
        zeros = torch.zeros_like(tokens)
        table = means(kl, ((name, "d", torch.cat([zeros, each, zeros, tokens], 1)) for name, each in kl.items()))
        found = difference(table["far"], table["near"], "kl")
        covered += found.low <= 0.1 <= found.high
        told += found.clear
    assert 0.92 < covered / trials < 0.98
    assert told / trials > 0.5  # which the errors of each alone, ten times as large, would not allow


def test_differences_of_other_text_are_refused() -> None:
    rows = torch.ones(2, 4).double()
    one, other = (means(["p"], [("p", "d", r)])["p"] for r in (rows, rows * 2))
    with pytest.raises(ValueError, match="not measured on the same sequences"):
        difference(one, other, "kl")


@pytest.mark.parametrize(("free", "t"), [(1, 12.706), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042), (999, 1.962)])
def test_student(free: int, t: float) -> None:
    assert student(free) == pytest.approx(t, rel=1e-3)

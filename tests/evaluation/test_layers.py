"""What becomes of streams and of routers' choices, against whole models in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL, LayerFigures
from moekern.model.compute import Compute
from moekern.model.stepwise import Stepwise, Tangled
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.replacement import Replacement
from moekern.pruning.prune import prune
from tests.helpers import families
from tests.helpers.tight import cuts_of, tighten

MakeCheckpoint = Callable[[str], Path]
F32, KEEP, K = Compute(dtype=torch.float32), (0, 2, 5, 7), 2
WHOLE = pytest.mark.whole
NO_IDS = ("llama4_text", "llama4", "jetmoe")  # their blocks choose experts themselves
TANGLED = ("inkling2_text", "inkling2", "mistral_large4")  # layers hand on more than hidden states
OTHERS = {*families.NO_CALIBRATION, *NO_IDS, *TANGLED, "openai_privacy_filter"}  # and one that predicts no tokens


def seen(model: Any, batches: list[Batch]) -> tuple[list[Tensor], list[list[set[int]]], list[list[int]]]:
    """Of each decoder layer outputs [T, H], and the experts that each token chose and its first, by the router's own
    logits."""
    outputs: dict[int, list[Tensor]] = {}
    logits: dict[int, list[Tensor]] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        keep = lambda m, a, o, i=i: outputs.setdefault(i, []).append((o if isinstance(o, Tensor) else o[0])[0])  # noqa: E731
        handles.append(layer.register_forward_hook(keep))
        choose = lambda m, a, o, i=i: logits.setdefault(i, []).append(o[0] if isinstance(o, tuple) else o)  # noqa: E731
        handles.append(layer.mlp.gate.register_forward_hook(choose))
    for batch in batches:
        families.forward(model, batch.input_ids)
    for handle in handles:
        handle.remove()
    top = [torch.cat(logits[i]).topk(K, dim=1).indices.tolist() for i in sorted(logits)]
    streams = [torch.cat(outputs[i]).double() for i in sorted(outputs)]
    return streams, [[set(ids) for ids in layer] for layer in top], [[ids[0] for ids in layer] for layer in top]


@torch.no_grad()
def test_against_the_whole_model_and_the_pruned_one(
    family_checkpoint: MakeCheckpoint,
    whole_model: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With whole layers, and with experts run in groups; a plan that drops, and one that replaces by zeros."""
    folder = family_checkpoint("qwen3_moe")
    layers = find_layout(open_checkpoint(folder)).layers
    plan = Plan({key: LayerPlan(KEEP) for key in layers})
    plans = {"half": plan, "zeros": Plan(plan.layers, replace=Replacement("zero"))}
    batches = [Batch("d", families.input_ids("qwen3_moe", 1, 20, seed)) for seed in range(3)]
    data = TokenData(tuple(batches), {})
    table = evaluate(folder, data, plans, F32, layers=True)
    prune(folder, plan, tmp_path / "half")
    streams, sets, firsts = seen(whole_model("qwen3_moe"), batches)
    own, own_sets, own_firsts = seen(families.load(tmp_path / "half"), batches)
    found = table["half"]["d"].layers
    assert found is not None
    assert list(found) == list(layers)
    for i, key in enumerate(layers):
        there = found[key]
        assert there.error == pytest.approx(float((own[i] - streams[i]).norm() / streams[i].norm()), rel=1e-4)
        cosines = torch.nn.functional.cosine_similarity(own[i], streams[i], dim=1)
        assert there.cosine == pytest.approx(float(cosines.mean()), rel=1e-5)
        T = len(sets[i])
        mine = [{KEEP[e] for e in ids} for ids in own_sets[i]]
        assert there.orphans == sum(not ids & set(KEEP) for ids in sets[i]) / T
        assert there.overlap == pytest.approx(sum(len(a & b) / K for a, b in zip(sets[i], mine, strict=True)) / T)
        assert there.same_top1 == sum(a == KEEP[b] for a, b in zip(firsts[i], own_firsts[i], strict=True)) / T
        counts = [sum(e in ids for ids in mine) for e in KEEP]
        assert there.load == pytest.approx(max(counts) * len(KEEP) / sum(counts))
    zeros = table["zeros"]["d"].layers
    assert zeros is not None
    first = zeros[next(iter(layers))]
    assert (first.orphans, first.overlap, first.same_top1) == (found[next(iter(layers))].orphans, 1, 1)  # same router
    tighten(monkeypatch, folder, F32)
    assert cuts_of(folder, F32) > 1
    again = evaluate(folder, data, plans, F32, layers=True)["half"]["d"].layers
    assert again is not None
    for key, each in again.items():
        assert each.error == pytest.approx(found[key].error, rel=1e-4)
        assert (each.orphans, each.load) == (found[key].orphans, found[key].load)


FAMILIES = [name for name in families.FAMILIES if name not in OTHERS]
FIRST = ("deepseek_v3", "dbrx")


@pytest.mark.parametrize("name", [*FIRST, *(pytest.param(n, marks=WHOLE) for n in FAMILIES if n not in FIRST)])
def test_the_load_is_that_of_the_counts_that_calibration_finds(name: str, family_checkpoint: MakeCheckpoint) -> None:
    """Of every family whose experts are called with ids."""
    folder = family_checkpoint(name)
    data = TokenData((Batch("d", families.input_ids(name, 2, 12, 0)),), {"d": 24})
    found = evaluate(folder, data, {}, F32, layers=True)[ORIGINAL]["d"].layers
    statistics = calibrate(folder, data, F32)
    assert found is not None
    for key in statistics.layers:
        count = statistics.layer(key).count.double()
        assert found[key].load == pytest.approx(float(count.max() * len(count) / count.sum()))


def test_a_choice_that_is_not_seen_is_named(
    family_checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    folder = family_checkpoint("llama4_text")
    data = TokenData((Batch("d", families.input_ids("llama4_text", 1, 8)),), {})
    plan = Plan({key: LayerPlan(KEEP) for key in find_layout(open_checkpoint(folder)).layers})
    with caplog.at_level("INFO", "moekern"):
        row = evaluate(folder, data, {"half": plan}, F32, layers=True)["half"]["d"].layers
    assert row is not None
    assert all(each.error and each.load is None and each.orphans is None for each in row.values() if each.error)
    assert any("layers 1, 3: their experts are called without ids" in line for line in caplog.messages)


def test_streams_that_cannot_be_held_side_by_side_are_refused(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tangled(self: Stepwise, layer: int, *arguments: Any) -> None:
        raise Tangled(layer)

    monkeypatch.setattr(Stepwise, "through", tangled)
    data = TokenData((Batch("d", families.input_ids("qwen3_moe", 1, 8)),), {})
    with pytest.raises(InputError, match="--layers: decoder layer .* leave this out"):
        evaluate(family_checkpoint("qwen3_moe"), data, {}, F32, layers=True)


def test_the_original_has_its_load_alone(family_checkpoint: MakeCheckpoint) -> None:
    data = TokenData((Batch("d", families.input_ids("qwen3_moe", 1, 8)),), {})
    row = evaluate(family_checkpoint("qwen3_moe"), data, {}, F32, layers=True)[ORIGINAL]["d"].layers
    assert row is not None
    assert all(each == LayerFigures(load=each.load) and each.load is not None for each in row.values())

"""Constants from statistics, against outputs that are written out; and plans that ask for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.plan.budgets import Budget
from moekern.plan.constants import constants, live_constants, measured, replacing
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.make import make_plan
from moekern.plan.replacement import Replacement
from moekern.plan.targets import Target
from moekern.pruning.prune import prune
from moekern.router import Router
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import header
from tests.helpers.substitution import EXPERTS, KEEP, Vectors, bfloat16
from tests.helpers.substitution import replacing as dropping
from tests.helpers.synthetic import qwen3, read, write

E, H, K = 4, 3, 2


def layer_of(tokens: list[tuple[list[int], list[float], list[list[float]]]]) -> LayerStatistics:
    """Sums of tokens (experts, gates, outputs), a number at a time."""
    s = LayerStatistics.zeros(E, H, tiers=("constants", "stream"))
    for ids, gates, outputs in tokens:
        s.tokens.add_(1)
        s.top1_count[ids[int(np.argmax(gates))]] += 1
        for e, g, y in zip(ids, gates, outputs, strict=True):
            s.count[e] += 1
            s.coactivation[e, e] += 1
            s.gated_norm_sum[e] += g * float(np.linalg.norm(y))
            s.gated_value_weight[e] += g * g
            for h in range(H):
                s.value_sum[e, h] += y[h]
                s.gated_value_sum[e, h] += g * g * y[h]
        i, j = ids
        s.coactivation[i, j] += 1
        s.coactivation[j, i] += 1
    return s


A = layer_of([([0, 1], [0.75, 0.25], [[1, 2, 3], [4, 0, 4]]), ([1, 0], [0.5, 0.5], [[0, 2, 2], [5, 2, 1]])])
B = layer_of([([0, 2], [0.25, 0.75], [[9, 9, 9], [3, 1, 1]])])


@pytest.fixture
def statistics(tmp_path: Path) -> Statistics:
    """Two layers and two domains; no token chose expert 3."""
    made_of = header(("a", "b"), router=Router(E, K, 2, 1), tokens={"a": 2, "b": 1})
    made = Statistics(made_of, {key: {"a": A, "b": B} for key in ("0", "1")})
    made.save(tmp_path / "s.safetensors")
    return Statistics.load(tmp_path / "s.safetensors")


def test_formulas() -> None:
    mean, least = constants(A + B, "mean"), constants(A + B, "least-squares")
    np.testing.assert_allclose(mean[0], (np.array([1, 2, 3]) + [5, 2, 1] + [9, 9, 9]) / 3)
    weights = np.array([0.75, 0.5, 0.25]) ** 2
    outputs = np.array([[1, 2, 3], [5, 2, 1], [9, 9, 9]])
    np.testing.assert_allclose(least[0], weights @ outputs / weights.sum())
    best = [sum(w * ((o - v) ** 2).sum() for w, o in zip(weights, outputs, strict=True)) for v in (least[0], mean[0])]
    assert best[0] < best[1]
    assert not mean[3].any()
    assert not least[3].any()


def test_domains_and_refusals(statistics: Statistics) -> None:
    plan = Plan({"0": LayerPlan((0,)), "1": LayerPlan((1,))}, {"domains": ["a"]})
    made = replacing(plan, "mean", statistics)
    assert made.replace == Replacement("mean", statistics.sha256, ("a",))
    assert made.layers == plan.layers
    vectors = measured(statistics, made.replace or Replacement("zero"))
    np.testing.assert_allclose(vectors.of("0"), constants(A, "mean"))
    assert vectors.idle("0") == [2, 3]
    both = replacing(replace(plan, provenance={}), "least-squares", statistics)
    assert both.replace == Replacement("least-squares", statistics.sha256)
    np.testing.assert_allclose(measured(statistics, both.replace).of("1"), constants(A + B, "least-squares"))
    assert replacing(plan, "zero", None).replace == Replacement("zero")
    bare = Statistics(statistics.header, {"0": {"a": LayerStatistics.zeros(E), "b": LayerStatistics.zeros(E)}})
    for wrong, asked, reason in (
        (bare, Replacement("mean"), "constants are made of a statistics file"),
        (statistics, Replacement("mean", "0" * 64), "others than the plan's constants are made of"),
        (statistics, Replacement("mean", None, ("c",)), "lack the domain c"),
    ):
        with pytest.raises(InputError, match=f"--statistics: .*{reason}"):
            measured(wrong, asked)
    for kind, tier in (("mean", "dimensions"), ("least-squares", "constants")):
        with pytest.raises(InputError, match=f"--replace {kind}: the statistics lack the tier {tier}; add it to calib"):
            replacing(plan, kind, bare)
        with pytest.raises(InputError, match=f"--replace {kind}: needs --statistics"):
            replacing(plan, kind, None)
    with pytest.raises(InputError, match="--replace some: expected one of"):
        replacing(plan, "some", statistics)
    with pytest.raises(InputError, match="no layer 7"):
        vectors.of("7")


def test_constants_in_memory_have_the_bits_of_the_stored_ones(tmp_path: Path) -> None:
    """They are stored as down projections are, whatever type the others have."""
    config, tensors = qwen3()
    wider = {n: ("F32", s, d * 2) if "gate_proj" in n else (t, s, d) for n, (t, s, d) in tensors.items()}
    checkpoint = open_checkpoint(write(tmp_path / "model", config, wider))
    plan = dropping()
    prune(checkpoint, plan, tmp_path / "out", vectors=Vectors())
    stored, made = read(tmp_path / "out"), live_constants(plan, checkpoint, find_layout(checkpoint), Vectors())
    for key, kept in KEEP.items():
        found = made(key)
        assert sorted([*found, *kept]) == list(range(EXPERTS))
        for e, value in found.items():
            name = f"model.layers.{key}.mlp.expert_replacements.{e}.value"
            assert stored[name] == ("BF16", [6], bfloat16(value.numpy()))
            assert torch.equal(value, value.bfloat16().float())


def test_plans_need_no_even_counts(statistics: Statistics) -> None:
    """One expert of four stays, though a token chooses two of one group; and layers may differ."""
    plan = make_plan(statistics, "gated_norm", 1, replaced="mean", targets=[Target("vllm", tp=2)])
    assert [layer.keep for layer in plan.layers.values()] == [(0,), (0,)]
    assert plan.replace == Replacement("mean", statistics.sha256)
    uneven = make_plan(statistics, "gated_norm", 2, replaced="zero", budget=Budget("global", floor=1))
    assert sum(len(layer.keep) for layer in uneven.layers.values()) == 4
    for target in (Target("sglang"), Target("vllm", ep=2), Target("transformers")):
        with pytest.raises(InputError, match=f"{target} would not run it: (dropped experts are constants|its expert)"):
            make_plan(statistics, "gated_norm", 2, replaced="mean", targets=[target])
    with pytest.raises(InputError, match="fewer than the 2"):
        make_plan(statistics, "gated_norm", 1)
    assert torch.equal(A.count, torch.tensor([2, 2, 0, 0]))


def test_relative_budget(tmp_path: Path) -> None:
    """Scores over the energy of the stream: where it is 100 times as large, the same scores count for nothing."""
    seen = replace(A + B, residual_tokens=(A + B).tokens)
    loud, quiet = (replace(seen, stream_square_sum=torch.tensor([n]).double()) for n in (300.0, 3.0))
    made = Statistics(header(("a",), router=Router(E, K), tokens={"a": 3}), {"0": {"a": loud}, "1": {"a": quiet}})
    made.save(tmp_path / "s.safetensors")
    budget, statistics = Budget("relative"), Statistics.load(tmp_path / "s.safetensors")
    plan = make_plan(statistics, "gated_norm", 2, replaced="zero", budget=budget)
    assert {key: len(layer.keep) for key, layer in plan.layers.items()} == {"0": 1, "1": 3}
    with pytest.raises(InputError, match="--budget relative --keep 2: layers would keep 1 to 3"):
        make_plan(statistics, "gated_norm", 2, router=Router(E, 1), budget=budget)
    blind = Statistics(made.header, {key: {"a": replace(loud, residual_tokens=A.tokens * 0)} for key in ("0", "1")})
    with pytest.raises(InputError, match="--budget relative: layer 0: no residual stream was seen"):
        make_plan(blind, "gated_norm", 2, replaced="zero", budget=budget)
    bare = Statistics(made.header, {key: {"a": replace(A, stream_square_sum=torch.zeros(0))} for key in "01"})
    with pytest.raises(InputError, match="--budget relative: the statistics lack the tier stream; add it to calibrate"):
        make_plan(bare, "gated_norm", 2, replaced="zero", budget=budget)

"""A model in memory under a plan equals the checkpoint that the plan makes, and is itself again afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moekern
from moekern.architectures import find_layout
from moekern.architectures.twins import router_numbers
from moekern.calibration import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.judging.decoding import decoding_of
from moekern.judging.in_memory import checkpoint_of
from moekern.judging.live import masked, steered
from moekern.judging.written import continuations
from moekern.model.compute import Compute
from moekern.model.transformers_api import loader_of
from moekern.plan.contrast import Contrast
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.replacement import Replacement
from tests.helpers import families
from tests.helpers.in_flight import REFUSED, Half
from tests.helpers.narrow import narrow_plan, random_channels, save_narrow

# A softmax; groups with a selection bias; tables of ids; a router of another width; sigmoid gates on inputs.
SOME = ("qwen3_moe", "deepseek_v3", "deepseek_v4", "longcat_flash", "llama4")
OTHERS = [name for name in families.FAMILIES if name not in (*SOME, *REFUSED)]
TOLERANCE = 2**-15  # 256 float32 epsilons on logits of order 1: the sums over experts may take another order

MakeCheckpoint, WholeModel = Callable[[str], Path], Callable[[str], Any]


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.whole) for name in OTHERS)])
def test_logits_are_the_pruned_checkpoints(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: WholeModel, half: Callable[[str], Half]
) -> None:
    pruned, model, ids = half(name), whole_model(name), families.input_ids(name)
    before = families.forward(model, ids)
    with masked(model, pruned.plan):
        torch.testing.assert_close(families.forward(model, ids), pruned.logits, rtol=0, atol=TOLERANCE)
    assert torch.equal(families.forward(model, ids), before)
    source = open_checkpoint(family_checkpoint(name))
    seen = checkpoint_of(loader_of(model))
    assert router_numbers(seen, find_layout(seen)) == router_numbers(source, find_layout(source))


def test_it_generates_and_an_exception_leaves_nothing(
    family_checkpoint: MakeCheckpoint, whole_model: WholeModel, half: Callable[[str], Half]
) -> None:
    name = "deepseek_v3"  # whose selection bias is changed in place
    model, plan, ids = whole_model(name), half(name).plan, families.input_ids(name)
    before = families.forward(model, ids)
    with suppress(KeyError), masked(model, plan, checkpoint=family_checkpoint(name)):
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 15)
        raise KeyError
    assert torch.equal(families.forward(model, ids), before)  # the fixture looks at weights and hooks


def test_channels_too(family_checkpoint: MakeCheckpoint, whole_model: WholeModel, tmp_path: Path) -> None:
    model, layout = whole_model("qwen3_moe"), find_layout(open_checkpoint(family_checkpoint("qwen3_moe")))
    keep = (0, 3, 5)
    plan = narrow_plan(layout, keep, 8, 0)
    channels = random_channels(layout, dict.fromkeys(layout.layers, keep), 8, 0)
    with torch.no_grad():
        narrow = families.load(save_narrow(model, layout, plan, channels, tmp_path / "narrow"))
    ids = families.input_ids("qwen3_moe")
    with masked(model, plan):  # parameters require gradients, and no_grad is not on
        torch.testing.assert_close(families.forward(model, ids), families.forward(narrow, ids), rtol=0, atol=TOLERANCE)


def test_experts_that_become_constants(
    family_checkpoint: MakeCheckpoint, whole_model: WholeModel, half: Callable[[str], Half], tmp_path: Path
) -> None:
    """Zeros are experts without a down matrix; means are of statistics."""
    model, plan, ids = whole_model("qwen3_moe"), half("qwen3_moe").plan, families.input_ids("qwen3_moe")
    before, silent = families.forward(model, ids), copy.deepcopy(model)
    for i, layer in enumerate(silent.model.layers):
        dropped = [e for e in range(8) if e not in plan.layers[str(i)].keep]
        layer.mlp.experts.down_proj.data[dropped] = 0
    with masked(model, replace(plan, replace=Replacement("zero"))):
        zeros = families.forward(model, ids)
    torch.testing.assert_close(zeros, families.forward(silent, ids), rtol=0, atol=TOLERANCE)
    source, sums = family_checkpoint("qwen3_moe"), tmp_path / "s.safetensors"
    calibrate(source, TokenData((Batch("a", ids),), {}), tiers=["dimensions"], out=sums)
    means = replace(plan, replace=Replacement("mean"))
    with masked(model, means, statistics=sums):
        found = families.forward(model, ids)
    with masked(model, means, statistics=sums, checkpoint=source):
        assert torch.equal(families.forward(model, ids), found)
    assert not torch.equal(found, zeros)
    assert torch.equal(families.forward(model, ids), before)
    with pytest.raises(InputError, match="--statistics: the plan replaces experts"), masked(model, means):
        pass
    (written,) = continuations(
        source, TokenData((Batch("a", ids[:, :6]),), {}), {"means": means}, [decoding_of("greedy")],
        Compute("cpu", "float32"), new_tokens=1, statistics=sums,
    ).values()  # fmt: skip
    with masked(model, means, statistics=sums):
        want = families.forward(model, ids[:, :6])[:, -1].argmax(-1).tolist()
    assert [list(row.ids) or [2] for row in written["means"]] == [[token] for token in want]  # 2 is the end


def test_a_plan_that_does_not_fit_is_refused_and_names_the_layer(
    whole_model: WholeModel, half: Callable[[str], Half]
) -> None:
    model, plan = whole_model("qwen3_moe"), half("qwen3_moe").plan
    seen = checkpoint_of(loader_of(model))
    routers = router_numbers(seen, find_layout(seen))
    others = {**routers, "2": routers["2"][:-1] + ("0" if routers["2"][-1] != "0" else "1")}
    own = {**plan.provenance, "fingerprint": "of a checkpoint that this cannot know", "routers": routers}
    with masked(model, replace(plan, provenance=own)):
        pass
    refit = {"recipe": "0" * 64, "layers": {"0": {}}}
    refused = {
        "layer 2: expert 8 is out of range": Plan({**plan.layers, "2": LayerPlan((0, 8))}),
        "layer '9' is not a MoE layer": Plan({**plan.layers, "9": LayerPlan((0, 1))}),
        "layer 3 is missing": Plan({key: plan.layers[key] for key in "012"}),
        "made for another model": replace(plan, provenance={"routers": others}),
        "were refitted": replace(plan, provenance={"refit": refit}),
    }
    for message, other in refused.items():
        with pytest.raises(InputError, match=message), masked(model, other):
            pass
    with pytest.raises(TypeError, match="plan: expected Plan, got str"), masked(model, "plan.json"):  # type: ignore[arg-type]
        pass


def contrast_of(**layers: tuple[float, ...]) -> Contrast:
    return Contrast({key[1:]: row for key, row in layers.items()})


def test_suppressed_experts_are_as_if_dropped(whole_model: WholeModel, tmp_path: Path) -> None:
    model, ids = whole_model("qwen3_moe"), families.input_ids("qwen3_moe")
    found = contrast_of(_1=(0, 0.5, 0, 0.2, 0, 0, 0, -1), _2=(0.4,) + (0,) * 7)
    found.save(tmp_path / "map.json")
    gone = {"1": {1, 3}, "2": {0}}
    layers = {str(i): LayerPlan(tuple(e for e in range(8) if e not in gone.get(str(i), ()))) for i in range(4)}
    with masked(model, Plan(layers, {"allow_nonuniform": True})):
        want = families.forward(model, ids)
    with steered(model, tmp_path / "map.json"):
        assert torch.equal(families.forward(model, ids), want)
    with steered(model, found, count=1), pytest.raises(AssertionError):
        torch.testing.assert_close(families.forward(model, ids), want)


@pytest.mark.parametrize("strength", [1e4, -1e4])
def test_a_strength_makes_experts_come_or_go(strength: float, whole_model: WholeModel) -> None:
    model, ids = whole_model("qwen3_moe"), families.input_ids("qwen3_moe")
    with steered(model, contrast_of(_2=(0.0, 0, 0, 0, 0, 1, 0, 0)), strength), moekern.observe(model) as seen:
        families.forward(model, ids)
    assert int(seen.layer("2").count[5]) == (ids.numel() if strength > 0 else 0)


def test_what_cannot_be_steered_is_refused(whole_model: WholeModel) -> None:
    model = whole_model("deepseek_v4")
    table, other = contrast_of(_0=(1.0,) * 8), contrast_of(_1=(1.0,) * 8)
    cases = {
        "layer 0 takes its experts from a table of ids": (table, 2.0, 3),
        "layer 1: without experts 0, 1, 2, 3, 4, 5, 6 a token": (other, -torch.inf, 7),
        "expected a number other than 0": (other, 0.0, 1),
        "no expert is used more": (contrast_of(_1=(-1.0,) * 8), -torch.inf, 1),
        "layer 1: 7 numbers for 8 experts": (contrast_of(_1=(1.0,) * 7), -torch.inf, 1),
        "layer '7' is not a MoE layer": (contrast_of(_7=(1.0,) * 8), -torch.inf, 1),
    }
    for message, (found, strength, count) in cases.items():
        with pytest.raises(InputError, match=message), steered(model, found, strength, count):
            pass
    with steered(model, table, count=3):  # substitutes come in the table
        pass

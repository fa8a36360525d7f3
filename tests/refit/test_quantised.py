"""A refit of quantised checkpoints: what is computed is stored in their own format, and the fit knows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.model.compute import Compute
from moekern.model.dequantised import dense
from moekern.plan.channels import channel_ids
from moekern.plan.document import Plan
from moekern.pruning.prune import MANIFEST, prune
from moekern.refit import Refine, Ridge, streams
from moekern.refit.fitting import Fitting
from moekern.refit.refit import refit
from moekern.refit.variants import Variant
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.in_flight import random_plan
from tests.helpers.narrow import narrow_plan
from tests.helpers.quantised import mxfp4
from tests.helpers.quantised_models import plain, twins

MakeCheckpoint = Callable[[str], Path]
RIDGE = Ridge(factors=(0.1, 1.0), sweeps=2)


def text(name: str, rows: int = 6) -> TokenData:
    return TokenData(tuple(Batch("d", families.input_ids(name, rows, 32, seed)) for seed in (1, 2)), {})


def replace_channels(plan: Plan) -> Plan:
    """The plan of whole experts."""
    return replace(plan, layers={key: replace(layer, channels=None) for key, layer in plan.layers.items()})


def computed(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def made(
    source: Path, folder: Path, name: str, compute: Compute = Compute(), plan: Plan | None = None, **options: Any
) -> Plan:
    """The plan of a refit (None: of a random one), pruned and verified, whose logits are equal to those in memory."""
    plan = plan or random_plan(find_layout(open_checkpoint(source)), 0)
    variant = Variant("refitted", plan, folder=folder / "refit", **{"ridge": RIDGE, **options})
    whole = refit(source, text(name), [variant], compute).plans["refitted"]
    prune(source, whole, folder / "out", refitted=folder / "refit")
    report = verify(source, whole, folder / "out")
    assert report.problems == ()
    assert report.computed
    assert compare_forward(source, whole, folder / "out", text(name).batches).equal
    return whole


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, "float32") for kind in ("fp8_block", "mxfp4", "compressed_int4")),
        *(
            pytest.param(kind, "float32", marks=pytest.mark.whole)
            for kind in ("fp8_static", "compressed_fp8", "compressed_int8", "quark_fp8", "quark_fp4")
        ),
        *(pytest.param(kind, "bfloat16", marks=pytest.mark.whole) for kind in ("fp8_block", "mxfp4")),
    ],
)
def test_computed_weights_are_stored_in_the_checkpoints_format(
    kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual is that of the numbers in the files, to the last bit of these."""
    source, _ = twins(plain("qwen3_moe", tmp_path / "plain"), tmp_path, kind, only=".experts.")
    seen = []

    def watched(work: Fitting, variant: Variant, key: str) -> dict[str, Any]:
        before = work.lacks.tensor.clone()
        record = fitted(work, variant, key)
        for expert in range(work.experts.count):
            tokens = work.experts.tokens(expert)
            before[tokens] -= work.experts.outputs(expert, tokens)
        near = 1e-5 if dtype == "float32" else 2**-7  # outputs are rounded to bfloat16
        assert torch.allclose(work.lacks.tensor, before, rtol=0, atol=near * float(before.abs().max()))
        seen.append((key, work.experts.views.down.clone(), record))
        return record

    fitted = streams.fitted
    monkeypatch.setattr(streams, "fitted", watched)
    made(source, tmp_path, "qwen3_moe", Compute(dtype=dtype))
    stored = computed(tmp_path / "refit")
    config = open_checkpoint(source).config["quantization_config"]
    changed = 0
    for key, downs, record in seen:
        for expert, down in enumerate(downs):
            stem = f"model.layers.{key}.mlp.experts.{expert}.down_proj."
            parts = {name.removeprefix(stem): t for name, t in stored.items() if name.startswith(stem)}
            assert torch.equal(dense(parts, config, down.dtype), down)
        changed += not record["kept_as_it_was"]
        assert record["kept_as_it_was"] == (record["requantised"] == 0)
        assert record["requantised"] < 0.2
    assert changed


def test_gpt_oss_with_biases_and_all_that_experts_are(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = mxfp4(family_checkpoint("gpt_oss"), tmp_path / "source")
    plan = made(source, tmp_path, "gpt_oss", refine=Refine(epochs=2, sweeps=1))
    names = {name.rpartition(".")[2] for name in computed(tmp_path / "refit")}
    assert names == {
        "down_proj_blocks", "down_proj_scales", "down_proj_bias",
        "gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias",
    }  # fmt: skip
    assert any(told["refine"]["improved"] for told in plan.provenance["refit"]["layers"].values())


@pytest.mark.parametrize(
    ("kind", "name", "left"),
    [
        ("fp8_block", "qwen3_moe", 32),
        ("compressed_int4", "qwen3_moe", 24),
        *(
            pytest.param(kind, name, left, marks=pytest.mark.whole)
            for kind, name, left in (
                ("mxfp4", "qwen3_moe", 32),
                ("fp8_block_e8m0", "qwen3_moe", 48),
                ("fp8_static", "qwen3_moe", 40),
                ("compressed_fp8", "qwen3_moe", 40),
                ("compressed_int8", "qwen3_moe", 40),
                ("compressed_w8a8", "qwen3_moe", 40),
                ("quark_fp4", "qwen3_moe", 32),
                ("fp8_block", "deepseek_v3", 32),
            )
        ),
    ],
)  # fmt: skip
def test_narrower_experts_are_stored_in_the_checkpoints_format(kind: str, name: str, left: int, tmp_path: Path) -> None:
    """All parts of the experts are computed, and stand for their channels within the format's error."""
    source, twin = twins(plain(name, tmp_path / "plain", 64), tmp_path, kind, only=".experts.")
    plan = made(source, tmp_path, name, width=left)
    assert plan.width == left
    before, out = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert out.config["moe_intermediate_size"] == left
    assert find_layout(out).width == left
    stored, numbers = load_file(tmp_path / "out" / "model.safetensors"), load_file(twin / "model.safetensors")
    names = {name.rpartition(".")[2] for name in computed(tmp_path / "refit")}
    assert names == {n.rpartition(".")[2] for n in before.tensors if ".experts." in n} - {"input_scale"}
    for key, layer in find_layout(before).layers.items():
        kept = plan.layers[key]
        told = plan.provenance["refit"]["layers"][key]
        assert 0 < told["requantised"] < 0.3
        assert kept.channels is not None
        for place, (expert, text) in enumerate(zip(kept.keep, kept.channels, strict=True)):
            prefix, channels = f"{layer.prefix}.mlp.experts.", torch.from_numpy(channel_ids(text))
            for projection, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                stem = f"{prefix}{place}.{projection}."
                parts = {n.removeprefix(stem): t for n, t in stored.items() if n.startswith(stem)}
                found = dense(parts, out.config["quantization_config"], torch.float32)
                wanted = numbers[f"{prefix}{expert}.{projection}.weight"].float().index_select(axis, channels)
                assert found.shape == wanted.shape
                if axis == 0:
                    assert (found - wanted).norm() < 0.3 * wanted.norm()


def test_gpt_oss_with_fewer_channels(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Gate and up alternate in rows, biases lose channels too, and down is stored turned; by a plan with channels."""
    source = mxfp4(family_checkpoint("gpt_oss"), tmp_path / "source", width=64)
    layout = find_layout(open_checkpoint(source))
    whole = made(source, tmp_path, "gpt_oss", plan=narrow_plan(layout, (0, 2, 3, 6), 32, 0))
    shapes = {name.rpartition("experts.")[2]: list(t.shape) for name, t in computed(tmp_path / "refit").items()}
    assert shapes == {
        "gate_up_proj_blocks": [4, 64, 1, 16], "gate_up_proj_scales": [4, 64, 1], "gate_up_proj_bias": [4, 64],
        "down_proj_blocks": [4, 32, 1, 16], "down_proj_scales": [4, 32, 1], "down_proj_bias": [4, 32],
    }  # fmt: skip
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for key, kept in whole.layers.items():
        stem = f"model.layers.{key}.mlp.experts.gate_up_proj_"
        for place, (expert, text) in enumerate(zip(kept.keep, kept.channels or (), strict=True)):
            ids = torch.from_numpy(channel_ids(text))
            rows = torch.stack([2 * ids, 2 * ids + 1], 1).flatten()
            for part in ("blocks", "scales", "bias"):  # a scale is of a row, so that no number changes
                assert torch.equal(new[stem + part][place], old[stem + part][expert][rows])
    lines = [json.loads(line) for line in (tmp_path / "out" / MANIFEST).read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key != "refit"} for line in lines]
    (tmp_path / "out" / MANIFEST).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    problems = verify(source, whole, tmp_path / "out").problems
    assert any("down_proj_blocks: experts of a quantised model lost channels" in problem for problem in problems)


def test_widths_that_a_format_cannot_hold(tmp_path: Path) -> None:
    source, _ = twins(plain("qwen3_moe", tmp_path / "plain", 64), tmp_path, "fp8_block", only=".experts.")
    layout = find_layout(open_checkpoint(source))
    plan = random_plan(layout, 0)
    for given, width in ((plan, 24), (narrow_plan(layout, (0, 2, 3, 6), 24, 0), None)):
        with pytest.raises(InputError, match="24 channels .*whole blocks of 16 channels; nearest width: 16 or 32"):
            refit(source, text("qwen3_moe"), [Variant("refitted", given, width, RIDGE, folder=tmp_path / "refit")])
    narrow = narrow_plan(layout, (0, 2, 3, 6), 32, 0)
    with pytest.raises(InputError, match=r"experts\..*is quantised, and loses channels.*`moekern refit"):
        prune(source, narrow, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    whole = narrow_plan(layout, (0, 2, 3, 6), 64, 0)
    prune(source, whole, tmp_path / "all")
    assert verify(source, whole, tmp_path / "all").problems == ()
    prune(source, replace_channels(narrow), tmp_path / "whole")
    report = verify(source, narrow, tmp_path / "whole")
    assert any("shape" in problem or "lost channels" in problem for problem in report.problems)


@pytest.mark.parametrize("kind", ["modelopt_nvfp4", "compressed_int4_ordered", "gptq"])
def test_formats_that_are_read_alone(kind: str, tmp_path: Path) -> None:
    source, _ = twins(plain("qwen3_moe", tmp_path / "plain"), tmp_path, kind, only=".experts.")
    plan = random_plan(find_layout(open_checkpoint(source)), 0)
    with pytest.raises(InputError, match="not written.*unquantised twin"):
        refit(source, text("qwen3_moe"), [Variant("refitted", plan, ridge=RIDGE, folder=tmp_path / "refit")])
    assert not (tmp_path / "refit").exists()


def test_plain_weights_become_bfloat16_where_asked(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made(family_checkpoint("qwen3_moe"), tmp_path, "qwen3_moe", computed="bf16")
    assert {tensor.dtype for tensor in computed(tmp_path / "refit").values()} == {torch.bfloat16}

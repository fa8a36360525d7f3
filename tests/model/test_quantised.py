"""Quantised checkpoints: weights are dequantised while they compute, and pruned without a bit changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.model.layerwise import open_layerwise
from moekern.plan.make import make_plan
from moekern.pruning.prune import prune
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.passes import Given
from tests.helpers.quantised import fp8, mxfp4, rewrite

MakeCheckpoint = Callable[[str], Path]
FP8 = ("qwen3_moe", "deepseek_v3", "minimax_m2")


@pytest.fixture(params=[*FP8, "gpt_oss"])
def quantised(request: pytest.FixtureRequest, family_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    name: str = request.param
    folder, source = tmp_path / name, family_checkpoint(name)
    return mxfp4(source, folder) if name == "gpt_oss" else fp8(source, folder, block=4)


def _whole(folder: Path) -> Any:
    plain = transformers.Mxfp4Config if folder.name == "gpt_oss" else transformers.FineGrainedFP8Config
    loader = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model = loader.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=plain(dequantize=True))
    for value in (*model.parameters(), *model.buffers()):
        value.data = value.data.clone()
    return model.eval()


def test_streamed_logits_are_those_of_the_dequantised_model(quantised: Path) -> None:
    ids = families.input_ids(quantised.name)
    checkpoint, seen = open_checkpoint(quantised), []
    with open_layerwise(checkpoint, find_layout(checkpoint)) as streamed:
        streamed.run([0], Given(lambda task: seen.append(streamed.compute(Batch("text", ids)).logits)))
    assert torch.equal(seen[0], families.forward(_whole(quantised), ids))


@pytest.mark.parametrize("name", FP8)
def test_blocks_that_are_cut_short_are_where_they_belong(
    name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """24 rows in blocks of 16, and as 576 in blocks of 128 a number of rows that scales do not divide."""
    folder = fp8(family_checkpoint(name), tmp_path / "fp8", block=7)
    scales = {k: t for p in folder.glob("*.safetensors") for k, t in load_file(p).items() if k.endswith("_scale_inv")}

    def dense(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if key in scales:
            return {}
        if f"{key}_scale_inv" in scales:
            grid = scales[f"{key}_scale_inv"].repeat_interleave(7, 0).repeat_interleave(7, 1)
            tensor = (tensor.float() * grid[: tensor.shape[0], : tensor.shape[1]]).bfloat16()
        return {key: tensor}

    plain = rewrite(folder, tmp_path / "dense", dense)
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    seen: list[torch.Tensor] = []
    for each in (folder, plain):
        checkpoint, ids = open_checkpoint(each), families.input_ids(name)
        with open_layerwise(checkpoint, find_layout(checkpoint)) as streamed:
            run = streamed.compute
            streamed.run([0], Given(lambda task, run=run: seen.append(run(Batch("text", ids)).logits)))  # noqa: B023
    assert torch.equal(seen[0], seen[1])


def test_calibrated_pruned_and_verified(quantised: Path, tmp_path: Path) -> None:
    data = TokenData(tuple(Batch("d", families.input_ids(quantised.name, 2, 12, seed)) for seed in (1, 2)), {})
    plan = make_plan(calibrate(quantised, data), "gated_norm", keep=4)
    prune(quantised, plan, tmp_path / "pruned")
    assert verify(quantised, plan, tmp_path / "pruned").problems == ()
    verdict = compare_forward(quantised, plan, tmp_path / "pruned", data.batches)
    assert (verdict.dtype, verdict.equal) == ("float32", True)

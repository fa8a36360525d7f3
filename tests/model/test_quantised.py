"""Quantised checkpoints: weights are dequantised while they compute, and pruned without a bit changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.model.layerwise import open_layerwise
from moekern.plan.make import make_plan
from moekern.pruning.prune import prune
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.passes import Given

MakeCheckpoint = Callable[[str], Path]
BLOCK = 16
FP8 = ("qwen3_moe", "deepseek_v3", "minimax_m2")


def _rewrite(source: Path, target: Path, change: Callable[[str, Tensor], dict[str, Tensor]], **config: Any) -> Path:
    """One shard with every tensor of `source` changed, and config.json with `config` added."""
    target.mkdir()
    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            tensors |= change(name, tensor)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    before = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**before, "dtype": "bfloat16", **config}))
    return target


def _bfloat16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _fp8_blocks(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Projections as float8_e4m3 with a scale for every block of 16 x 16, other tensors as bfloat16."""
    if not name.endswith("_proj.weight") and ".experts." not in name:
        return {name: _bfloat16(tensor)}
    rows, columns = (-(-n // BLOCK) for n in tensor.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: tensor.shape[0], : tensor.shape[1]]
    return {name: values.to(torch.float8_e4m3fn).contiguous(), f"{name}_scale_inv": scale}


def fp8(source: Path, target: Path) -> Path:
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }
    return _rewrite(source, target, _fp8_blocks, quantization_config=quantization)


def mxfp4(source: Path, target: Path) -> Path:
    """gpt-oss with random 4-bit experts of intermediate size 32: blocks [E, out, in / 32, 16] and scales."""
    generator = torch.Generator().manual_seed(0)

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name.endswith("gate_up_proj_bias"):
            return {name: torch.randn(8, 64, generator=generator).bfloat16()}
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: _bfloat16(tensor)}
        out = 64 if "gate_up" in name else 32
        return {
            f"{name}_blocks": torch.randint(256, (8, out, 1, 16), generator=generator, dtype=torch.uint8),
            f"{name}_scales": torch.randint(121, 125, (8, out, 1), generator=generator, dtype=torch.uint8),
        }

    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]}
    return _rewrite(source, target, change, intermediate_size=32, quantization_config=quantization)


@pytest.fixture(params=[*FP8, "gpt_oss"])
def quantised(request: pytest.FixtureRequest, family_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    name: str = request.param
    make = mxfp4 if name == "gpt_oss" else fp8
    return make(family_checkpoint(name), tmp_path / name)


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


def test_calibrated_pruned_and_verified(quantised: Path, tmp_path: Path) -> None:
    data = TokenData(tuple(Batch("d", families.input_ids(quantised.name, 2, 12, seed)) for seed in (1, 2)), {})
    plan = make_plan(calibrate(quantised, data), "gated_norm", keep=4)
    prune(quantised, plan, tmp_path / "pruned")
    assert verify(quantised, plan, tmp_path / "pruned").problems == ()
    verdict = compare_forward(quantised, plan, tmp_path / "pruned", data.batches)
    assert verdict.dtype == "bfloat16"
    assert verdict.equal
    assert verdict.max_difference < 0.1


def test_weights_that_cannot_be_run_say_what_to_do_instead(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    config = {"quant_method": "awq", "bits": 4}
    folder = _rewrite(
        family_checkpoint("qwen3_moe"), tmp_path / "m", lambda name, t: {name: t}, quantization_config=config
    )
    data = TokenData((Batch("d", families.input_ids("qwen3_moe")),), {})
    with pytest.raises(InputError, match="awq weights is not supported.*unquantised twin"):
        calibrate(folder, data)

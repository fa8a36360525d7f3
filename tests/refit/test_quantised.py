"""A refit of quantised checkpoints: what is computed is stored in their own format, and the fit knows it."""

from __future__ import annotations

from collections.abc import Callable
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
from moekern.plan.document import Plan
from moekern.pruning.prune import prune
from moekern.refit import Refine, Ridge, streams
from moekern.refit.fitting import Fitting
from moekern.refit.refit import refit
from moekern.refit.variants import Variant
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.in_flight import random_plan
from tests.helpers.quantised import mxfp4
from tests.helpers.quantised_models import plain, twins

MakeCheckpoint = Callable[[str], Path]
RIDGE = Ridge(factors=(0.1, 1.0), sweeps=2)


def text(name: str, rows: int = 6) -> TokenData:
    return TokenData(tuple(Batch("d", families.input_ids(name, rows, 32, seed)) for seed in (1, 2)), {})


def computed(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def made(source: Path, folder: Path, name: str, compute: Compute = Compute(), **options: Any) -> Plan:
    """The plan of a refit, pruned and verified, whose logits are equal to those in memory."""
    plan = random_plan(find_layout(open_checkpoint(source)), 0)
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
        *(pytest.param(kind, "float32", marks=pytest.mark.whole) for kind in ("fp8_static", "compressed_fp8")),
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

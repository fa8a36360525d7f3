"""What verify finds in a folder whose dropped experts are constants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch
from moekern.model.compute import Compute
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.replacement import Replacement
from moekern.pruning.prune import prune
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.substitution import Vectors, replacing
from tests.helpers.synthetic import qwen3, read_shard, shard_bytes, write

CONSTANT, KEPT = "model.layers.0.mlp.expert_replacements.3.value", "model.layers.0.mlp.experts.2.up_proj.weight"


def edited(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the tensors of the only shard."""
    path = folder / "model.safetensors"
    tensors, header = read_shard(path)
    change(tensors)
    path.write_bytes(shard_bytes(tensors, header["__metadata__"]))


def other_byte(name: str, at: int = 0) -> Callable[[Any], None]:
    def change(tensors: Any) -> None:
        dtype, shape, raw = tensors[name]
        tensors[name] = dtype, shape, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]

    return change


def not_finite(tensors: Any) -> None:
    tensors[CONSTANT] = ("BF16", [6], b"\x80\x7f" * 6)


def other_dtype(tensors: Any) -> None:
    tensors[CONSTANT] = ("F16", [6], tensors[CONSTANT][2])


def reshaped(tensors: Any) -> None:
    tensors[CONSTANT] = ("BF16", [2, 3], tensors[CONSTANT][2])


@pytest.mark.parametrize(
    ("change", "known", "reason"),
    [
        (other_byte(CONSTANT), True, f"{CONSTANT}: differs"),
        (other_byte(CONSTANT), False, f"{CONSTANT}: differs from what was written, whose checksum"),
        (other_byte(KEPT), False, f"{KEPT}: differs from the source's"),
        (not_finite, False, f"{CONSTANT}: holds NaN or infinities"),
        (other_dtype, False, f"{CONSTANT}: dtype F16, expected BF16"),
        (reshaped, False, f"{CONSTANT}: shape"),
    ],
)
def test_changed_bytes(change: Callable[[Any], None], known: bool, reason: str, tmp_path: Path) -> None:
    source, out = write(tmp_path / "model", *qwen3(), 1), tmp_path / "out"
    prune(source, replacing(), out, vectors=Vectors())
    edited(out, change)
    problems = verify(source, replacing(), out, vectors=Vectors() if known else None).problems
    (problem,) = (problem for problem in problems if "has another size" not in problem)
    assert reason in problem


def test_constants_of_other_statistics(tmp_path: Path) -> None:
    source, out = write(tmp_path / "model", *qwen3(), 1), tmp_path / "out"
    prune(source, replacing(), out, vectors=Vectors())
    report = verify(source, replacing(), out)
    assert (report.problems, report.constants, report.constants_known) == ((), 12, False)
    assert verify(source, replacing(), out, vectors=Vectors()).constants_known
    problems = verify(source, replacing(), out, vectors=Vectors(scale=1.5)).problems
    assert len(problems) == 12
    assert all("differs from what mean makes of expert" in problem for problem in problems)


def test_a_config_that_names_other_experts_or_none(tmp_path: Path) -> None:
    source, out = write(tmp_path / "model", *qwen3(), 1), tmp_path / "out"
    prune(source, replacing("zero"), out, form="approximate-experts")
    config = json.loads((out / "config.json").read_text())
    for listed in ({"0": [1, 3, 4, 5], "1": [0, 1, 2, 3, 5, 6, 7]}, None):
        changed = {k: v for k, v in config.items() if k != "approximate_experts"}
        (out / "config.json").write_text(json.dumps(changed | ({"approximate_experts": listed} if listed else {})))
        (problem,) = verify(source, replacing("zero"), out).problems
        assert "config.json" in problem
        assert "approximate_experts" in problem


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qwen3_moe", "approximate-experts"),
        pytest.param("deepseek_v3", "compression-config", marks=pytest.mark.whole),
    ],
)
def test_forward(name: str, form: str, family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The folder's logits are those of the original whose experts return the constants; other constants are not."""
    source, out = family_checkpoint(name), tmp_path / "out"
    layers = find_layout(open_checkpoint(source)).layers
    plan = Plan({key: LayerPlan((0, 1 + i)) for i, key in enumerate(layers)}, {}, Replacement("mean"))
    prune(source, plan, out, form=form, vectors=Vectors(families.HIDDEN))
    batches = (Batch("text", families.input_ids(name, 2, 9, 5)),)
    same = compare_forward(source, plan, out, batches, compute=Compute(dtype=torch.float32))
    assert same.equal
    assert same.max_difference == 0
    other = Plan(plan.layers, {}, Replacement("zero"))
    prune(source, other, tmp_path / "zero", form=form)
    assert verify(source, plan, tmp_path / "zero").problems

"""The logits of a pruned checkpoint with refitted layers against the original's, pruned and refitted in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli.app import app
from moekern.data.batches import Batch
from moekern.errors import InputError
from moekern.model import layerwise
from moekern.model.compute import Compute
from moekern.model.dequantised import dense
from moekern.model.reader import read_tensors
from moekern.model.requantised import as_stored, requantised
from moekern.model.stepwise import Stepwise, Tangled
from moekern.plan.document import Plan
from moekern.pruning.prune import prune
from moekern.pruning.refitted import write_layer
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.in_flight import random_plan
from tests.helpers.quantised_models import plain, twins
from tests.helpers.refitted import RECIPE, refit
from tests.helpers.tight import tighten

MakeCheckpoint = Callable[[str], Path]
DOWN = ("down_proj", "w2", "output_linear")


def refitted(source: Path, folder: Path, layers: int = 0, dtype: str = "") -> tuple[Plan, Path]:
    """A pruned checkpoint with refitted layers, the first ones only where a number is given, and its plan."""
    plan = random_plan(find_layout(open_checkpoint(source)), 0)
    some = replace(plan, layers=dict(list(plan.layers.items())[: layers or None]))
    made = refit(source, plan, folder / "refit", parts=DOWN, layers=tuple(some.layers), dtype=dtype)
    prune(source, made, folder / "out", refitted=folder / "refit")
    report = verify(source, made, folder / "out")
    assert report.problems == ()
    assert report.computed
    return made, folder / "out"


def batches(name: str) -> tuple[Batch, ...]:
    return (Batch("d", families.input_ids(name, 2, 16)), Batch("d", families.input_ids(name, 1, 8, 3)))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral", "granitemoe", "deepseek_v3", "dbrx"])
def test_they_are_equal(name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = family_checkpoint(name)
    plan, out = refitted(source, tmp_path)
    verdict = compare_forward(source, plan, out, batches(name))
    assert verdict.equal
    prune(source, replace(plan, provenance={}), tmp_path / "plain")
    other = compare_forward(source, replace(plan, provenance={}), tmp_path / "plain", batches(name))
    assert verdict.logit_std != other.logit_std  # the refitted tensors took part


def test_some_layers_alone_and_another_dtype(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = family_checkpoint("qwen3_moe")
    plan, out = refitted(source, tmp_path, layers=1, dtype="BF16")
    assert compare_forward(source, plan, out, batches("qwen3_moe")).equal


def test_quantised_ones(tmp_path: Path) -> None:
    source, _ = twins(plain("qwen3_moe", tmp_path / "plain"), tmp_path, "fp8_static")
    plan, out = refitted(source, tmp_path)
    assert compare_forward(source, plan, out, batches("qwen3_moe")).equal


@pytest.mark.parametrize("kind", ["fp8_block", "mxfp4", "compressed_int4"])
def test_computed_weights_in_the_checkpoints_own_format(kind: str, tmp_path: Path) -> None:
    """Larger ones by a tenth, quantised again: whole, they are verified, and the model computes with them."""
    source, _ = twins(plain("qwen3_moe", tmp_path / "plain"), tmp_path, kind, only=".experts.")
    checkpoint = open_checkpoint(source)
    plan, config = random_plan(find_layout(checkpoint), 0), checkpoint.config["quantization_config"]
    for key, layer in plan.layers.items():
        new: dict[str, Any] = {}
        for number, e in enumerate(layer.keep):
            stem = f"model.layers.{key}.mlp.experts.{{}}.down_proj."
            names = [name for name in checkpoint.tensors if name.startswith(stem.format(e))]
            like = {name.rpartition(".")[2]: tensor for name, tensor in read_tensors(checkpoint, names).items()}
            wanted = 1.1 * dense(like, config, torch.float32)
            found = requantised(wanted, like, config)
            assert (found.error_square / found.square) ** 0.5 < 0.1
            new |= {stem.format(number) + part: as_stored(tensor) for part, tensor in found.parts.items()}
        write_layer(tmp_path / "refit", key, new, recipe=RECIPE, kept=layer, model=checkpoint.fingerprint)
    plan = replace(plan, provenance={"refit": {"recipe": RECIPE, "layers": dict.fromkeys(plan.layers)}})
    prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit")
    assert verify(source, plan, tmp_path / "out").problems == ()
    assert compare_forward(source, plan, tmp_path / "out", batches("qwen3_moe")).equal


def test_a_wrong_router_is_not_equal(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = family_checkpoint("qwen3_moe")
    plan, out = refitted(source, tmp_path)
    keep = plan.layers["2"].keep
    other = next(e for e in range(8) if e not in keep)
    wrong = replace(plan, layers={**plan.layers, "2": replace(plan.layers["2"], keep=(*keep[:-1], other))})
    assert not compare_forward(source, wrong, out, batches("qwen3_moe")).equal


@pytest.mark.filterwarnings("ignore:.*the pass begins again")
def test_a_pass_that_begins_again(
    family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tangled(self: Stepwise, layer: int, *arguments: Any) -> None:
        if layer == 1:
            raise Tangled(layer)
        through(self, layer, *arguments)

    source, through = family_checkpoint("qwen3_moe"), Stepwise.through
    plan, out = refitted(source, tmp_path)
    monkeypatch.setattr(layerwise, "_TANGLED", set[type]())
    monkeypatch.setattr(Stepwise, "through", tangled)
    assert compare_forward(source, plan, out, batches("qwen3_moe")).equal


def test_layers_that_run_in_groups_are_refused(
    family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = family_checkpoint("qwen3_moe")
    plan, out = refitted(source, tmp_path)
    tighten(monkeypatch, source, Compute(dtype="float32"))
    with pytest.raises(InputError, match="in groups of experts"):
        compare_forward(source, plan, out, batches("qwen3_moe"))


def test_the_command(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = family_checkpoint("qwen3_moe")
    plan, out = refitted(source, tmp_path)
    plan.save(tmp_path / "plan.json")
    arguments = ["verify", str(source), str(tmp_path / "plan.json"), str(out), "--forward"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(done.stdout)
    assert (found["good"], found["forward"]["equal"], found["computed"]) == (True, True, 16)
    assert "pruned and refitted in memory" in CliRunner().invoke(app, arguments).output.replace("\n", " ")

"""Pruned folders whose dropped experts are constants, against files that are written out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.replacement import Replacement
from moekern.pruning.prune import prune
from moekern.pruning.shards import bytes_after
from moekern.verification.tensors import verify
from tests.helpers.substitution import EXPERTS, KEEP, Vectors, bfloat16, replacing
from tests.helpers.synthetic import deepseek_v3, gpt_oss_mxfp4, qwen3, read, write

EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.weight")
ROUTING = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}


def dropped(layer: str) -> list[int]:
    return [e for e in range(EXPERTS) if e not in KEEP[layer]]


def expected(tensors: Any, vectors: Vectors | None, name: str) -> Any:
    """What must be left: dropped experts' tensors are one constant each, and nothing else is touched."""
    want = {}
    for key, tensor in tensors.items():
        found = EXPERT.fullmatch(key)
        if found is None or int(found[2]) in KEEP[found[1]]:
            want[key] = tensor
        elif found[3] == "down_proj":
            values = np.zeros(6) if vectors is None else vectors.of(found[1])[int(found[2])]
            want[name.format(layer=found[1], expert=found[2])] = ("BF16", [6], bfloat16(values))
    return want


@pytest.mark.parametrize(
    ("kind", "form", "shards"),
    [("mean", None, 3), ("zero", "approximate-experts", 1), ("mean", "approximate-experts", 2)],
)
def test_folder(kind: str, form: str | None, shards: int, tmp_path: Path) -> None:
    config, tensors = qwen3()
    source, out = write(tmp_path / "model", config, tensors, shards, interleave=True), tmp_path / "out"
    vectors = Vectors() if kind == "mean" else None
    plan = replacing(kind)
    report = prune(source, plan, out, form=form, vectors=vectors)
    checkpoint = open_checkpoint(source)
    assert bytes_after(checkpoint, find_layout(checkpoint), plan) == open_checkpoint(out).nbytes
    if form != "approximate-experts":
        name = "model.layers.{layer}.mlp.expert_replacements.{expert}.value"
    else:
        name = "model.layers.{layer}.mlp.experts.{expert}.approx_value"
    want = expected(tensors, vectors, name)
    assert read(out) == want
    assert report.replaced == 5 + 7
    if shards > 1:
        weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert weight_map.keys() == want.keys()
    made = json.loads((out / "config.json").read_text())
    if form != "approximate-experts":
        targets = made["compression_config"]["transform_config"]["expert_substitution"].pop("targets")
        assert made.pop("compression_config") == {
            "transform_config": {"expert_substitution": {"version": 1, "router_semantics": ROUTING}}
        }
        assert targets == {
            f"model.layers.{layer}.mlp.experts": {
                "num_logical_experts": EXPERTS,
                "weight_layout": "compact_retained_experts",
                "replacements": {
                    str(e): {"format": "constant-v1", "tensors": {"value": name.format(layer=layer, expert=e)}}
                    for e in dropped(layer)
                },
            }
            for layer in ("0", "1")
        }
    else:
        assert made.pop("approximate_experts") == {"0": dropped("0"), "1": dropped("1")}
    assert made == config
    record = json.loads((out / "moekern_plan.json").read_text())
    told = {"form": form or "compression-config", "constants": kind}
    assert record["replaced"] == told | ({} if vectors is None else {"statistics": "0" * 64})
    assert record["plan"]["replace"]["constants"] == kind
    assert verify(source, plan, out, vectors=vectors).problems == ()


def test_shards_made_anew_hold_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "model", *qwen3(), 1)
    prune(source, replacing(), tmp_path / "a", vectors=Vectors())
    prune(source, replacing(), tmp_path / "b", vectors=Vectors(), max_shard_size=400)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert verify(source, replacing(), tmp_path / "b", vectors=Vectors()).problems == ()


def test_mtp_layers_stay_whole_or_go(tmp_path: Path) -> None:
    config, tensors = deepseek_v3()
    plain = {k: ("BF16", s, d * 2) if t == "F8_E4M3" else (t, s, d) for k, (t, s, d) in tensors.items()}
    source = write(tmp_path / "model", config, {k: t for k, t in plain.items() if "scale_inv" not in k})
    plan = replacing("zero", {"1": (0, 1, 2), "2": (7,)})  # more of one group than of the other
    prune(source, plan, tmp_path / "kept")
    held = read(tmp_path / "kept")
    assert sum(name.startswith("model.layers.3.mlp.experts.") for name in held) == 3 * EXPERTS
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert verify(source, plan, tmp_path / "kept").problems == ()
    prune(source, plan, tmp_path / "dropped", mtp="drop")
    assert not any(name.startswith("model.layers.3.") for name in read(tmp_path / "dropped"))
    assert verify(source, plan, tmp_path / "dropped").problems == ()
    with pytest.raises(InputError, match="--mtp prune: .* use --mtp keep or --mtp drop"):
        prune(source, plan, tmp_path / "no", mtp="prune")


@pytest.mark.parametrize(
    ("made", "keep", "reason"),
    [
        (gpt_oss_mxfp4, KEEP, "holds all experts in one tensor, and .* reads one tensor an expert; write them"),
        (deepseek_v3, {"1": (0,), "2": (1,)}, "is F8_E4M3: .* is for plain experts; dequantise them"),
    ],
)
def test_models_that_cannot_be(made: Any, keep: Any, reason: str, tmp_path: Path) -> None:
    source = write(tmp_path / "model", *made())
    with pytest.raises(InputError, match=f"experts cannot become constants: layer ..? ?.*{reason}"):
        prune(source, replacing("zero", keep), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_options(tmp_path: Path) -> None:
    source, out = write(tmp_path / "model", *qwen3()), tmp_path / "out"
    plain = Plan({key: LayerPlan((0, 1, 2, 3)) for key in KEEP})
    for plan, options, reason in (
        (replacing(), {}, "--statistics: the plan replaces experts by constants .mean.: give their file"),
        (replacing("zero"), {"vectors": Vectors()}, "--statistics: .* by zeros, which need none"),
        (replacing("least-squares"), {"vectors": Vectors()}, "mean was made, the plan asks for least-squares"),
        (plain, {"form": "approximate-experts"}, "--form, --statistics: the plan drops experts, and replaces none"),
        (replacing("zero"), {"form": "other"}, "--form other: expected one of compression-config, approximate-experts"),
    ):
        with pytest.raises(InputError, match=reason):
            prune(source, plan, out, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no expert is kept|expected an object with .keep."):
        Plan.from_json(replacing("zero", {"0": (), "1": (1,)}).to_json())
    for vectors, reason in (
        (Vectors(size=5), "the statistics have 5 numbers of an expert's output, and its down projection 6"),
        (Vectors(scale=1e39), "beyond the range of BF16; use --replace zero"),
    ):
        with pytest.raises(InputError, match=reason):
            prune(source, replacing(), out, vectors=vectors)
        assert not out.exists()


def test_experts_without_tokens_are_told(tmp_path: Path) -> None:
    source = write(tmp_path / "model", *qwen3())
    report = prune(source, replacing(), tmp_path / "out", vectors=Vectors(unseen={"0": (0, 1, 3), "1": (4,)}))
    assert "2 of the 12 replaced experts had no token in the statistics: zeros stand for them" in report.notes


def test_the_same_command_goes_on_and_another_does_not(tmp_path: Path) -> None:
    """A shard that is proved done is taken over only for the same constants."""
    source, out = write(tmp_path / "model", *qwen3()), tmp_path / "out"
    prune(source, replacing(), out, vectors=Vectors())
    again = prune(source, replacing(), out, vectors=Vectors(), again=True)
    assert again.already
    other = Vectors(replacement=Replacement("mean", "1" * 64))
    with pytest.raises(InputError, match="exists"):
        prune(source, replacing(statistics="1" * 64), out, vectors=other, again=True)

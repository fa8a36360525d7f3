"""What a config says of experts that are constants, and the checkpoint as if they were whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moekern.architectures import find_layout
from moekern.architectures.substitution import as_whole
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.estimation.overview import overview
from moekern.plan.served import check_folder, verdict
from moekern.plan.targets import Target
from moekern.pruning.prune import prune
from tests.helpers.substitution import KEEP, Vectors, replacing
from tests.helpers.synthetic import qwen3, write

FORMS = ["approximate-experts", "compression-config"]


@pytest.fixture
def replaced(tmp_path: Path) -> Callable[..., Path]:
    def made(form: str = "approximate-experts") -> Path:
        source = write(tmp_path / "model", *qwen3())
        prune(source, replacing(), tmp_path / form, form=form, vectors=Vectors())
        return tmp_path / form

    return made


@pytest.mark.parametrize("form", FORMS)
def test_all_experts_are_there_again(form: str, replaced: Callable[..., Path]) -> None:
    stored = open_checkpoint(replaced(form))
    whole, constants = as_whole(stored)
    assert {key: tuple(sorted(each.tensors)) for key, each in constants.items()} == {
        key: tuple(e for e in range(8) if e not in kept) for key, kept in KEEP.items()
    }
    layout, original = find_layout(whole), open_checkpoint(stored.folder.parent / "model")
    assert whole.tensors.keys() == original.tensors.keys()
    assert whole.config == original.config
    assert layout.num_experts == 8
    for name, entry in whole.tensors.items():
        assert (entry.dtype, entry.shape) == (original.tensors[name].dtype, original.tensors[name].shape)
        if name in stored.tensors:
            assert whole.read(name) == original.read(name)
    assert as_whole(original) == (original, {})


def test_what_else_is_done_with_such_a_folder(replaced: Callable[..., Path], tmp_path: Path) -> None:
    folder = replaced()
    with pytest.raises(InputError, match="its dropped experts are constants .* take the original"):
        find_layout(open_checkpoint(folder))
    with pytest.raises(InputError, match="its dropped experts are constants"):
        prune(folder, replacing("zero"), tmp_path / "again")
    found = overview(folder)
    assert found.num_experts == 8
    assert found.total_bytes == sum(entry.nbytes for entry in open_checkpoint(folder).tensors.values())
    assert found.routed_bytes == 4 * 3 * 48
    assert "5 to 7 experts in each of 2 layers are constants" in found.notes[0]
    report = check_folder(folder)
    assert report.counts == {"0": 3, "1": 1}
    assert {name: verdict(row) for name, row in report.found.items()} == dict.fromkeys(report.found, False) | {
        "vllm": True
    }
    (finding, *_) = check_folder(folder, [Target("vllm", ep=2)]).found["vllm:ep=2"]
    assert finding.stops
    assert "without expert parallelism" in finding.text


def change(config: dict[str, Any], value: Any) -> None:
    config["approximate_experts"] = value


def nested(config: dict[str, Any]) -> Any:
    return config["compression_config"]["transform_config"]["expert_substitution"]


def tensors_of(config: dict[str, Any]) -> Any:
    """Expert -> the object that names its constant, of the first layer."""
    return {e: each["tensors"] for e, each in nested(config)["targets"][PREFIX]["replacements"].items()}


NORM = "model.layers.0.input_layernorm.weight"
PREFIX, REST = "model.layers.0.mlp.experts", [0, 1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("form", "edit", "reason"),
    [
        (FORMS[0], lambda c: change(c, [1, 2]), "approximate_experts is"),
        (FORMS[0], lambda c: change(c, {"0": [1, 1]}), "layer 0: expected different numbers of experts"),
        (FORMS[0], lambda c: change(c, {"0": [-1]}), "layer 0: expected different numbers of experts"),
        (FORMS[0], lambda c: change(c, {"0": 3}), "layer 0: expected different numbers of experts"),
        (FORMS[0], lambda c: change(c, {"0": list(range(8)), "1": REST}), "is missing"),
        (FORMS[0], lambda c: change(c, {"7": [1]}), "layer 7: no tensor ends in"),
        (FORMS[0], lambda c: change(c, {"0": [1], "1": [0]}), "3.approx_value is of no expert that"),
        (
            FORMS[0],
            lambda c: change(c, {"0": [0, 1, 3, 4, 5, 6], "1": REST}),
            "0.approx_value., the constant of expert 0, is mi",
        ),
        (FORMS[0], lambda c: c.update(compression_config={"transform_config": {"expert_substitution": {}}}), "both"),
        (
            FORMS[1],
            lambda c: nested(c)["targets"].update({f"x.0.{PREFIX[-7:]}": nested(c)["targets"][PREFIX]}),
            "already",
        ),
        (FORMS[1], lambda c: tensors_of(c)["1"].update(value="model.norm.weight"), "is missing|several lengths"),
        (
            FORMS[1],
            lambda c: tensors_of(c)["1"].update(value=f"{PREFIX[:-11]}input_layernorm.weight"),
            "several lengths",
        ),
        (FORMS[1], lambda c: nested(c).update(version=2), "expected version 1"),
        (FORMS[1], lambda c: nested(c)["targets"].update(x={}), "target 'x': expected one layer"),
        (FORMS[1], lambda c: nested(c)["targets"][PREFIX]["replacements"].update({"1": 3}), "expert 1: expected a"),
        (FORMS[1], lambda c: nested(c)["targets"][PREFIX].update(replacements=[1]), "replacements: expected"),
    ],
)
def test_unsound_configs(form: str, edit: Callable[[Any], None], reason: str, replaced: Callable[..., Path]) -> None:
    folder = replaced(form)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError, match=reason) as error:
        find_layout(as_whole(checkpoint)[0])
    assert "\n" not in str(error.value)


def test_layers_may_share_a_constant(replaced: Callable[..., Path]) -> None:
    """As vLLM reads it: one tensor for experts of several layers."""
    folder = replaced(FORMS[1])
    config = json.loads((folder / "config.json").read_text())
    name = tensors_of(config)["1"]["value"]
    for target in nested(config)["targets"].values():
        for each in target["replacements"].values():
            each["tensors"]["value"] = name
    (folder / "config.json").write_text(json.dumps(config))
    whole, constants = as_whole(open_checkpoint(folder))
    assert {value for each in constants.values() for value in each.tensors.values()} == {name}
    assert name not in whole.tensors

"""What moekern leans on inside transformers: when one of these fails, model/transformers_api.py has to change."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from moekern.errors import InputError
from moekern.model import transformers_api as api
from tests.helpers import ROOT, families

PACKAGE = ROOT / "moekern"


def _parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_version_is_in_the_range_that_was_checked() -> None:
    assert Version("5.17") <= Version(transformers.__version__) < Version("6")


def test_signatures() -> None:
    assert _parameters(api.get_model_conversion_mapping)[0] == "model"
    assert _parameters(api.rename_source_key)[:5] == [
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict",
    ]  # fmt: skip
    assert _parameters(api.convert_and_load_state_dict_in_model)[:3] == ["model", "state_dict", "load_config"]
    assert {"device_map", "dtype", "dtype_plan", "weight_mapping"} <= set(_parameters(api.LoadStateDictConfig))
    assert _parameters(api.grouped_linear) == ["input", "weight", "offs", "bias", "is_transposed"]
    assert "moekern" not in api.EXPERTS_FUNCTIONS or callable(api.EXPERTS_FUNCTIONS["moekern"])


def test_only_one_module_reaches_into_transformers() -> None:
    inside: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                inside.add(path.name)
    assert inside == {"transformers_api.py"}


def test_a_partial_state_fills_what_it_names_and_nothing_else(family_checkpoint: Callable[[str], Path]) -> None:
    loader = api.open_loader(family_checkpoint("mixtral"), torch.float32)
    assert all(p.is_meta for p in loader.model.parameters())
    names = [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(8)]
    values = {name: torch.randn(32, 24) for name in names}
    loader.load(values, torch.device("cpu"))
    filled = {name: p for name, p in loader.model.named_parameters() if not p.is_meta}
    assert list(filled) == ["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(filled["model.layers.1.mlp.experts.down_proj"], torch.stack(list(values.values())))


def test_keys_are_renamed_as_from_pretrained_does(family_checkpoint: Callable[[str], Path]) -> None:
    loader = api.open_loader(family_checkpoint("mixtral"), torch.float32)
    gate_up = "model.layers.1.mlp.experts.gate_up_proj"
    assert loader.model_key("model.layers.1.block_sparse_moe.experts.3.w1.weight") == gate_up
    assert loader.model_key("model.layers.1.input_layernorm.weight") == "model.layers.1.input_layernorm.weight"
    assert loader.model_key("model.layers.99.input_layernorm.weight") is None


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in families.NO_CALIBRATION])
def test_routers_and_decoder_layers_are_found(name: str, whole_model: Callable[[str], Any]) -> None:
    model = whole_model(name)
    loader = api.loader_of(model)
    path, layers = loader.decoder_layers()
    assert len(layers) >= 2
    routers = api.router_modules(model, model)
    assert routers
    assert sum(router.startswith(f"{path}.") for router in routers) >= 1


def test_a_shape_that_config_does_not_imply_is_refused(family_checkpoint: Callable[[str], Path]) -> None:
    loader = api.open_loader(family_checkpoint("mixtral"), torch.float32)
    with pytest.raises(InputError, match=r"input_layernorm\.weight: the checkpoint holds shape \(7,\)"):
        loader.load({"model.layers.1.input_layernorm.weight": torch.zeros(7)}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", "four", "transformers cannot read it"),
        ("hidden_act", "no such activation", "no model can be built from it"),
        ("model_type", "no-such-model", "transformers cannot read it"),
    ],
)
def test_a_config_transformers_cannot_use_ends_in_one_line(
    key: str, value: str, message: str, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((family_checkpoint("mixtral") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=message) as caught:
        api.open_loader(tmp_path, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "path", "value", "message"),
    [
        ("mixtral", "num_labels", 10**9, "num_labels is 1000000000, and no model has more than 10000"),
        ("mixtral", "max_position_embeddings", 1e30, "max_position_embeddings is 1e.30, and no model has more"),
        ("mixtral", "rope_theta", 10**9, None),
        ("mixtral", "architectures", [5], "transformers cannot read it"),
        ("mixtral", "architectures", 2.5, "transformers cannot read it"),
        ("mixtral", "quantization_config", 7, "transformers cannot read it"),
        ("minimax", "block_size", 9_999_999, "block_size is 9999999, and no model has more than 10000"),
        (
            "kimi_k25",
            "vision_config.num_hidden_layers",
            10_000,
            "more than [0-9]+ modules, too many for the checkpoint's",
        ),
        ("kimi_k25", "vision_config.pos_emb_time", 1 << 24, "buffers of [0-9]+ bytes beside its weights"),
    ],
)
def test_a_config_asks_for_no_more_than_a_model_takes(
    family: str, path: str, value: Any, message: str | None, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    config = json.loads((family_checkpoint(family) / "config.json").read_text())
    *sections, key = path.split(".")
    for holder in [config[name] for name in sections] or [config]:
        holder[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    if message is None:
        assert api.open_loader(tmp_path, torch.float32, tensors=100).model.config.architectures
        return
    with pytest.raises(InputError, match=message) as caught:
        api.open_loader(tmp_path, torch.float32, tensors=100)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))

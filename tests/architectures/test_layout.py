"""How a layout is found from keys and config, and what is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.router import Router
from tests.helpers.layouts import BIAS, GUD, STACK, W123, layout_of, moe_keys, write_checkpoint

QWEN = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2}
DEEPSEEK = {
    "model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2, "n_group": 4,
    "topk_group": 2, "num_nextn_predict_layers": 1,
}  # fmt: skip


def qwen_keys(layers: int = 2, **options: Any) -> dict[str, tuple[str, list[int]]]:
    keys: dict[str, tuple[str, list[int]]] = {"model.embed_tokens.weight": ("BF16", [96, 32])}
    for i in range(layers):
        keys[f"model.layers.{i}.self_attn.q_proj.weight"] = ("BF16", [32, 32])
        keys |= moe_keys(f"model.layers.{i}.mlp.", GUD, **options)
    return keys


def test_numbered_mtp_layers(tmp_path: Path) -> None:
    keys = moe_keys("model.layers.1.mlp.", GUD, bias=BIAS, suffixes=("weight", "weight_scale_inv"))
    keys |= moe_keys("model.layers.2.mlp.", GUD, bias=BIAS, suffixes=("weight", "weight_scale_inv"))
    keys |= {"model.layers.0.mlp.gate_proj.weight": ("BF16", [4, 4]), "model.layers.2.eh_proj.weight": ("BF16", [4, 4])}
    _, layout = layout_of(write_checkpoint(tmp_path, DEEPSEEK, keys))
    assert list(layout.layers) == ["1"]
    assert list(layout.mtp) == ["2"]
    assert layout.mtp["2"].mtp
    assert layout.mtp_prefixes == ("model.layers.2.",)
    assert layout.mtp_paths == (("num_nextn_predict_layers",),)
    assert layout.router == Router(8, 2, 4, 2, 2)


@pytest.mark.parametrize(
    ("prefix", "beginning"),
    [
        ("mtp.layers.0.mlp.", "mtp."),
        ("model.mtp.layers.0.mlp.", "model.mtp."),
        ("model.mtp_layers.0.mlp.", "model.mtp_layers."),
        ("mtp.0.mlp.", "mtp."),
        ("model.mtp_block.0.mlp.", "model.mtp_block."),
    ],
)
def test_named_mtp_layers(tmp_path: Path, prefix: str, beginning: str) -> None:
    keys = qwen_keys() | moe_keys(prefix, GUD) | {f"{beginning}fc.weight": ("BF16", [4, 4])}
    config = QWEN | {"model_type": "qwen3_next", "mtp_num_hidden_layers": 1}
    _, layout = layout_of(write_checkpoint(tmp_path, config, keys))
    assert list(layout.layers) == ["0", "1"]
    assert list(layout.mtp) == ["mtp.0"]
    assert layout.mtp["mtp.0"].prefix == prefix.removesuffix(".mlp.")
    assert layout.mtp_prefixes == (beginning,)
    assert layout.mtp_paths == (("mtp_num_hidden_layers",),)


def test_dense_mtp_layers_have_prefixes_too(tmp_path: Path) -> None:
    keys = qwen_keys() | {"model.layers.2.mlp.gate_proj.weight": ("BF16", [4, 4])}
    _, layout = layout_of(write_checkpoint(tmp_path, QWEN, keys))
    assert not layout.mtp
    assert layout.mtp_prefixes == ("model.layers.2.",)


def test_hash_layers(tmp_path: Path) -> None:
    keys = moe_keys("layers.0.ffn.", W123, suffixes=("weight", "scale"))
    keys["layers.0.ffn.gate.tid2eid"] = ("I32", [96, 2])
    keys |= moe_keys("layers.1.ffn.", W123, bias="gate.bias", suffixes=("weight", "scale"))
    keys |= moe_keys("mtp.0.ffn.", W123, bias="gate.bias", suffixes=("weight", "scale"))
    config = DEEPSEEK | {"model_type": "deepseek_v4"}
    _, layout = layout_of(write_checkpoint(tmp_path, config, keys))
    assert layout.family.score == "sqrtsoftplus"
    assert [t.name for t in layout.layers["0"].of_role("table")] == ["layers.0.ffn.gate.tid2eid"]
    assert [t.action for t in layout.layers["0"].of_role("table")] == ["remap"]
    assert not list(layout.layers["0"].of_role("bias"))
    assert len(list(layout.layers["1"].of_role("bias"))) == 1
    assert list(layout.mtp) == ["mtp.0"]
    assert (layout.router.n_group, layout.router.topk_group) == (1, 1)


def test_trailing_rows(tmp_path: Path) -> None:
    keys = moe_keys(
        "model.layers.0.mlp.", GUD, "router.classifier.weight", "router.e_score_correction_bias", trailing=4
    )
    config = {"model_type": "longcat_flash", "n_routed_experts": 8, "moe_topk": 2, "zero_expert_num": 4}
    _, layout = layout_of(write_checkpoint(tmp_path, config, keys))
    assert {(t.role, t.trailing) for t in layout.layers["0"].tensors} == {("expert", 0), ("router", 4), ("bias", 4)}

    keys = moe_keys("model.llm.layers.0.mlp.", "experts.w13_weight|w2_weight", trailing=2, suffixes=("",))
    keys["model.llm.layers.0.mlp.gate.bias"] = ("F32", [8])
    config = {
        "model_type": "inkling_mm_model",
        "text_config": {"n_shared_experts": 2, "n_routed_experts": 8, "num_experts_per_tok": 2},
    }
    _, layout = layout_of(write_checkpoint(tmp_path / "inkling", config, keys))
    assert {(t.role, t.trailing) for t in layout.layers["0"].tensors} == {("expert", 0), ("router", 2), ("bias", 0)}


def test_stacked_companions(tmp_path: Path) -> None:
    keys = moe_keys(
        "model.layers.0.mlp.", "experts.gate_up_proj|down_proj", "router.weight", "router.bias", suffixes=()
    )
    for name in ("gate_up_proj", "down_proj"):
        keys[f"model.layers.0.mlp.experts.{name}_blocks"] = ("U8", [8, 32, 2, 16])
        keys[f"model.layers.0.mlp.experts.{name}_scales"] = ("U8", [8, 32, 2])
        keys[f"model.layers.0.mlp.experts.{name}_bias"] = ("BF16", [8, 32])
        keys[f"model.layers.0.mlp.experts.{name}.input_scale"] = ("F32", [1])
    config = {"model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2, "experts_per_token": 2}
    _, layout = layout_of(write_checkpoint(tmp_path, config, keys))
    found = {t.name.rsplit(".", 1)[1] for t in layout.layers["0"].of_role("expert")}
    assert found == {f"{n}_{s}" for n in ("gate_up_proj", "down_proj") for s in ("blocks", "scales", "bias")}
    assert all(t.action == "slice" and t.axis == 0 for t in layout.layers["0"].tensors)


def test_folded_experts_and_bias_on_the_last_axis(tmp_path: Path) -> None:
    start = "transformer.blocks.0.ffn."
    keys = {f"{start}experts.mlp.{name}": ("BF16", [8 * 24, 32]) for name in ("w1", "v1", "w2")}
    keys[f"{start}router.layer.weight"] = ("BF16", [8, 32])
    config = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2}}
    _, layout = layout_of(write_checkpoint(tmp_path / "dbrx", config, keys))
    assert {t.rows for t in layout.layers["0"].of_role("expert")} == {24}

    keys = moe_keys("model.layers.1.mlp.", GUD) | {
        "model.layers.1.mlp.moe_statics.e_score_correction_bias": ("F32", [1, 8])
    }
    config = {"model_type": "ernie4_5_moe", "moe_num_experts": 8, "moe_k": 2}
    _, layout = layout_of(write_checkpoint(tmp_path / "ernie", config, keys))
    assert [t.axis for t in layout.layers["1"].of_role("bias")] == [1]


@pytest.mark.parametrize("stack", ["talker.model.layers", "model.vision_encoder.blocks", "visual.blocks"])
def test_experts_of_other_stacks_are_left_alone(tmp_path: Path, stack: str) -> None:
    keys = {key.replace("model.", "thinker.model.", 1): value for key, value in qwen_keys().items()}
    keys |= moe_keys(f"{stack}.0.mlp.", GUD, num_experts=4)
    text = {"num_experts": 8, "num_experts_per_tok": 2}
    config = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"text_config": text, "vision_config": {"num_experts": 4}},
        "talker_config": {"text_config": {"num_experts": 4}},
    }
    _, layout = layout_of(write_checkpoint(tmp_path, config, keys))
    assert layout.count_paths == (("thinker_config", "text_config", "num_experts"),)
    assert all(t.name.startswith("thinker.") for layer in layout.layers.values() for t in layer.tensors)


def test_encoder_and_decoder_layers_have_keys_of_their_own(tmp_path: Path) -> None:
    keys: dict[str, tuple[str, list[int]]] = {}
    for prefix in ("decoder.block.1.layer.2.mlp.", "encoder.block.3.layer.1.mlp.", "encoder.block.1.layer.1.mlp."):
        keys |= moe_keys(prefix, "experts.expert_#.wi|wo", "router.classifier.weight")
    config = {"model_type": "switch_transformers", "num_experts": 8, "num_layers": 2}
    _, layout = layout_of(write_checkpoint(tmp_path, config, keys))
    assert list(layout.layers) == ["encoder.1", "encoder.3", "decoder.1"]
    tensor = layout.layers["decoder.1"].tensors[0]
    assert tensor.renamed(5) == "decoder.block.1.layer.2.mlp.experts.expert_5.wi.weight"


@pytest.mark.parametrize("model_type", ["something_new", "qwen3_moe", "", None])
def test_layout_comes_from_the_keys(tmp_path: Path, model_type: str | None) -> None:
    keys = moe_keys("model.layers.0.block_sparse_moe.", W123)
    config = {"model_type": model_type, "num_local_experts": 8, "num_experts_per_tok": 2}
    _, layout = layout_of(write_checkpoint(tmp_path, config, keys))
    assert layout.family.name == "mixtral"


def test_keys_of_v3_under_a_new_name(tmp_path: Path) -> None:
    keys = moe_keys("model.layers.0.mlp.", GUD, bias=BIAS)
    _, layout = layout_of(write_checkpoint(tmp_path, DEEPSEEK | {"model_type": "new", "num_hidden_layers": 1}, keys))
    assert layout.family.name == "deepseek_v3"
    assert layout.family.score == "sigmoid"


@pytest.mark.parametrize(
    ("model_type", "settings", "score"),
    [
        ("cohere2_moe", {}, "softmax"),
        ("cohere2_moe", {"expert_selection_fn": "sigmoid"}, "sigmoid"),
        ("qwen3_moe", {"scoring_func": "sigmoid"}, "softmax"),
    ],
)
def test_score_function_that_the_config_names(tmp_path: Path, model_type: str, settings: Any, score: str) -> None:
    _, layout = layout_of(write_checkpoint(tmp_path, QWEN | settings | {"model_type": model_type}, qwen_keys()))
    assert layout.family.score == score


@pytest.mark.parametrize(("method", "groups"), [("greedy", (1, 1)), ("group_limited_greedy", (4, 2)), (None, (1, 1))])
def test_groups_of_deepseek_v2(tmp_path: Path, method: str | None, groups: tuple[int, int]) -> None:
    config = DEEPSEEK | {"model_type": "deepseek_v2", "topk_method": method}
    _, layout = layout_of(write_checkpoint(tmp_path, config, qwen_keys()))
    assert layout.router == Router(8, 2, *groups)


@pytest.mark.parametrize(("name", "groups"), [("something_new", (4, 2, 2)), ("qwen3_moe", (1, 1, 1))])
def test_groups_of_a_model_that_is_not_known(tmp_path: Path, name: str, groups: tuple[int, ...]) -> None:
    """Its tensors fit a family without groups; what config.json says counts, since its code may choose by them."""
    config = QWEN | {"model_type": name, "n_group": 4, "topk_group": 2}
    _, layout = layout_of(write_checkpoint(tmp_path, config, qwen_keys()))
    assert layout.router == Router(8, 2, *groups)


def test_count_keys_everywhere(tmp_path: Path) -> None:
    config = QWEN | {"num_local_experts": 8, "n_routed_experts": None, "text_config": {"moe_num_experts": [8, 8]}}
    config |= {"quantization_config": {"num_experts": 3}, "vision_config": {"num_experts": 4}}
    _, layout = layout_of(write_checkpoint(tmp_path, config, qwen_keys()))
    assert layout.count_paths == (("num_experts",), ("num_local_experts",), ("text_config", "moe_num_experts"))


def change(keys: dict[str, Any], name: str, shape: list[int] | None = None, new: str | None = None) -> dict[str, Any]:
    dtype, old = keys[name]
    rest = {key: value for key, value in keys.items() if key != name}
    return rest if shape is None and new is None else rest | {new or name: (dtype, shape or old)}


FIRST = "model.layers.0.mlp."
MTP_KEYS = moe_keys("mtp.layers.0.mlp.", GUD)
DOGE = ("down_embed", "up_embed", "router_gate")
REFUSED: Mapping[str, tuple[Any, Any, str]] = {
    "dense": (QWEN, {"model.layers.0.mlp.gate_proj.weight": ("BF16", [4, 4])}, "not a Mixture-of-Experts checkpoint"),
    "shared experts only": (
        QWEN, {f"{FIRST}shared_expert.gate_proj.weight": ("BF16", [4, 4])}, "not a Mixture-of-Experts checkpoint",
    ),
    "unknown projections": (
        QWEN, moe_keys(FIRST, "experts.#.alpha|beta"),
        r"no known family has these keys: model.layers.0.mlp.experts.0.alpha.weight, .* \(16 keys not understood\)",
    ),
    "unknown router": (QWEN, moe_keys(FIRST, GUD, "router_two.weight"), "keys: model.layers.0.mlp.router_two.weight"),
    "no router": (QWEN, change(moe_keys(FIRST, GUD), f"{FIRST}gate.weight"), "no router for its experts"),
    "no router in one layer": (
        QWEN, change(qwen_keys(), "model.layers.1.mlp.gate.weight"), r"layers.1: 1 blocks of experts, but 0 routers",
    ),
    "router without experts": (
        QWEN, qwen_keys() | {"model.layers.2.mlp.gate.weight": ("BF16", [8, 32])}, r"layers.2: 0 blocks .* 1 routers",
    ),
    "a bias alone in a layer": (
        DEEPSEEK, moe_keys(FIRST, GUD, bias=BIAS) | {f"model.layers.1.mlp.{BIAS}": ("F32", [8])},
        "layers.1: 0 blocks of experts, but 0 routers .gate.weight. for model.layers.1.mlp.gate.e_score_corr",
    ),
    "unknown vector": (QWEN, qwen_keys() | {f"{FIRST}gate.new_bias": ("F32", [8])}, r"gate.new_bias \(1 keys"),
    "second set of experts": (
        QWEN, qwen_keys() | {f"{FIRST}more_experts.0.w.weight": ("F32", [8])}, r"more_experts.0.w.weight \(1 keys",
    ),
    "quantised router": (
        QWEN, change(qwen_keys(), f"{FIRST}gate.weight", new=f"{FIRST}gate.qweight"), r"mlp.gate.qweight \(1 keys",
    ),
    "router with block scales": (
        QWEN, qwen_keys() | {f"{FIRST}gate.weight_scale_inv": ("F32", [1, 4])},
        r"gate.weight_scale_inv: shape \[1, 4\]",
    ),
    "missing expert": (
        QWEN, {k: v for k, v in qwen_keys().items() if ".1.mlp.experts.3." not in k},
        r"model.layers.1.mlp.experts.3.gate_proj.weight is missing; the router has 8 experts",
    ),
    "missing projection": (
        QWEN, change(qwen_keys(), f"{FIRST}experts.7.up_proj.weight"),
        r"layers.0.mlp.experts.7.up_proj.weight is missing",
    ),
    "projection missing everywhere": (
        QWEN, moe_keys(FIRST, "experts.#.gate_proj|up_proj"), "experts have gate_proj/up_proj, expected",
    ),
    "stacked and indexed": (
        QWEN, qwen_keys() | {f"{FIRST}experts.gate_up_proj": ("F32", [8, 4])}, "stored in 2 ways",
    ),
    "more experts than rows": (
        QWEN, change(qwen_keys(), f"{FIRST}gate.weight", [7, 32]),
        r"experts.7.gate_proj.weight has no row in the router",
    ),
    "router of more rows": (
        QWEN, change(qwen_keys(), f"{FIRST}gate.weight", [9, 32]), "experts.8.gate_proj.weight is missing",
    ),
    "router without shape": (
        QWEN, change(qwen_keys(), f"{FIRST}gate.weight", new=f"{FIRST}gate.weight", shape=[0, 32]), "no row",
    ),
    "short bias": (
        DEEPSEEK, change(moe_keys(FIRST, GUD, bias=BIAS), f"{FIRST}{BIAS}", [7]),
        r"correction_bias: shape \[7\], expected 8",
    ),
    "stacked dims differ": (
        QWEN, change(moe_keys(FIRST, STACK, suffixes=("",)), f"{FIRST}experts.down_proj", [7, 4, 4]),
        r"model.safetensors: model.layers.0.mlp.experts.down_proj: shape \[7, 4, 4\], expected 8",
    ),
    "folded rows": (
        {"model_type": "dbrx"},
        {f"transformer.blocks.0.ffn.experts.mlp.{name}": ("F32", [20, 4]) for name in ("w1", "v1", "w2")}
        | {"transformer.blocks.0.ffn.router.layer.weight": ("F32", [8, 4])}, r"shape \[20, 4\], expected 16 rows",
    ),
    "counts differ between layers": (
        QWEN | {"num_hidden_layers": 9}, qwen_keys() | moe_keys("model.layers.5.mlp.", GUD, num_experts=6),
        r"layers.0 has 8 experts, model.layers.5 has 6",
    ),
    "config disagrees": (QWEN | {"num_experts": 16}, qwen_keys(), "num_experts is 16, but the tensors hold 8 experts"),
    "alias disagrees": (QWEN | {"num_local_experts": 4}, qwen_keys(), "num_local_experts is 4, but the tensors hold 8"),
    "count is no number": (QWEN | {"num_experts": "8"}, qwen_keys(), "num_experts is '8'"),
    "counts of blocks": (
        QWEN | {"block_configs": [{"block_type": "moe", "n_routed_experts": 8}]}, qwen_keys(),
        "config.json: block_configs counts the experts of each block",
    ),
    "no count": ({"num_experts_per_tok": 2}, qwen_keys(), "config.json: no key gives the number of experts"),
    "no top-k": ({"num_experts": 8}, qwen_keys(), "config.json: no key gives the experts a token chooses"),
    "top-k too large": (QWEN | {"num_experts_per_tok": 9}, qwen_keys(), "chooses 9 experts, but the tensors hold 8"),
    "groups do not divide": (
        DEEPSEEK | {"n_group": 3, "num_hidden_layers": 1}, moe_keys(FIRST, GUD, bias=BIAS),
        "8 experts in 3 groups of which 2 are chosen",
    ),
    "more layers than the tensors": (
        QWEN | {"num_hidden_layers": 10**9}, qwen_keys(), "num_hidden_layers is 1000000000, but the tensors hold 2"
    ),
    "fewer layers than the tensors": (
        QWEN | {"num_hidden_layers": 3}, qwen_keys(6), "num_hidden_layers is 3, but the tensors hold 6 layers, "
    ),
    "layers under another key": (
        {"num_experts": 8, "num_experts_per_tok": 2, "n_layers": 3}, qwen_keys(6), ": n_layers is 3, but the tensors"
    ),
    "no layers": (QWEN | {"num_hidden_layers": 0}, qwen_keys(), "only its multi-token-prediction layers have experts"),
    "negative layers": (QWEN | {"num_hidden_layers": -1}, qwen_keys(), "num_hidden_layers is -1, expected a whole"),
    "layers in quotes": (QWEN | {"num_hidden_layers": "2"}, qwen_keys(), "num_hidden_layers is '2', expected a whole"),
    "layers true": (QWEN | {"num_hidden_layers": True}, qwen_keys(), "num_hidden_layers is True, expected a whole"),
    "groups in quotes": (
        DEEPSEEK | {"n_group": "4", "num_hidden_layers": 1}, moe_keys(FIRST, GUD, bias=BIAS), "n_group is '4', expected"
    ),
    "half a choice": (
        QWEN | {"text_config": {"num_experts_per_tok": 2.5}}, qwen_keys(), "text_config.num_experts_per_tok is 2.5, exp"
    ),
    "unknown score function": (
        QWEN | {"model_type": "cohere2_moe", "expert_selection_fn": "argmax"}, qwen_keys(),
        "expert_selection_fn is 'argmax', expected one of softmax"
    ),
    "rows of no expert": (
        {"model_type": "longcat_flash", "num_layers": 1, "n_routed_experts": 8, "moe_topk": 2, "zero_expert_num": 99},
        moe_keys(FIRST, GUD, router="router.classifier.weight"), "its router has 8 rows, and by config.json 99"
    ),
    "text config of a list": (QWEN | {"text_config": [1]}, qwen_keys(), r"text_config is \[1\], expected an object"),
    "quantised by a number": (QWEN | {"quantization_config": 7}, qwen_keys(), "quantization_config is 7, expected"),
    "blocks of nothing": (
        QWEN | {"quantization_config": {"weight_block_size": [0, 128]}}, qwen_keys(),
        r"quantization_config.weight_block_size is \[0, 128\], expected two numbers above 0"
    ),
    "blocks in quotes": (
        QWEN | {"quantization_config": {"weight_block_size": "128"}}, qwen_keys(), "block_size is '128', expected"
    ),
    "several stacks": (
        QWEN, qwen_keys() | moe_keys("other.layers.0.mlp.", GUD),
        "experts in several stacks: model.layers, other.layers",
    ),
    "only MTP": (QWEN, MTP_KEYS, "only its multi-token-prediction layers have experts"),
    "MTP twice": (QWEN, qwen_keys() | MTP_KEYS | moe_keys("mtp.0.mlp.", GUD), "are both layer mtp.0"),
    "doge": (
        {"model_type": "doge"}, {f"{FIRST}{n}.weight": ("F32", [64, 8]) for n in DOGE},
        "doge models cannot be pruned: its experts are product keys"),
    "grove_moe": (
        QWEN | {"model_type": "grove_moe"},
        qwen_keys() | moe_keys(FIRST, "chunk_experts.#.gate_proj|up_proj|down_proj", num_experts=4),
        "grove_moe models cannot be pruned: each pair",
    ),
    "ernie4_5_vl_moe": (
        {"model_type": "ernie4_5_moe_vl"}, moe_keys(FIRST, GUD) | {f"{FIRST}gate.weight_1": ("F32", [32, 8])},
        "ernie4_5_vl_moe models cannot be pruned",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    config, keys, message = REFUSED[case]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config, keys))
    with pytest.raises(InputError, match=message) as caught:
        find_layout(checkpoint)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)

"""Where the width of experts stands in config and tensors, against what transformers builds."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern.architectures import FAMILIES, family_named, find_layout
from moekern.architectures.widths import mtp_problem, narrow_numbers, narrow_problem, width_problem, widths_held
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.pruning.cuts import check_mtp
from tests.helpers import families
from tests.helpers.in_flight import REFUSED
from tests.helpers.layouts import GUD, STACK, layout_of, moe_keys, write_checkpoint

SOME = ("qwen3_moe", "gpt_oss", "deepseek_v3", "dbrx", "jamba", "llama4_text", "longcat_flash", "aria", "jetmoe")
NAMES = [
    pytest.param(name, marks=[] if name in SOME else [pytest.mark.whole])
    for name in families.FAMILIES
    if name not in REFUSED
]
EXPERTS = (
    r"\.experts\.(?:mlp\.)?(?:gate_up_proj|up_proj|down_proj|w1|v1|w2)(?:_bias)?$|mlp\.(?:in|out)put_linear\.weight$"
)


def shapes(name: str, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in families.model_class(name)(config).state_dict().items()}


def changed(name: str, path: tuple[str, ...], by: Callable[[int], int]) -> set[str]:
    """Names of tensors whose shapes change with the number in the configuration at `path`."""
    config = families.FAMILIES[name]()
    holder = config
    for key in path[:-1]:
        holder = getattr(holder, key)
    setattr(holder, path[-1], by(getattr(holder, path[-1])))
    after = shapes(name, config)
    return {key for key, shape in shapes(name, families.FAMILIES[name]()).items() if after[key] != shape}


@pytest.mark.parametrize("name", NAMES)
def test_the_width_is_that_of_routed_experts_and_of_shared_ones_that_follow(
    name: str, family_checkpoint: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(family_checkpoint(name))
    layout = find_layout(checkpoint)
    assert layout.width == 24
    (path,) = layout.width_paths
    with_width = changed(name, path, lambda width: width + 8)
    routed = {key for key in shapes(name, families.FAMILIES[name]()) if re.search(EXPERTS, key)}
    routed = {key for key in routed if not re.search("talker|vision_tower|shared|self_attention|down_proj_bias", key)}
    shared = {key for key in with_width if re.search(r"\.shared_(?:experts?|mlp)\.", key)}
    if layout.family.width != "ffn_hidden_size":  # DBRX: w2 too, which has experts and channels in its rows
        assert routed <= with_width
    if narrow_problem(checkpoint, layout) is None:
        assert with_width <= routed | shared
        assert bool(shared) == bool(layout.shared_times)
        for times in layout.shared_paths:
            assert changed(name, times, lambda n: n + 1) == shared
    else:
        assert with_width - routed


def test_no_family_says_both_that_it_is_refused_and_how_wide_it_is() -> None:
    for row in FAMILIES:
        assert "" not in row.width.split("|") or not row.width, row.name
    assert family_named("grok-1").width == ""  # type: ignore[union-attr]


def test_gate_and_up_in_one_tensor_lie_along_the_axis_that_down_tells(tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 12}
    for stored, (first, second) in {"rows": ([24, 32], [32, 12]), "columns": ([32, 24], [12, 32])}.items():
        keys = moe_keys("model.layers.0.mlp.", STACK, "router.weight", "router.bias", suffixes=("",))
        keys["model.layers.0.mlp.experts.gate_up_proj"] = ("BF16", [8, *first])
        keys["model.layers.0.mlp.experts.down_proj"] = ("BF16", [8, *second])
        keys["model.layers.0.mlp.experts.gate_up_proj_bias"] = ("BF16", [8, 24])
        keys["model.layers.0.mlp.experts.down_proj_bias"] = ("BF16", [8, 32])
        checkpoint, layout = layout_of(write_checkpoint(tmp_path / stored, config, keys))
        assert layout.width == 12
        axes = {t.name.split(".")[-1]: t.channel_axis for t in layout.layers["0"].of_role("expert")}
        fused, down = (1, 2) if stored == "rows" else (2, 1)
        assert axes == {
            "gate_up_proj": fused, "down_proj": down, "gate_up_proj_bias": 1, "down_proj_bias": None,
        }  # fmt: skip
        forms = {t.projection: t.channel_form for t in layout.layers["0"].of_role("expert")}
        assert forms == {"gate_up": "alternating", "down": "plain"}
        assert narrow_problem(checkpoint, layout) is None


QWEN = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def plain(config: Mapping[str, Any] = QWEN, **changes: Any) -> dict[str, tuple[str, list[int]]]:
    keys = moe_keys("model.layers.0.mlp.", GUD, **changes)
    for name in keys:
        if "down_proj" in name:
            keys[name] = ("BF16", [32, 16])
    return keys


@pytest.mark.parametrize(
    ("config", "extra", "line"),
    [
        ({}, {}, None),
        ({"model_type": "something_new"}, {}, r"no family of the table is called something_new"),
        ({"moe_intermediate_size": 24}, {}, r"no key of config.json holds the width of the experts, 16"),
        ({"moe_intermediate_size": None}, {}, r"no key of config.json holds the width of the experts, 16"),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, r"its weights are quantised \(fp8\)"),
        ({"model_type": "grok-1"}, {}, None),
        (
            {"model_type": "olmoe", "intermediate_size": 16},
            {"model.layers.1.mlp.up_proj.weight": ("BF16", [16, 32])},
            r"model\.layers\.1\.mlp\.up_proj\.weight: MLPs without experts have their width by intermediate_size too",
        ),
        (
            {"model_type": "deepseek", "n_routed_experts": 8},
            {"model.layers.0.mlp.shared_experts.up_proj.weight": ("BF16", [32, 32])},
            r"no key of config.json says how many times as wide shared experts are",
        ),
        (
            {"model_type": "deepseek", "n_routed_experts": 8, "n_shared_experts": 2},
            {"model.layers.0.mlp.shared_experts.up_proj.weight": ("BF16", [16, 32])},
            r"shared_experts\.up_proj\.weight: shape \[16, 32\], expected 2 x 16 channels",
        ),
        (
            {"model_type": "deepseek", "n_routed_experts": 8, "n_shared_experts": 2},
            {"model.layers.0.mlp.shared_experts.middle.weight": ("BF16", [16, 32])},
            r"shared_experts\.middle\.weight: a tensor of a shared expert that is none of its plain matrices",
        ),
        (
            {"model_type": "deepseek_v4", "n_routed_experts": 8},
            {"model.layers.0.mlp.shared_experts.w1.weight": ("BF16", [16, 32])},
            r"model\.layers\.0: its shared expert has the width of the others by the same key",
        ),
    ],
)
def test_experts_that_cannot_be_narrowed(
    tmp_path: Path, config: dict[str, Any], extra: dict[str, Any], line: str | None
) -> None:
    checkpoint, layout = layout_of(write_checkpoint(tmp_path, QWEN | config, plain() | extra))
    problem = narrow_problem(checkpoint, layout)
    assert (problem is None) == (line is None), problem
    assert line is None or re.search(line, str(problem))


def quantised(**parts: tuple[str, list[int], list[int]]) -> dict[str, tuple[str, list[int]]]:
    """Keys of a layer whose experts have these parts: dtype, shape in gate and up, and shape in down."""
    keys = moe_keys("model.layers.0.mlp.", GUD, suffixes=tuple(parts))
    for name, (_, shape) in keys.items():
        part = parts.get(name.rpartition(".")[2]) if ".experts." in name else None
        keys[name] = ("BF16", shape) if part is None else (part[0], part[2 if "down_proj" in name else 1])
    return keys


BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
FP8 = quantised(weight=("F8_E4M3", [96, 64], [64, 96]), weight_scale_inv=("F32", [3, 2], [2, 3]))


def packed_as(*bits: int) -> dict[str, Any]:
    groups = {str(b): {"weights": {"type": "int", "num_bits": b, "strategy": "channel"}} for b in bits}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


@pytest.mark.parametrize(
    ("config", "keys", "step"),
    [
        (BLOCKS, FP8, 32),
        ({}, FP8, 32),  # a power of two gives so many blocks
        ({}, quantised(weight=("F8_E4M3", [96, 64], [64, 96]), weight_scale=("BF16", [96, 1], [64, 1])), 1),
        ({}, quantised(weight=("I8", [96, 64], [64, 96]), weight_scale=("BF16", [96], [64])), 1),
        ({}, quantised(weight=("I8", [96, 32], [64, 48]), scale=("F8_E8M0", [96, 2], [64, 3])), 32),
        (
            {},
            quantised(
                weight_packed=("I32", [96, 8], [64, 12]), weight_scale=("BF16", [96, 4], [64, 6]),
                weight_shape=("I64", [2], [2]),
            ),
            16,
        ),
        (
            packed_as(8),
            quantised(
                weight_packed=("I32", [96, 16], [64, 24]), weight_scale=("BF16", [96, 1], [64, 1]),
                weight_shape=("I64", [2], [2]),
            ),
            4,
        ),
        (
            packed_as(4, 8),  # which of both experts are, nothing tells
            quantised(
                weight_packed=("I32", [96, 16], [64, 24]), weight_scale=("BF16", [96, 1], [64, 1]),
                weight_shape=("I64", [2], [2]),
            ),
            0,
        ),
        ({}, quantised(weight=("U8", [96, 32], [64, 48]), weight_scale=("F8_E4M3", [96, 4], [64, 6])), 0),  # NVFP4
        ({}, quantised(weight=("F8_E4M3", [96, 64], [64, 96]), weight_scale_inv=("F32", [3, 2], [2, 0])), 0),
        ({}, quantised(qweight=("I32", [8, 96], [12, 64]), scales=("F16", [2, 96], [3, 64])), 0),
        (BLOCKS, quantised(weight=("F8_E4M3", [96, 64], [64, 64]), weight_scale_inv=("F32", [3, 2], [2, 2])), 0),
    ],
)  # fmt: skip
def test_widths_that_formats_can_hold(
    tmp_path: Path, config: dict[str, Any], keys: dict[str, tuple[str, list[int]]], step: int
) -> None:
    config = QWEN | {"moe_intermediate_size": 96, "quantization_config": {"quant_method": "fp8"}} | config
    checkpoint, layout = layout_of(write_checkpoint(tmp_path, config, keys))
    assert (layout.width, layout.step) == ((96, step) if step else (None, 0))
    problem = narrow_problem(checkpoint, layout)
    assert (problem is None) == bool(step)
    if step:
        assert widths_held(layout) == list(range(step, 97, step))
        assert width_problem(layout, 64) is None
    if step == 32:
        assert width_problem(layout, 40) == (
            "their format stores whole blocks of 32 channels; nearest width: 32 or 64"
        )  # fmt: skip


def test_quantised_shared_experts_that_follow_stay_as_they_are(tmp_path: Path) -> None:
    config = QWEN | BLOCKS | {"model_type": "deepseek", "n_routed_experts": 8, "moe_intermediate_size": 96}
    shared = "model.layers.0.mlp.shared_experts."
    keys = FP8 | {
        f"{shared}gate_proj.weight": ("F8_E4M3", [192, 64]), f"{shared}gate_proj.weight_scale_inv": ("F32", [6, 2]),
        f"{shared}down_proj.weight": ("F8_E4M3", [64, 192]), f"{shared}down_proj.weight_scale_inv": ("F32", [2, 6]),
    }  # fmt: skip
    checkpoint, layout = layout_of(write_checkpoint(tmp_path, config | {"n_shared_experts": 2}, keys))
    assert narrow_problem(checkpoint, layout) is None
    assert widths_held(layout) == [32, 64, 96]
    assert narrow_numbers(layout, 64) == {("moe_intermediate_size",): 64, ("n_shared_experts",): 3}
    odd = replace(layout, shared_times=1)
    assert width_problem(odd, 64) == (
        "shared experts, which are quantised and stay 1 x 96 wide, are no multiple of 64; nearest width: 32 or 96"
    )


def test_mtp_layers_of_quantised_experts_do_not_lose_channels(tmp_path: Path) -> None:
    _, layout = layout_of(write_checkpoint(tmp_path, QWEN | BLOCKS | {"moe_intermediate_size": 96}, FP8))
    assert mtp_problem(layout) is None
    both = replace(layout, mtp={"1": layout.layers["0"]})
    assert mtp_problem(both) == "layer 1 (MTP) has quantised experts, whose channels are not cut"
    check_mtp(both, "drop", narrower=True)
    check_mtp(both, "prune", narrower=False)
    for mode in ("prune", "keep"):
        with pytest.raises(InputError, match=f"--mtp {mode}: .*; use --mtp drop"):
            check_mtp(both, mode, narrower=True)  # type: ignore[arg-type]


def test_tensors_of_no_known_format_have_no_channels(tmp_path: Path) -> None:
    keys = plain(suffixes=("weight", "weight_scale_inv"))
    checkpoint, layout = layout_of(write_checkpoint(tmp_path, QWEN, keys))
    assert layout.layers["0"].width is None
    assert all(tensor.channel_axis is None for tensor in layout.layers["0"].tensors)
    assert "not stored as plain matrices" in str(narrow_problem(checkpoint, layout))

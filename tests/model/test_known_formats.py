"""Weights of no known format are refused by name; those that differ in bits, packing or spelling alone are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from moekern.architectures.quantisation import BITS, PACKINGS, unread
from moekern.kernels import quantised as kernels
from moekern.model.dequantised import dense
from tests.helpers import quantised_models
from tests.helpers.quantised_models import FORMATS


def _fp8(**parts: Tensor) -> dict[str, Tensor]:
    return {"weight": torch.ones(32, 16).to(torch.float8_e4m3fn), **parts}


def _words(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


PACKED = {"weight_packed": _words(8, 2), "weight_scale": torch.ones(8, 2), "weight_shape": torch.tensor([8, 16])}
BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "codes without a scale": (_fp8(), {"quant_method": "fp8"}, r"weight float8_e4m3fn \[32, 16\] \(fp8\) are not a"),
    "a scale without codes": ({"weight_scale": torch.ones(1)}, {}, r"weight_scale float32 \[1\] are not a weight"),
    "two scales": (_fp8(weight_scale=torch.ones(1), scale=torch.ones(1)), {}, "weight_scale and scale are both there"),
    "two weights": (_fp8(qweight=_words(2, 32)), {}, "weight and qweight are both there"),
    "blocks of another size": (
        _fp8(weight_scale_inv=torch.ones(3, 1)), {"weight_block_size": [16, 16]}, "expected 2 x 1 blocks, got 3 x 1|16",
    ),
    "a row too many": (_fp8(weight_scale=torch.ones(33)), {}, "scale"),
    "int8 in a config of fp8": (
        {"weight": torch.ones(8, 16, dtype=torch.int8), "scale": torch.ones(8, 1)}, {"quant_method": "fp8"},
        "are not a weight layout",
    ),
    "zero points of FP8": (_fp8(weight_scale=torch.ones(32, 1), weight_zero_point=torch.ones(32, 1)), {},
                           "weight_zero_point: zero points"),
    "zero points of other rows": (
        {
            "weight": torch.ones(8, 16, dtype=torch.int8),
            "weight_scale": torch.ones(8, 1),
            "weight_zero_point": torch.ones(4, 1),
        },
        {}, "zero: expected as many as scales, 8, got 4",
    ),
    "columns that no word holds": (
        PACKED | {"weight_shape": torch.tensor([8, 1 << 40])}, {},
        "weight_packed: 2 words for 1099511627776 numbers hold none of 2, 3, 4, 8 bits",
    ),
    "a shape that is no number": (PACKED | {"weight_shape": torch.tensor([torch.inf])}, {}, "are not a weight layout"),
    "groups that divide nothing": (PACKED | {"weight_scale": torch.ones(8, 3)}, {}, "groups that divide 16 columns"),
    "groups that are not there": (
        PACKED | {"weight_g_idx": torch.arange(16).flip(0)}, {},
        "weight_g_idx: expected the groups of columns, from 0 to 1",
    ),
    "an order of no numbers": (
        PACKED | {"weight_g_idx": torch.ones(16).to(torch.float8_e5m2)}, {}, "weight_g_idx: expected the groups of 16",
    ),
    "zero points of other groups": (
        PACKED | {"weight_g_idx": torch.tensor([0, 1] * 8), "weight_zero_point": _words(1, 1)}, {}, "weight_zero_point",
    ),
    "five bits": (
        {"qweight": _words(5, 8), "qzeros": _words(1, 2), "scales": torch.ones(1, 8)}, {"bits": 5},
        "weights of 5 bits are not a layout that moekern reads; of this method 2, 3, 4, 8 bits are",
    ),
    "bits that are no number": (
        {"qweight": _words(4, 8), "qzeros": _words(1, 1), "scales": torch.ones(1, 8)}, {"bits": "4"}, "of '4' bits are",
    ),
    "words of five bits": (
        {"qweight": _words(5, 32), "qzeros": _words(1, 5), "scales": torch.ones(1, 32)}, {"bits": 4},
        "qzeros: 5 words for 32 numbers hold none of 2, 3, 4, 8 bits",
    ),
    "AWQ of three bits": (
        {"qweight": _words(16, 3), "qzeros": _words(1, 3), "scales": torch.ones(1, 32)}, {"bits": 3}, "4, 8 bits are",
    ),
    "a vector of words": (
        {"qweight": _words(4), "qzeros": _words(1, 1), "scales": torch.ones(1, 8)}, {}, "are not a weight layout",
    ),
    "awq of another kernel": (
        {"qweight": _words(16, 2), "qzeros": _words(1, 2), "scales": torch.ones(1, 16)}, {"version": "gemv"},
        "are not a weight layout",
    ),
    "inputs that are scaled": (
        _fp8(weight_scale=torch.ones(1), pre_quant_scale=torch.ones(16)), {}, "pre_quant_scale",
    ),
    "blocks alone": ({"blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8)}, {}, "are not a weight layout"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_belong_together_are_refused(case: str) -> None:
    parts, config, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        dense(parts, config, torch.bfloat16)


FP4 = FORMATS["quark_fp4"][1]
INT4 = FORMATS["compressed_int4"][1]


def _of(config: Mapping[str, Any], **weight: Any) -> dict[str, Any]:
    """The config with other numbers of the weights of all modules."""
    key, inner = ("config_groups", "group_0") if "config_groups" in config else ("global_quant_config", "")
    held = config[key][inner] if inner else config[key]
    held = {**held, "weights" if inner else "weight": {**held["weights" if inner else "weight"], **weight}}
    return {**config, key: {inner: held} if inner else held}


STRANGE: dict[str, tuple[dict[str, Any], str]] = {
    "GPTQ's bits": ({"quant_method": "gptq", "bits": 5}, r"gptq weights of 5 bits \(of 2, 3, 4, 8 it is\)"),
    "Marlin's form": ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "gptq weights of the form marlin"),
    "another kernel's": ({"quant_method": "gptq", "checkpoint_format": "bitblas"}, "gptq weights of the form bitblas"),
    "AWQ's forms": ({"quant_method": "awq", "version": "GEMV"}, "awq weights of the form GEMV"),
    "AWQ's bits": ({"quant_method": "awq", "w_bit": 3}, r"awq weights of 3 bits \(of 4, 8 it is\)"),
    "packed bits": (_of(INT4, num_bits=5), "packed weights of 5 bits"),
    "a packing": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_marlin"},
        "auto-round weights in the packing auto_round:auto_marlin",
    ),
    "an older packing": (
        {"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2"}, "in the packing auto_round:exllamav2",
    ),
    "a module's bits": (
        {"quant_method": "auto-round", "bits": 4, "extra_config": {"a.b": {"bits": 6}, "c": {"bits": 16}}},
        r"auto-round weights of 6 bits \(of 2, 3, 4, 8 it is\) of a\.b",
    ),
    "bits in AWQ's order": (
        {"quant_method": "auto-round", "bits": 8, "packing_format": "auto_round:auto_awq"},
        r"auto-round weights of 8 bits \(of 4 it is\)",
    ),
    "floats in words": ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "of the type mx_fp in words"),
    "integers as floats": (
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:llm_compressor"},
        "auto-round weights of the type int with 4 bits",
    ),
    "floats of other bits": (
        {"quant_method": "auto-round", "bits": 8, "packing_format": "auto_round:llm_compressor", "data_type": "nv_fp"},
        "auto-round weights of the type nv_fp with 8 bits",
    ),
    "activations": ({"quant_method": "auto-round", "bits": 4, "act_bits": 8}, "for activations of 8 bits"),
    "integers in groups": (_of(FP4, dtype="int4"), r"quark weights of int4 \(per_group, scales e8m0\)"),
    "FP6": (_of(FP4, dtype="fp6_e3m2"), "quark weights of fp6_e3m2"),
    "other groups": (_of(FP4, group_size=16), "quark weights of fp4"),
    "columns": (_of(FORMATS["quark_fp8"][1], ch_axis=1), r"quark weights of fp8_e4m3 \(per_channel"),
    "of a layer": (
        {**FP4, "layer_quant_config": {"*a": {"weight": {"dtype": "int4", "qscheme": "per_group"}}}},
        "quark weights of int4",
    ),
    "twice": ({**FP4, "global_quant_config": {"weight": [{}, {}]}}, "quark weights that are quantised twice"),
    "rotated": ({**FP4, "algo_config": [{"name": "rotation"}]}, r"quark weights that are rotated \(rotation\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE)
def test_layouts_that_are_not_known_are_named(case: str) -> None:
    config, message = STRANGE[case]
    assert re.search(f"^a forward pass over .*{message}.* is not supported$", unread(config) or "")


@pytest.mark.parametrize(
    ("kind", "like", "data"),
    [
        ("auto_round:llm_compressor", "mxfp4", {"bits": 4, "data_type": "mx_fp", "act_bits": 4}),
        ("auto_round:llm_compressor", "compressed_nvfp4", {"bits": 4, "data_type": "nv_fp"}),
        ("auto_round:fp8_static", "fp8_rows", {"bits": 8, "data_type": "fp", "act_bits": 8}),
    ],
)
def test_auto_round_s_floats(kind: str, like: str, data: dict[str, Any]) -> None:
    parts, weight = FORMATS[like][0](32, 64, torch.Generator().manual_seed(0))
    if like == "mxfp4":
        parts = {"weight_packed": parts["weight"].view(torch.uint8), "weight_scale": parts["scale"].view(torch.uint8)}
    config = {"quant_method": "auto-round", "packing_format": kind, "sym": True, **data}
    assert unread(config) is None
    assert torch.equal(dense(parts, config, torch.float32), weight)


@pytest.mark.parametrize("packing", [name for name, (kind, _) in PACKINGS.items() if kind != "floats"])
def test_auto_round_s_packings(packing: str) -> None:
    """The same words under each name: zero points less one, as they are, or in AWQ's order."""
    kind, version = PACKINGS[packing]
    make = quantised_models.awq(4) if kind == "auto_awq" else quantised_models.gptq(4, 2 - version, ordered=False)
    parts, weight = make(32, 64, torch.Generator().manual_seed(0))
    config = {**quantised_models.ROUNDED, "packing_format": packing}
    assert unread(config) is None
    assert torch.equal(dense(parts, config, torch.float32), weight)


@pytest.mark.parametrize(
    ("kind", "named"), [("gptq_8", {"bits": 4}), ("gptq_3", {"bits": 8}), ("awq_8", {"bits": 4}), ("gptq", {"bits": 2})]
)
def test_modules_may_have_bits_of_their_own(kind: str, named: dict[str, int]) -> None:
    make, config = FORMATS[kind]
    parts, weight = make(64, 96, torch.Generator().manual_seed(0))
    assert torch.equal(dense(parts, {**config, **named}, torch.float32), weight)


def test_groups_of_modules_may_have_bits_of_their_own() -> None:
    groups = {name: FORMATS[name][1]["config_groups"]["group_0"] for name in ("compressed_int4", "compressed_int8")}
    for name in groups:
        parts, weight = FORMATS[name][0](64, 96, torch.Generator().manual_seed(0))
        assert torch.equal(dense(parts, {**INT4, "config_groups": groups}, torch.float32), weight)


def test_gptqmodel_s_zero_points_of_three_bits() -> None:
    """Its converter takes these three numbers away from words in turn, which leave no code as it was."""
    parts, weight = quantised_models.gptq(3, 0)(64, 96, torch.Generator().manual_seed(0))
    taken = torch.tensor([0b00100100100100100100100100100100, 0b10010010010010010010010010010010,
                          0b01001001001001001001001001001001]).repeat(2)  # fmt: skip
    stored = {**parts, "qzeros": (parts["qzeros"].long() - taken).int()}
    config = {"quant_method": "gptq", "bits": 3, "meta": {"quantizer": ["gptqmodel:4.0.0"]}}
    assert torch.equal(dense(stored, config, torch.float32), weight)
    assert not torch.equal(dense(stored, {**config, "meta": {}}, torch.float32), weight)


def test_bits_are_those_that_kernels_read() -> None:
    assert BITS["gptq"] == BITS["pack-quantized"] == kernels.BITS
    assert BITS["awq"] == tuple(kernels.AWQ_PLACES)

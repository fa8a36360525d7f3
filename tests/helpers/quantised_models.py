"""Tiny models in every format that is dequantised while they run, beside the same numbers as plain weights.

Codes are random; what they stand for is written out here for whole matrices, apart from the package's own kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tests.helpers import families
from tests.helpers.quantised import rewrite

SIDE, GROUP = 32, 16
LINEAR = re.compile(r"(_proj|_proj_with_mqa|\.w[123]|\.wq_[ab]|\.wkv|\.wo_b|lm_head)\.weight$")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E8M0 = torch.float8_e8m0fnu

Stored = tuple[dict[str, Tensor], Tensor]  # suffix of the module's name -> tensor; the weight in float32
Make = Callable[[int, int, torch.Generator], Stored]  # of a [R, C] weight


def _spread(values: Tensor, R: int, C: int) -> Tensor:
    """A grid of scales [S, Q] as one number for each element of [R, C]."""
    rows, columns = -(-R // values.shape[0]), -(-C // values.shape[1])
    return values.float().repeat_interleave(rows, 0)[:R].repeat_interleave(columns, 1)[:, :C]


def _scales(S: int, Q: int, g: torch.Generator) -> Tensor:
    return 0.02 + 0.04 * torch.rand(S, Q, generator=g)


def _powers(S: int, Q: int, low: int, g: torch.Generator) -> Tensor:
    return torch.randint(low, low + 3, (S, Q), generator=g, dtype=torch.uint8)


def _fp8(R: int, C: int, g: torch.Generator) -> Tensor:
    return torch.randn(R, C, generator=g).mul(4).to(torch.float8_e4m3fn)


def _nibbles(R: int, C: int, g: torch.Generator) -> Tensor:
    return torch.randint(16, (R, C), generator=g)


def _codes(bits: int, R: int, C: int, g: torch.Generator) -> Tensor:
    return torch.randint(1 << bits, (R, C), generator=g)


def _words(codes: Tensor, bits: int = 4, order: tuple[int, ...] = ()) -> Tensor:
    """Codes of a row one after another in int32s, filled from the lowest bits up, bit by bit; with an order of a word's
    columns in that."""
    if order:
        codes = codes.unflatten(1, (-1, len(order)))[..., list(order)].flatten(1)
    planes = (codes[..., None] >> torch.arange(bits) & 1).flatten(1)
    planes = torch.nn.functional.pad(planes, (0, -planes.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (planes << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().contiguous()


def _octets(codes: Tensor) -> Tensor:
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _blocks(suffix: str, stored: Callable[[Tensor], Tensor] = lambda t: t) -> Make:
    def make(R: int, C: int, g: torch.Generator) -> Stored:
        weight, shape = _fp8(R, C, g), (-(-R // GROUP), -(-C // GROUP))
        scale = stored(_powers(*shape, 121, g) if suffix == "scale" else _scales(*shape, g))
        grid = scale.float().repeat_interleave(GROUP, 0)[:R].repeat_interleave(GROUP, 1)[:, :C]
        return {"weight": weight, suffix: scale}, weight.float() * grid

    return make


def fp8_static(R: int, C: int, g: torch.Generator) -> Stored:
    weight, scale = _fp8(R, C, g), _scales(1, 1, g)
    parts = {"weight": weight, "weight_scale": scale.reshape(()), "input_scale": torch.tensor(0.7)}
    return parts, weight.float() * scale


def fp8_channel(R: int, C: int, g: torch.Generator) -> Stored:
    weight, scale = _fp8(R, C, g), _scales(R, 1, g).bfloat16()
    return {"weight": weight, "weight_scale": scale}, weight.float() * scale.float()


def fp8_rows(R: int, C: int, g: torch.Generator) -> Stored:
    parts, dense = fp8_channel(R, C, g)
    return parts | {"weight_scale": parts["weight_scale"].flatten()}, dense


def mxfp4(R: int, C: int, g: torch.Generator) -> Stored:
    codes, scale = _nibbles(R, C, g), _powers(R, C // 32, 122, g)
    return {"weight": _octets(codes).view(torch.int8), "scale": scale.view(E8M0)}, E2M1[codes] * _spread(
        torch.exp2(scale.float() - 127), R, C
    )


def modelopt_nvfp4(R: int, C: int, g: torch.Generator) -> Stored:
    codes, scale, whole = _nibbles(R, C, g), _scales(R, C // 16, g).mul(1000).to(torch.float8_e4m3fn), 0.0013
    parts = {"weight": _octets(codes), "weight_scale": scale, "weight_scale_2": torch.tensor(whole)}
    return parts | {"input_scale": torch.tensor(0.1)}, E2M1[codes] * _spread(scale.float() * torch.tensor(whole), R, C)


def nvfp4(R: int, C: int, g: torch.Generator) -> Stored:
    codes, scale, whole = _nibbles(R, C, g), _scales(R, C // 16, g).mul(1000).to(torch.float8_e4m3fn), 741.0
    parts = {"weight_packed": _octets(codes), "weight_scale": scale, "weight_global_scale": torch.tensor([whole])}
    return parts, E2M1[codes] * _spread(scale.float() / torch.tensor(whole), R, C)


def packed(bits: int, group: int = 8) -> Make:
    def make(R: int, C: int, g: torch.Generator) -> Stored:
        codes, scale = _codes(bits, R, C, g), _scales(R, C // group or 1, g).mul(2.0 ** (4 - bits)).bfloat16()
        shape = torch.tensor([R, C], dtype=torch.int32)
        parts = {"weight_packed": _words(codes, bits), "weight_scale": scale, "weight_shape": shape}
        return parts, (codes - (1 << bits - 1)) * _spread(scale, R, C)

    return make


def packed_ordered(bits: int) -> Make:
    """With zero points, and columns of a group apart."""

    def make(R: int, C: int, g: torch.Generator) -> Stored:
        codes, zero, scale = _codes(bits, R, C, g), _codes(bits, R, C // 8, g), _scales(R, C // 8, g).bfloat16()
        order = torch.arange(C // 8).repeat(8)
        parts = {"weight_packed": _words(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor([R, C])}
        parts |= {"weight_zero_point": _words(zero.T, bits).T.contiguous(), "weight_g_idx": order.int()}
        return parts, (codes - zero[:, order]) * scale[:, order].float()

    return make


def int8_channel(zeros: bool) -> Make:
    def make(R: int, C: int, g: torch.Generator) -> Stored:
        codes, zero = _codes(8, R, C, g) - 128, (_codes(8, R, 1, g) - 128) * zeros
        scale = _scales(R, 1, g).div(16).bfloat16()
        parts = {"weight": codes.to(torch.int8), "weight_scale": scale}
        parts |= {"weight_zero_point": zero.to(torch.int8)} if zeros else {}
        return parts, (codes - zero) * scale.float()

    return make


def gptq(bits: int, less: int = 1, ordered: bool = True) -> Make:
    """Inputs in the order of their activations, zero points less one or none."""

    def make(R: int, C: int, g: torch.Generator) -> Stored:
        codes, scale = _codes(bits, C, R, g), _scales(C // 8, R, g).mul(2.0 ** (4 - bits)).half()
        zero = less + _codes(bits, C // 8, R, g) % ((1 << bits) - less)
        order = (torch.randperm(C, generator=g) if ordered else torch.arange(C)) // 8
        parts = {"qweight": _words(codes.T, bits).T.contiguous(), "qzeros": _words(zero - less, bits), "scales": scale}
        parts |= {"g_idx": order.int()} if ordered else {}
        return parts, ((codes - zero[order]) * scale[order].float()).T.contiguous()

    return make


def awq(bits: int) -> Make:
    columns = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}[bits]

    def make(R: int, C: int, g: torch.Generator) -> Stored:
        codes, zero, scale = _codes(bits, C, R, g), _codes(bits, C // 8, R, g), _scales(C // 8, R, g).half()
        parts = {"qweight": _words(codes, bits, columns), "qzeros": _words(zero, bits, columns), "scales": scale}
        group = torch.arange(C) // 8
        return parts, ((codes - zero[group]) * scale[group].float()).T.contiguous()

    return make


def some_of_eight(R: int, C: int, g: torch.Generator) -> Stored:
    """AutoRound's, where a module of three has settings of its own."""
    bits = 8 if int(torch.randint(3, (1,), generator=g)) == 0 else 4
    return gptq(bits, ordered=False)(R, C, g)


def quark_fp4(R: int, C: int, g: torch.Generator) -> Stored:
    codes, scale = _nibbles(R, C, g), _powers(R, C // 32, 122, g)
    dense = E2M1[codes] * _spread(torch.exp2(scale.float() - 127), R, C)
    return {"weight": _octets(codes), "weight_scale": scale}, dense


def _compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
    }


def _quark(**weight: Any) -> dict[str, Any]:
    inputs = {**weight, "is_dynamic": True}
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": {**weight, "is_dynamic": False}, "input_tensors": inputs, "bias": None},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": [],
        "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
    }


ROUNDED = {"quant_method": "auto-round", "bits": 4, "group_size": 8, "sym": True, "data_type": "int"}
OF_EIGHT = {f"model.layers.0.mlp.experts.{e}.up_proj": {"bits": 8} for e in range(8)}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
FORMATS: Mapping[str, tuple[Make, Mapping[str, Any]]] = {
    "fp8_block": (_blocks("weight_scale_inv"), BLOCKS),
    "fp8_block_e8m0": (_blocks("scale", lambda t: t.view(E8M0)), BLOCKS | {"scale_fmt": "ue8m0"}),
    "fp8_static": (fp8_static, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8_rows": (fp8_rows, {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
    "compressed_fp8": (
        fp8_channel,
        _compressed("float-quantized", type="float", num_bits=8, strategy="channel"),
    ),
    "mxfp4": (mxfp4, BLOCKS | {"expert_dtype": "fp4", "scale_fmt": "ue8m0"}),
    "modelopt_nvfp4": (modelopt_nvfp4, MODELOPT),
    "compressed_nvfp4": (
        nvfp4,
        _compressed("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16),
    ),
    "compressed_int4": (
        packed(4),
        _compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=8),
    ),
    "compressed_int4_ordered": (
        packed_ordered(4),
        _compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=8, actorder="group"),
    ),
    "compressed_int8": (
        packed(8, 1 << 20),
        _compressed("pack-quantized", type="int", num_bits=8, strategy="channel"),
    ),
    "compressed_int8_ordered": (
        packed_ordered(8),
        _compressed("pack-quantized", type="int", num_bits=8, strategy="group", group_size=8, actorder="group"),
    ),
    "compressed_int3": (
        packed(3),
        _compressed("pack-quantized", type="int", num_bits=3, strategy="group", group_size=8),
    ),
    "compressed_w8a8": (
        int8_channel(False),
        _compressed("int-quantized", type="int", num_bits=8, strategy="channel"),
    ),
    "compressed_w8a8_zero": (
        int8_channel(True),
        _compressed("int-quantized", type="int", num_bits=8, strategy="channel", symmetric=False),
    ),
    "gptq": (gptq(4), {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True}),
    "gptq_2": (gptq(2), {"quant_method": "gptq", "bits": 2, "group_size": 8}),
    "gptq_3": (gptq(3), {"quant_method": "gptq", "bits": 3, "group_size": 8}),
    "gptq_8": (gptq(8), {"quant_method": "gptq", "bits": 8, "group_size": 8, "desc_act": True}),
    "gptq_8_v2": (gptq(8, 0), {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}),
    "awq": (awq(4), {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}),
    "awq_8": (awq(8), {"quant_method": "awq", "bits": 8, "group_size": 8, "version": "gemm", "zero_point": True}),
    "auto_round": (some_of_eight, {**ROUNDED, "packing_format": "auto_round:auto_gptq", "extra_config": OF_EIGHT}),
    "auto_round_v2": (gptq(3, 0, False), {**ROUNDED, "bits": 3, "sym": False, "packing_format": "auto_round"}),
    "auto_round_awq": (awq(4), {**ROUNDED, "packing_format": "auto_round:auto_awq"}),
    "quark_fp8": (fp8_rows, _quark(dtype="fp8_e4m3", qscheme="per_channel", ch_axis=0)),
    "quark_fp4": (
        quark_fp4,
        _quark(dtype="fp4", qscheme="per_group", group_size=32, ch_axis=-1, scale_format="e8m0"),
    ),
}


def _config(name: str, side: int) -> PreTrainedConfig:
    """That of the family, with experts whose sides are whole groups."""
    config = families.FAMILIES[name]()
    for part in (config, config.get_text_config()):
        for key in [key for key in vars(part) if key.endswith("intermediate_size")]:
            setattr(part, key, side)
    return config


def plain(name: str, folder: Path, side: int = SIDE) -> Path:
    """A bfloat16 checkpoint of the family whose experts are so wide."""
    families.build(name, dtype=torch.bfloat16, config=lambda: _config(name, side)).save_pretrained(folder)
    return folder


def twins(source: Path, folder: Path, kind: str, only: str = "") -> tuple[Path, Path]:
    """Checkpoints with the linear layers of `source` (of names with `only`) in a format: (quantised, plain)."""
    make, config = FORMATS[kind]
    values: dict[str, Stored] = {}
    generator = torch.Generator().manual_seed(0)

    def stored(name: str, tensor: Tensor) -> Stored | None:
        whole = tensor.ndim == 2 and tensor.shape[0] % 8 == 0 and tensor.shape[1] % SIDE == 0
        if not whole or not LINEAR.search(name) or only not in name:
            return None
        if name not in values:
            values[name] = make(*tensor.shape, generator)
        return values[name]

    def quantised(name: str, tensor: Tensor) -> dict[str, Tensor]:
        found = stored(name, tensor)
        module = name.removesuffix("weight")
        return {name: tensor} if found is None else {f"{module}{part}": t for part, t in found[0].items()}

    def dense(name: str, tensor: Tensor) -> dict[str, Tensor]:
        found = stored(name, tensor)
        return {name: tensor if found is None else found[1].bfloat16()}

    return (
        rewrite(source, folder / kind, quantised, quantization_config=dict(config)),
        rewrite(source, folder / f"{kind}-plain", dense),
    )

"""Small checkpoints made of chosen bytes, in the layouts that quantisers write, and a reader that trusts nobody."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> (dtype, shape, data)

BITS = {
    "F4": 4, "F6_E2M3": 6, "U8": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F16": 16, "F32": 32, "I32": 32, "I64": 64,
}  # fmt: skip
EXPERTS, TOP_K = 8, 2

# What stands behind each projection's name, per way of quantising.
COMPANIONS: Mapping[str, Mapping[str, tuple[str, list[int]]]] = {
    "bf16": {"weight": ("BF16", [6, 4])},
    "odd": {"weight": ("U8", [3, 5])},
    "f4": {"weight": ("F4", [6, 4]), "scale": ("F8_E8M0", [6, 1])},
    "f6": {"weight": ("F6_E2M3", [6, 4])},
    "fp8_block": {"weight": ("F8_E4M3", [6, 4]), "weight_scale_inv": ("F32", [1, 1])},
    "fp8_static": {"weight": ("F8_E4M3", [6, 4]), "weight_scale": ("F32", []), "input_scale": ("F32", [])},
    "gptq": {
        "qweight": ("I32", [1, 6]), "qzeros": ("I32", [1, 1]), "scales": ("F16", [1, 6]), "g_idx": ("I32", [8]),
    },
    "awq": {"qweight": ("I32", [8, 1]), "qzeros": ("I32", [1, 1]), "scales": ("F16", [1, 6])},
    "compressed_tensors": {
        "weight_packed": ("I32", [6, 1]), "weight_scale": ("BF16", [6, 1]), "weight_zero_point": ("I32", [1, 1]),
        "weight_shape": ("I64", [2]), "weight_g_idx": ("I32", [8]), "weight_global_scale": ("F32", [1]),
        "input_global_scale": ("F32", [1]),
    },
    "nvfp4": {
        "weight": ("U8", [6, 2]), "weight_scale": ("F8_E4M3", [6, 1]), "weight_scale_2": ("F32", []),
        "input_scale": ("F32", []),
    },
}  # fmt: skip


def data(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> tuple[str, list[int], bytes]:
    """A tensor of random bytes; floats of 16 and 32 bits are ordinary numbers, so that they have norms."""
    count = int(np.prod(shape, dtype=np.int64))
    if dtype in ("F32", "BF16"):
        values = rng.standard_normal(count).astype("<f4").view("<u4")
        raw = (values >> 16).astype("<u2").tobytes() if dtype == "BF16" else values.tobytes()
    else:
        raw = rng.bytes(count * BITS[dtype] // 8)
    return dtype, list(shape), raw


def qwen3(
    companions: str = "bf16", layers: int = 2, experts: int = EXPERTS, seed: int = 0
) -> tuple[dict[str, Any], Tensors]:
    """A qwen3_moe checkpoint: config and tensors, experts indexed."""
    rng = np.random.default_rng(seed)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 4,
        "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": TOP_K, "rms_norm_eps": 1e-06,
    }  # fmt: skip
    tensors: Tensors = {"model.embed_tokens.weight": data(rng, "BF16", [10, 4])}
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp"
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = data(rng, "BF16", [4])
        tensors[f"{block}.gate.weight"] = data(rng, "BF16", [experts, 4])
        for e in range(experts):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                for suffix, (dtype, shape) in COMPANIONS[companions].items():
                    tensors[f"{block}.experts.{e}.{projection}.{suffix}"] = data(rng, dtype, shape)
    return config, tensors


def gpt_oss_mxfp4(layers: int = 2, experts: int = EXPERTS) -> tuple[dict[str, Any], Tensors]:
    """A gpt_oss checkpoint as published: stacked blocks and scales."""
    rng = np.random.default_rng(0)
    config = {
        "model_type": "gpt_oss", "num_local_experts": experts, "num_experts_per_tok": TOP_K,
        "num_hidden_layers": layers, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    tensors: Tensors = {"model.embed_tokens.weight": data(rng, "BF16", [10, 4])}
    for layer in range(layers):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.router.weight"] = data(rng, "BF16", [experts, 4])
        tensors[f"{block}.router.bias"] = data(rng, "BF16", [experts])
        for projection in ("gate_up_proj", "down_proj"):
            tensors[f"{block}.experts.{projection}_blocks"] = data(rng, "U8", [experts, 6, 1, 16])
            tensors[f"{block}.experts.{projection}_scales"] = data(rng, "U8", [experts, 6, 1])
            tensors[f"{block}.experts.{projection}_bias"] = data(rng, "BF16", [experts, 6])
    return config, tensors


def deepseek_v3(mtp: bool = True) -> tuple[dict[str, Any], Tensors]:
    """A deepseek_v3 checkpoint: a dense layer, two MoE layers in two groups, and an MTP layer numbered 3."""
    rng = np.random.default_rng(0)
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 3, "n_routed_experts": EXPERTS, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": TOP_K, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    }  # fmt: skip
    tensors: Tensors = {"model.embed_tokens.weight": data(rng, "BF16", [10, 4])}
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] = data(rng, "BF16", [4, 4])
    for layer in (1, 2, 3) if mtp else (1, 2):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = data(rng, "BF16", [EXPERTS, 4])
        tensors[f"{block}.gate.e_score_correction_bias"] = data(rng, "F32", [EXPERTS])
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"{block}.shared_experts.{name}.weight"] = data(rng, "BF16", [4, 4])
            for e in range(EXPERTS):
                tensors[f"{block}.experts.{e}.{name}.weight"] = data(rng, "F8_E4M3", [4, 4])
                tensors[f"{block}.experts.{e}.{name}.weight_scale_inv"] = data(rng, "F32", [1, 1])
    if mtp:
        tensors["model.layers.3.eh_proj.weight"] = data(rng, "BF16", [4, 8])
        tensors["model.layers.3.enorm.weight"] = data(rng, "BF16", [4])
    return config, tensors


def deepseek_v4(layers: int = 3, tables: str = "I64", seed: int = 0) -> tuple[dict[str, Any], Tensors]:
    """A deepseek_v4 checkpoint whose pruning computes tensors: every layer but the last has a table of expert ids, the
    last a bias of two rows, which is cut on its inner axis."""
    rng = np.random.default_rng(seed)
    config = {
        "model_type": "deepseek_v4", "num_hidden_layers": layers, "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    }  # fmt: skip
    tensors: Tensors = {"embed.weight": data(rng, "BF16", [10, 4])}
    for layer in range(layers):
        block = f"layers.{layer}.ffn"
        tensors[f"{block}.gate.weight"] = data(rng, "BF16", [EXPERTS, 4])
        if layer < layers - 1:
            ids = np.argsort(rng.random((500, EXPERTS)), axis=1)[:, :TOP_K]
            table = ids.astype("<i8" if tables == "I64" else "<i4")
            tensors[f"{block}.gate.tid2eid"] = tables, [500, TOP_K], table.tobytes()
        else:
            tensors[f"{block}.gate.bias"] = data(rng, "F32", [2, EXPERTS])
        for e in range(EXPERTS):
            for name in ("w1", "w2", "w3"):
                tensors[f"{block}.experts.{e}.{name}.weight"] = data(rng, "BF16", [6, 4])
    return config, tensors


def shard_bytes(tensors: Tensors, metadata: Mapping[str, str] | None = None, pad: int = 0) -> bytes:
    """A safetensors file with the tensors in the order of the dict."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
    text = json.dumps(header).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + b"".join(raw for _, _, raw in tensors.values())


def write(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, shards: int = 2, pad: int = 0, interleave: bool = False
) -> Path:
    """Write a checkpoint. interleave deals the tensors out like cards, so that an expert is spread over shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    names = list(tensors)
    size = -(-len(names) // shards)
    parts = [names[i::shards] if interleave else names[i * size : (i + 1) * size] for i in range(shards)]
    return write_parts(folder, tensors, parts, pad)


def write_parts(folder: Path, tensors: Tensors, parts: Sequence[Sequence[str]], pad: int = 0) -> Path:
    metadata, weight_map = {"format": "pt"}, {}
    for i, part in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        (folder / file).write_bytes(shard_bytes({name: tensors[name] for name in part}, metadata, pad))
        weight_map.update(dict.fromkeys(part, file))
    if len(parts) > 1:
        elements = sum(int(np.prod(shape, dtype=np.int64)) for _, shape, _ in tensors.values())
        sizes = {"total_parameters": elements, "total_size": sum(len(raw) for _, _, raw in tensors.values())}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
        )
    return folder


def read_shard(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and header of a file, with no help from moekern."""
    raw = path.read_bytes()
    stop = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:stop])
    return {
        name: (t["dtype"], t["shape"], raw[stop + t["data_offsets"][0] : stop + t["data_offsets"][1]])
        for name, t in header.items()
        if name != "__metadata__"
    }, header


def read(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_shard(path)[0]
    return tensors


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def cut(tensor: tuple[str, list[int], bytes], keep: Sequence[int]) -> tuple[str, list[int], bytes]:
    """Kept rows of a tensor whose axis 0 holds the experts."""
    dtype, shape, raw = tensor
    rows = np.frombuffer(raw, np.uint8).reshape(shape[0], -1)[list(keep)]
    return dtype, [len(keep), *shape[1:]], rows.tobytes()

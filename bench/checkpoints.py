"""Checkpoints to measure on: the largest open models in their true shape, made of holes, and one of random bytes.

Names, dtypes, shapes, shards and their sizes are those of the published DeepSeek-V3 (FP8) and Kimi-K2-Instruct.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Tensor = tuple[str, tuple[int, ...]]  # dtype and shape
Named = Iterator[tuple[str, Tensor]]

DTYPE_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
BLOCK = 128  # one float32 scale for 128 x 128 weights
HIDDEN, Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 7168, 1536, 512, 128, 64, 128
DENSE, EXPERT = 18432, 2048  # intermediate sizes
SHARD_ELEMENTS = 1 << 32  # DeepSeek closes a shard once it holds this many elements,
STAGES = (0, 7, 15, 23, 31, 39, 47, 54)  # and at these layers
CHUNK = 1 << 24


@dataclass(frozen=True)
class Blueprint:
    """A checkpoint before it is written: config.json, and shard name -> tensor name -> dtype and shape."""

    config: dict[str, Any]
    shards: dict[str, dict[str, Tensor]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.items()}

    @property
    def nbytes(self) -> int:
        return sum(map(nbytes, self.tensors.values()))

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors.values())


def nbytes(tensor: Tensor) -> int:
    return math.prod(tensor[1]) * DTYPE_BYTES[tensor[0]]


def deepseek_v3(layers: int = 61) -> Blueprint:
    """DeepSeek-V3, with its first `layers` layers and the MTP layer, which is numbered `layers`."""
    stages: list[list[tuple[str, Tensor]]] = []
    for number in range(layers):
        if number in STAGES:
            stages.append([("model.embed_tokens.weight", ("BF16", (129280, HIDDEN)))] if number == 0 else [])
        stages[-1] += layer(number, heads=128, experts=0 if number < 3 else 256)
    stages[-1] += [("model.norm.weight", ("BF16", (HIDDEN,))), ("lm_head.weight", ("BF16", (129280, HIDDEN)))]
    stages[-1] += [*layer(layers, heads=128, experts=256), *mtp(layers)]
    parts = [part for stage in stages for part in split(stage, SHARD_ELEMENTS)]
    names = (f"model-{i:05d}-of-{len(parts):06d}.safetensors" for i in range(1, len(parts) + 1))
    return Blueprint(DEEPSEEK | {"num_hidden_layers": layers}, dict(zip(names, parts, strict=True)))


def kimi_k2(layers: int = 61) -> Blueprint:
    """Kimi-K2-Instruct, with its first `layers` layers, each in a shard of its own."""
    parts = [dict(layer(n, heads=64, experts=0 if n < 1 else 384, inv_freq=True)) for n in range(layers)]
    vocabulary: Tensor = ("BF16", (163840, HIDDEN))
    parts[0]["model.embed_tokens.weight"] = vocabulary
    parts[-1] |= {"model.norm.weight": ("BF16", (HIDDEN,)), "lm_head.weight": vocabulary}
    names = (f"model-{i}-of-{layers}.safetensors" for i in range(1, layers + 1))
    return Blueprint(KIMI | {"num_hidden_layers": layers}, dict(zip(names, parts, strict=True)))


def layer(number: int, heads: int, experts: int, inv_freq: bool = False) -> Named:
    """One decoder layer; a dense one when experts is 0."""
    prefix = f"model.layers.{number}"
    yield from fp8(f"{prefix}.self_attn.q_a_proj", Q_RANK, HIDDEN)
    yield f"{prefix}.self_attn.q_a_layernorm.weight", ("BF16", (Q_RANK,))
    yield from fp8(f"{prefix}.self_attn.q_b_proj", heads * (NOPE + ROPE), Q_RANK)
    yield from fp8(f"{prefix}.self_attn.kv_a_proj_with_mqa", KV_RANK + ROPE, HIDDEN)
    yield f"{prefix}.self_attn.kv_a_layernorm.weight", ("BF16", (KV_RANK,))
    yield from fp8(f"{prefix}.self_attn.kv_b_proj", heads * (NOPE + VALUE), KV_RANK)
    yield from fp8(f"{prefix}.self_attn.o_proj", HIDDEN, heads * VALUE)
    if inv_freq:
        yield f"{prefix}.self_attn.rotary_emb.inv_freq", ("BF16", (56,))
    if not experts:
        yield from gated(f"{prefix}.mlp", DENSE)
    for expert in range(experts):
        yield from gated(f"{prefix}.mlp.experts.{expert}", EXPERT)
    if experts:
        yield f"{prefix}.mlp.gate.weight", ("BF16", (experts, HIDDEN))
        yield f"{prefix}.mlp.gate.e_score_correction_bias", ("F32", (experts,))
        yield from gated(f"{prefix}.mlp.shared_experts", EXPERT)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}.weight", ("BF16", (HIDDEN,))


def mtp(number: int) -> Named:
    """What a multi-token-prediction layer has besides a decoder layer."""
    prefix = f"model.layers.{number}"
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}.{norm}.weight", ("BF16", (HIDDEN,))
    yield f"{prefix}.eh_proj.weight", ("BF16", (HIDDEN, 2 * HIDDEN))
    for copied in ("embed_tokens", "shared_head.head"):
        yield f"{prefix}.{copied}.weight", ("BF16", (129280, HIDDEN))


def gated(prefix: str, intermediate: int) -> Named:
    yield from fp8(f"{prefix}.gate_proj", intermediate, HIDDEN)
    yield from fp8(f"{prefix}.up_proj", intermediate, HIDDEN)
    yield from fp8(f"{prefix}.down_proj", HIDDEN, intermediate)


def fp8(module: str, rows: int, columns: int) -> Named:
    yield f"{module}.weight", ("F8_E4M3", (rows, columns))
    yield f"{module}.weight_scale_inv", ("F32", (-(-rows // BLOCK), -(-columns // BLOCK)))


def qwen3_moe(size: int, shard: int = 1 << 30) -> Blueprint:
    """Layers of Qwen3-30B-A3B in BF16, as many as fit in `size` bytes (one at least), in shards of about `shard` bytes.

    The vocabulary is cut so that, as in the whole model, about 2 % of a few layers are not layers.
    """
    config = QWEN | {"vocab_size": 8192}
    vocabulary = nbytes(("BF16", (8192, config["hidden_size"])))
    layers = max(1, (size - 2 * vocabulary) // sum(map(nbytes, _qwen_layer(config, 0).values())))
    return _qwen(config | {"num_hidden_layers": layers}, shard)


def wide(layers: int) -> Blueprint:
    """Qwen3-MoE's form with the hidden size of the largest models and little else: a token is dear to hold, and cheap
    to compute."""
    small = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    small |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "vocab_size": 256}
    return _qwen(QWEN | {**small, "hidden_size": HIDDEN, "num_hidden_layers": layers}, 1 << 30)


def _qwen(config: dict[str, Any], shard: int) -> Blueprint:
    """A model of these sizes in BF16, in shards of about `shard` bytes."""
    vocabulary: Tensor = ("BF16", (config["vocab_size"], config["hidden_size"]))
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": vocabulary}
    for number in range(config["num_hidden_layers"]):
        tensors |= _qwen_layer(config, number)
    tensors |= {"model.norm.weight": ("BF16", (config["hidden_size"],)), "lm_head.weight": vocabulary}
    parts = split(tensors.items(), shard // 2)
    names = (f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1))
    return Blueprint(config, dict(zip(names, parts, strict=True)))


def _qwen_layer(config: dict[str, Any], number: int) -> dict[str, Tensor]:
    hidden, head, experts = config["hidden_size"], config["head_dim"], config["num_experts"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    intermediate = config["moe_intermediate_size"]
    prefix = f"model.layers.{number}"
    shapes = {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden)}
    shapes |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries)}
    for expert in range(experts):
        inner = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden)}
        inner |= {"down_proj": (hidden, intermediate)}
        shapes |= {f"mlp.experts.{expert}.{name}": shape for name, shape in inner.items()}
    vectors = {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    vectors |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    every = {**shapes, "mlp.gate": (experts, hidden), **vectors}
    return {f"{prefix}.{name}.weight": ("BF16", shape) for name, shape in every.items()}


def split(tensors: Iterable[tuple[str, Tensor]], elements: int) -> list[dict[str, Tensor]]:
    """Tensors in shards, each closed once it holds so many elements."""
    parts: list[dict[str, Tensor]] = []
    held = elements
    for name, tensor in tensors:
        if held >= elements:
            parts.append({})
            held = 0
        parts[-1][name] = tensor
        held += math.prod(tensor[1])
    return parts


def header(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors header as the library writes it: wide dtypes first, then by name, padded to 8 bytes."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name][0]], name)):
        (dtype, shape), stop = tensors[name], offset + nbytes(tensors[name])
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(folder: Path, blueprint: Blueprint, seed: int | None = None) -> Path:
    """Write the checkpoint; its data are holes, which read as zeros, or random bytes from `seed`."""
    folder.mkdir(parents=True)
    for name, tensors in blueprint.shards.items():
        with (folder / name).open("wb") as file:
            file.write(header(tensors))
            size = sum(map(nbytes, tensors.values()))
            if seed is None:
                file.truncate(file.tell() + size)
            else:
                for piece in random_pieces(size, seed):
                    file.write(piece)
                seed += 1
    weight_map = {name: shard for shard, tensors in blueprint.shards.items() for name in tensors}
    index = {"metadata": {"total_size": blueprint.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(dict(sorted(blueprint.config.items())), indent=2) + "\n")
    return folder


def random_pieces(size: int, seed: int) -> Iterator[bytes]:
    import numpy as np

    random = np.random.default_rng(seed)
    for start in range(0, size, CHUNK):
        yield random.bytes(min(CHUNK, size - start))


def numbers(folder: Path) -> None:
    """Make of random bytes small finite bfloat16 numbers."""
    import numpy as np

    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            values = np.memmap(path, np.uint16, "r+", start)
            values &= 0x80FF
            values |= 0x3C00
            values.flush()


def half_plan(blueprint: Blueprint) -> dict[str, Any]:
    """A plan that keeps every other expert of every layer, but not the same ones in neighbouring layers."""
    first = blueprint.config.get("first_k_dense_replace", 0)
    experts = blueprint.config.get("n_routed_experts") or blueprint.config["num_experts"]
    layers = range(first, blueprint.config["num_hidden_layers"])
    return {
        "format": "moekern.plan/1",
        "layers": {str(n): {"keep": list(range(n % 2, experts, 2))} for n in layers},
    }


FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
SHARED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "hidden_act": "silu", "hidden_size": HIDDEN, "initializer_range": 0.02,
    "intermediate_size": DENSE, "kv_lora_rank": KV_RANK, "moe_intermediate_size": EXPERT, "moe_layer_freq": 1,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8, "pretraining_tp": 1,
    "q_lora_rank": Q_RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "quantization_config": FP8,
    "rms_norm_eps": 1e-06, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": VALUE,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = SHARED | {
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "n_group": 8, "n_routed_experts": 256, "num_attention_heads": 128,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "topk_group": 4, "vocab_size": 129280,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
KIMI: dict[str, Any] = SHARED | {
    "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1, "max_position_embeddings": 131072,
    "model_type": "kimi_k2", "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64,
    "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
    "topk_group": 1, "vocab_size": 163840,
    "rope_scaling": {
        "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip

MODELS = {"deepseek-v3": deepseek_v3, "kimi-k2": kimi_k2}

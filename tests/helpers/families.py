"""Tiny random checkpoints of every mixture-of-experts family that transformers can build.

``FAMILIES`` maps a model type to a function that makes its configuration: 8 experts, top-2, 4 decoder layers where the
family allows it. Sizes come from ``SMALL`` (``VISION`` inside vision and audio parts) by attribute name; ``OVERRIDES``
holds what one family needs on top.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moekern.architectures import family_named

EXPERTS, TOP_K, LAYERS, HIDDEN, VOCAB = 8, 2, 4, 32, 96


def _same(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SMALL: Mapping[str, Any] = {
    **_same(EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_same(TOP_K, "num_experts_per_tok moe_topk moe_k top_k_experts"),
    **_same(1, "n_shared_experts num_shared_experts moe_num_shared_experts topk_group bos_token_id"),
    **_same(1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    **_same(24, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
    **_same(16, "kv_lora_rank q_lora_rank index_head_dim rel_extent projector_hidden_size projection_hidden_size"),
    **_same(8, "head_dim swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim"),
    **_same(8, "linear_value_head_dim linear_head_dim sliding_window sliding_window_size index_topk"),
    **_same(4, "num_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads d_rel"),
    **_same(2, "num_key_value_heads swa_num_key_value_heads linear_num_key_heads index_n_heads n_group eos_token_id"),
    **_same(0, "num_mtp_layers num_nextn_predict_layers pad_token_id"),
    **_same(VOCAB, "vocab_size unpadded_vocab_size"),
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}

VISION: Mapping[str, Any] = {
    **_same(1, "depth num_hidden_layers encoder_layers"),
    **_same(2, "num_heads num_attention_heads num_key_value_heads encoder_attention_heads"),
    **_same(2, "pos_emb_height pos_emb_width posemb_grid_size n_mel_bins num_code_groups"),
    **_same(4, "patch_size downsample_hidden_size mel_vocab_size"),
    **_same(8, "head_dim image_size feature_size moe_intermediate_size output_channels max_source_positions"),
    **_same(16, "hidden_size intermediate_size max_position_embeddings num_position_embeddings mlp_dim d_model"),
    **_same(16, "position_embedding_size projection_hidden_dim projection_intermediate_size vision_output_dim"),
    **_same(16, "projector_input_dim projector_output_dim adapter_in_dim adapter_input_size encoder_ffn_dim"),
    **_same(16, "num_mel_bins codebook_size"),
    **_same(HIDDEN, "out_hidden_size text_hidden_size adapter_out_dim output_dim"),
    "deepstack_visual_indexes": (0,),
    "downsample_channels": (8, 16),
    "vocab_size": VOCAB,
}

LANGUAGE = ("text_config", "thinker_config", "talker_config")
FULL, SLIDING, LINEAR, INDEXED = "full_attention", "sliding_attention", "linear_attention", "indexed_attention"
DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
# What a family needs beyond these sizes, by the model type of its configuration or of a part of it.
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {"layer_types": [SLIDING, FULL] * 2},
    "bailing_hybrid": {"layer_group_size": 2},
    "beam": {"layer_types": [SLIDING, FULL] * 2, "mlp_layer_types": DENSE_FIRST},
    "cohere2_moe": {"layer_types": [SLIDING, FULL] * 2, "logit_scale": 1.0},
    "dbrx": {
        "d_model": HIDDEN,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 24, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "layer_types": [SLIDING, "heavily_compressed_attention", "compressed_sparse_attention", SLIDING],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "dots1": {"layer_types": [SLIDING, FULL] * 2},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["sparse"], "num_local_experts": 4},
    "dots3_note_text": {
        "layer_types": [INDEXED, SLIDING] * 2,
        "shared_experts_intermediate_size": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "exaone_moe": {"layer_types": [SLIDING, FULL] * 2},
    "flint": {"layer_types": [SLIDING, FULL] * 2, "mlp_only_layers": [0]},
    "gemma4_text": {
        "layer_types": [SLIDING, FULL] * 2,
        "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
    },
    "diffusion_gemma_text": {"layer_types": [SLIDING, FULL] * 2, "global_head_dim": 16},
    "diffusion_gemma": {"canvas_length": 8},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [8, 16]},
    "deepseek_ocr2_text": {"n_group": 1, "mlp_layer_types": DENSE_FIRST},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 8],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "gemma4": {"vision_config": None, "audio_config": None},
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    },
    "glm5_next_text": {
        "layer_types": [LINEAR, INDEXED] * 2,
        "mlp_layer_types": DENSE_FIRST,
        "qk_rope_head_dim": 0,
        "index_kpool": 2,
        "hc_mult": 2,
    },
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "granitemoe_swa": {"layer_types": [SLIDING, FULL] * 2},
    "granitemoehybrid": {
        "layer_types": [LINEAR, FULL] * 2,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "hy_v4": {"indexer_types": ["full", "shared"] * 2},
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "mlp_layer_types": DENSE_FIRST,
        "logits_mup_width_multiplier": 1.0,
    },
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 3, "mamba_d_state": 4},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {"layer_types": [LINEAR, FULL] * 2},
    "kolibri1": {"layer_types": [SLIDING, FULL] * 2},
    "laguna": {"layer_types": [SLIDING, FULL] * 2},
    "lfm2_moe": {"layer_types": ["conv", FULL] * 2},
    "llama4_text": {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 8},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 24},
    "mellum": {"layer_types": [SLIDING, FULL] * 2},
    "mimo_v2_flash": {"layer_types": [SLIDING, FULL] * 2},
    "minimax": {"block_size": 8, "layer_types": [LINEAR, FULL] * 2},
    "minimax_m3_vl_text": {
        "layer_types": [FULL, "minimax_m3_sparse"] * 2,
        "mlp_layer_types": DENSE_FIRST,
        "dense_intermediate_size": 40,
        "rotary_dim": 4,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mistral_large4_text": {
        "indexer_types": ["full", "shared"] * 2,
        "kv_source_layers": [0, 0, 2, 2],
        "no_rope_layers": [1, 1, 0, 0],
    },
    "muse_spark_audio": {"patch_sizes": (2,), "hidden_sizes": (4,), "depths": (1,)},
    "muse_spark_text": {
        "layer_types": [SLIDING, FULL] * 2,
        "mlp_layer_types": DENSE_FIRST,
        "moe_hidden_size": 16,
        "output_multiplier": 0.5,
    },
    "nemotron_h": {
        "layers_block_type": [LINEAR, "moe", FULL, "moe", "mlp"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "nemotron_h-latent": {"moe_latent_size": 16},
    "qwen3_5_moe_text": {"layer_types": [LINEAR, FULL] * 2},
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2},
        "code2wav_config": {"num_quantizers": 2, "upsample_rates": (2,), "upsampling_ratios": (2,), "decoder_dim": 16},
    },
    "qwen3_omni_moe_talker_text": {"num_hidden_layers": 2, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": {"layer_types": [LINEAR, FULL] * 2},
    "qwen4_exp_text": {
        "layer_types": [LINEAR, INDEXED] * 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "step3p5": {
        "layer_types": [SLIDING, FULL] * 2,
        "mlp_layer_types": DENSE_FIRST,
        "share_expert_dim": 16,
        "num_sliding_attention_heads": 2,
    },
    "unlimited_ocr_text": {"n_group": 1},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "router_hidden_size": 16},
}

NAMES = """
    mixtral qwen2_moe qwen3_moe qwen3_next olmoe deepseek_v2 deepseek_v3 glm4_moe gpt_oss minimax_m2 ernie4_5_moe
    granitemoe hunyuan_v1_moe llama4_text dbrx minimax minimax_m3_vl_text phimoe kimi_linear lfm2_moe deepseek_v4
    qwen3_5_moe_text qwen4_exp_text flex_olmo mellum flint cohere2_moe jamba deepseek_v32 glm4_moe_lite glm_moe_dsa
    dots1 dots3_note_text solar_open axk1 axk2 mimo_v2_flash beam exaone_moe bailing_hybrid hy_v3 hy_v4 afmoe laguna
    kolibri1 longcat_flash nemotron_h nemotron_h-latent granitemoeshared granitemoehybrid granitemoe_swa jetmoe
    aria_text gemma4_text zaya inkling_text inkling2_text mistral4 openai_privacy_filter
    minimax_m3_vl mistral_large4 qwen3_5_moe qwen3_vl_moe qwen4_exp kimi_k25 glm4v_moe glm5_next dots3_note
    ernie4_5_vl_moe llama4 aria gemma4 diffusion_gemma inkling_mm_model inkling2 step3p7 muse_spark deepseek_ocr2
    unlimited_ocr qwen3_omni_moe_thinker qwen3_omni_moe
"""
UNBUILDABLE: Mapping[str, str] = {
    "doge": "experts are rows found by product keys: there is no expert to drop",
    "nllb-moe": "encoder-decoder, two stacks with their own sparse steps",
    "switch_transformers": "encoder-decoder, two stacks with their own sparse steps",
}
# Families that cannot be run, or not be pruned, by their rows of the table.
NO_CALIBRATION: frozenset[str] = frozenset(
    name for name in NAMES.split() if (row := family_named(name.split("-")[0])) and (row.only_pruned or row.refused)
)
# The experts module is not called as (hidden, ids, weights) through ALL_EXPERTS_FUNCTIONS.
NO_STANDARD_HOOK: Mapping[str, str] = {
    "dbrx": "DbrxFFN calls DbrxExperts with a dense score matrix",
    "jetmoe": "JetMoeParallelExperts takes tokens sorted by expert; attention heads are experts too",
    "llama4": "every expert runs on its score-scaled input",
    "llama4_text": "every expert runs on its score-scaled input",
    "longcat_flash": "LongcatFlashExperts is not decorated and holds identity experts",
    "step3p7": "Step3p7Experts is not decorated",
}
# save_pretrained does not write the names or the orientation that the published checkpoints have.
RESAVED: Mapping[str, str] = {
    "kimi_k25": "decoder layers are written as language_model.model.blocks.N",
    "kimi_linear": "the dense first layer is written as block_sparse_moe.{gate,up,down}_proj",
    "qwen3_5_moe": "experts are written one by one, published stacked",
    "qwen3_5_moe_text": "experts are written one by one, published stacked",
    "qwen3_vl_moe": "stacked experts are written [E, 2I, H], published [E, H, 2I]",
    "mistral4": "experts are written stacked, published one by one",
}
SEVERAL_STACKS: Mapping[str, str] = {
    "diffusion_gemma": "encoder and decoder share every layer, each layer runs twice; logits are those of the canvas",
    "dots3_note": "the vision encoder has experts too, to be left alone",
    "ernie4_5_vl_moe": "each layer has experts for text and others for vision; text alone uses the first",
    "qwen3_omni_moe": "the talker has experts too (4); only the thinker runs here",
}


def _sizes(config_class: type[PreTrainedConfig], table: Mapping[str, Any]) -> dict[str, Any]:
    fields = inspect.signature(config_class).parameters
    sizes = {name: value for name, value in table.items() if name in fields}
    if "kv_lora_rank" in fields and table is SMALL:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= OVERRIDES.get(config_class.model_type, {})
    for part, part_class in (config_class.sub_configs or {}).items():
        if part_class is AutoConfig:
            model_type = config_class.sub_configs_defaults[part].model_type
            sizes.setdefault(part, {"model_type": model_type})
            part_class = CONFIG_MAPPING[model_type]
        if part in fields and sizes.get(part, {}) is not None:
            sizes[part] = _sizes(part_class, SMALL if part in LANGUAGE else VISION) | sizes.get(part, {})
    if any(part in LANGUAGE for part in config_class.sub_configs or {}):
        special = [name for name in fields if name.endswith(("token_id", "token_index")) and name not in SMALL]
        sizes |= {name: 3 + i for i, name in enumerate(special)}
    return sizes


def configured(name: str, **sizes: Any) -> PreTrainedConfig:
    """The family's configuration, with these `sizes` in it where it has the field."""
    config_class = CONFIG_MAPPING[name.split("-")[0]]
    variant = dict(OVERRIDES[name]) if "-" in name else {}
    asked = {field: sizes[field] for field in inspect.signature(config_class).parameters if field in sizes}
    return config_class(**(_sizes(config_class, SMALL) | variant | asked))


TABLES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
Config = Callable[[], PreTrainedConfig]
FAMILIES: dict[str, Config] = {name: functools.partial(configured, name) for name in NAMES.split()}


def model_class(name: str) -> type[PreTrainedModel]:
    model_type = name.split("-")[0]
    wrapper = "text_config" in (CONFIG_MAPPING[model_type].sub_configs or {})
    names = [table[model_type] for table in TABLES if model_type in table]
    return getattr(transformers, names[-1 if wrapper else 0])


@torch.no_grad()
def _randomise(name: str, value: Tensor, generator: torch.Generator) -> None:
    """Vectors and constants (norms, biases, sinks) get noise; matrices get a scale at which the routing varies."""
    noise = torch.randn(value.shape, generator=generator)
    if name.endswith("tid2eid"):
        value.copy_(torch.rand(value.shape[0], EXPERTS, generator=generator).argsort(1)[:, : value.shape[1]])
    elif value.is_floating_point() and (value.ndim < 2 or "A_log" in name or bool((value == value.flatten()[0]).all())):
        value.add_(0.1 * noise)
    elif value.is_floating_point():
        value.copy_(0.2 * noise)
    if name.endswith("balancing_biases"):
        value[-1] = -1.0


def build(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, config: Callable[[], PreTrainedConfig] | None = None
) -> PreTrainedModel:
    """A model of the family with random weights, in eval mode; the same seed gives the same weights.

    As after ``from_pretrained``, what the model class keeps strictly in float32 stays so under another ``dtype``.
    """
    config = config or FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(name)(config())
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for key, value in model.state_dict().items():
        if value.numel() and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            _randomise(key, value, generator)
    if dtype != torch.float32:
        with torch.device("meta"):
            declared = model_class(name)._from_config(config(), dtype=dtype).state_dict()
        strict = "|".join(map(re.escape, model._keep_in_fp32_modules_strict or ())) or "(?!)"
        for key, value in model.state_dict(keep_vars=True).items():
            kept = re.search(rf"(^|\.)({strict})(\.|$)", key)
            value.data = value.data.to(torch.float32 if kept else declared[key].dtype)
    return model.eval()


def save(
    name: str, folder: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32, config: Config | None = None
) -> Path:
    """Write the checkpoint of ``build(name, seed, dtype, config)`` in several shards."""
    model = build(name, seed, dtype, config)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size // 3)
    return Path(folder)


def load(folder: str | Path, loading_info: bool = False) -> Any:
    """The model of a checkpoint in float32 and eval mode, or ``(model, loading_info)``.

    Weights are copied out of the memory-mapped files: CPU kernels round differently on unaligned weights, so logits
    are bitwise comparable only between models whose tensors PyTorch allocated.
    """
    config = AutoConfig.from_pretrained(folder)
    loader = getattr(transformers, config.architectures[0])
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for value in (*model.parameters(), *model.buffers()):
        value.data = value.data.clone()
    return (model.eval(), info) if loading_info else model.eval()


def input_ids(name: str, batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Random ids ``[batch, length]`` int64; every special token of the families is below 16 and avoided."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(16, VOCAB, (batch, length), generator=generator)


@torch.no_grad()
def forward(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits ``[batch, length, vocab]`` of a text-only forward (of the thinker, where a model speaks too)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(model, "thinker", model)(input_ids=input_ids, use_cache=False).logits

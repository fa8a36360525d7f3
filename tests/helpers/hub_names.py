"""Names of tensors as they are on the hub, where transformers does not write them so or knows no such model."""

from __future__ import annotations

from collections.abc import Mapping

from moekern.architectures import Family
from moekern.architectures.patterns import SCHEMES
from tests.helpers.layouts import BIAS, GUD, STACK, W123

# Columns: family, model_type, config section, count and top-k keys, then prefix and names as moe_keys takes them.
WORDS = {
    "-": "", "TEXT": "text_config", "N": "num_experts", "L": "num_local_experts", "R": "n_routed_experts",
    "M": "moe_num_experts", "K": "num_experts_per_tok", "MLP": "model.layers.#.mlp.", "GATE": "gate.weight",
    "BIAS": BIAS, "SPARSE": "model.layers.#.block_sparse_moe.",
    "EXPERTS": "moe_num_primary_experts", "ACTIVE": "moe_num_active_primary_experts",
    "GUD": GUD, "W123": W123, "STACK": STACK, "BARE": "gate_proj|up_proj|down_proj",
}  # fmt: skip
HUB = """
    bailing_moe  =  -  N  K  MLP  GUD  GATE  -
    bailing_moe_v2  =  -  N  K  MLP  GUD  GATE  gate.expert_bias
    deepseek  =  -  R  K  MLP  GUD  GATE  -
    deepseek_vl_v2  =  language_config  R  K  language.model.layers.#.mlp.  GUD  GATE  BIAS
    arctic  =  -  L  K  SPARSE  W123  GATE  -
    grok-1  =  -  N  K  transformer.decoder_layer.#.  moe.#.linear|linear_v|linear_1  router.weight  -
    grok-2  git  -  L  K  SPARSE  W123  GATE  -
    step3_text  step3_vl  TEXT  M  moe_top_k  model.layers.#.moe.  BARE  GATE  -
    pangu_ultra_moe  =  -  R  K  MLP  GUD  GATE  e_score_correction_bias
    smallthinker  =  -  EXPERTS  ACTIVE  SPARSE  experts.#.gate|up|down  primary_router.weight  -
    llada_moe  =  -  N  K  MLP  GUD  GATE  -
    kimi_k3  =  TEXT  N  num_experts_per_token  language_model.model.layers.#.block_sparse_moe.  W123  GATE  BIAS
    deepseek_v4  =  -  R  K  layers.#.ffn.  W123  GATE  gate.bias
    deepseek_v41  =  TEXT  R  K  layers.#.ffn.  W123  GATE  gate.bias_vl
    mistral_large4  =  TEXT  R  K  layers.#.  W123  GATE  -
    step3p7  step3p5  -  M  moe_top_k  model.layers.#.moe.  BARE  GATE  router_bias
    muse_spark  =  TEXT  L  K  model.language_model.layers.#.mlp.  STACK  GATE  BIAS
    openai_privacy_filter  =  -  L  K  MLP  STACK  router.weight  router.bias
    qwen3_omni_moe  =  thinker_config.text_config  N  K  thinker.model.layers.#.mlp.  GUD  GATE  -
    kimi_k25  =  TEXT  R  K  language_model.model.layers.#.mlp.  GUD  GATE  BIAS
    inkling2  =  TEXT  R  K  model.llm.layers.#.mlp.  experts.w13_weight|w2_weight  GATE  gate.bias
    llama4  =  TEXT  L  K  language_model.model.layers.#.feed_forward.  GUD  router.weight  -
    gemma4  =  TEXT  N  top_k_experts  model.language_model.layers.#.  GUD  router.proj.weight  router.per_expert_scale
    qwen3_5_moe  =  TEXT  N  K  model.language_model.layers.#.mlp.  STACK  GATE  -
    glm4v_moe  =  TEXT  R  K  model.language_model.layers.#.mlp.  GUD  GATE  BIAS
    glm5_next  =  TEXT  R  K  model.language_model.layers.#.mlp.  GUD  GATE  BIAS
    hunyuan_v1_moe  hunyuan  -  N  moe_topk  MLP  GUD  gate.wg.weight  -
    switch_transformers  =  -  N  -  decoder.block.#.layer.2.mlp.  experts.expert_#.wi|wo  router.classifier.weight  -
    nllb-moe  =  -  N  -  model.encoder.layers.#.ffn.  experts.expert_#.fc1|fc2  router.classifier.weight  -
"""
HUB_FILES = [[WORDS.get(word, word) for word in line.split()] for line in HUB.strip().splitlines()]
# Suffixes of a projection's tensors, by the form that weights are stored in.
INDEXED = {
    "plain": ("weight",),
    "fp8": ("weight", "weight_scale_inv"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "int4": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "nvfp4": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "mxfp4": ("weight", "scale"),
}
STACKED = {
    "plain": ("",),
    "weight": ("weight",),
    "fp8": ("weight", "weight_scale_inv"),
    "mxfp4": ("_blocks", "_scales"),
}


def forms(experts: str) -> Mapping[str, tuple[str, ...]]:
    """Form -> suffixes, of experts as moe_keys takes them: stored one by one, or stacked."""
    return INDEXED if "#" in experts else STACKED


def experts_of(row: Family) -> str:
    """The experts of a row of the table, as moe_keys takes them."""
    scheme = SCHEMES[row.experts][0]
    return scheme.head + "|".join(sorted(scheme.projections))

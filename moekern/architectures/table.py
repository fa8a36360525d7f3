"""One row a family of Mixture-of-Experts models: what its checkpoints call things, and how its router chooses."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moekern.architectures.patterns import COMMON, SCHEMES, Patterns, Scheme, compile_patterns


@dataclass(frozen=True)
class Family:
    """A row of the table; the defaults describe the Qwen line. "|" separates alternative names.

    Tensor names are relative to the block, or to the layer if they begin with "/"; config keys to the section `holder`
    or the root. `score` is "softmax", "sigmoid", "sqrtsoftplus", or "identity" where the recorded logits are scores.
    """

    name: str
    also: tuple[str, ...] = ()  # other model_type names
    block: str = "mlp"  # "" where router and experts are right under the layer
    experts: str = "gate_up_down"  # name in SCHEMES; the common schemes are accepted as well
    router: str = "gate.weight"
    bias: str = ""  # vectors with one value an expert, on their last axis
    table: str = ""  # tensors whose values are expert ids
    leave: str = ""  # tensors of the router without an expert axis
    trailing: str | int = 0  # rows after the experts' that always stay: a number or a config key
    score: str = "softmax"
    score_key: str = ""  # config key that overrides score
    group_top: int = 0  # scores that make up a group's score; 0: no groups
    group_if: tuple[str, str] | None = None  # config key and value without which groups are ignored
    count: str = "num_experts"
    top_k: str = "num_experts_per_tok"  # config key, or the number that its code chooses whatever the config says
    groups: str = "n_group"
    width: str = "moe_intermediate_size"  # how many channels a routed expert has: "" where it is not known
    shared: str = ""  # how many times as wide the shared expert is; "1": always once; "": its width is its own
    holder: str = ""  # config section, dotted
    mtp: str = ""  # "numbered": layers after the last; "named": under a name that begins with mtp; "dense"
    stacks: tuple[str, ...] = ()  # stacks with experts, where there is more than one
    transformers: bool = True  # transformers 5 can build it
    refused: str = ""  # why it is recognised but not pruned
    only_pruned: str = ""  # why it is not run: not calibrated, not evaluated
    no_gradient: str = ""  # why the gradient tier is not measured
    no_refit: str = ""  # why its experts are not refitted
    alternating: str = ""  # the projection, without "weight", whose rows of gate and up alternate; elsewhere up follows
    note: str = ""

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        names = dict.fromkeys((self.experts, *COMMON))
        return tuple(scheme for name in names for scheme in SCHEMES[name])

    @cached_property
    def patterns(self) -> Patterns:
        return compile_patterns(self.block, self.schemes, self.router, self.bias, self.table, self.leave)


def rows(names: str, /, **shared: Any) -> tuple[Family, ...]:
    """Rows that differ in their names only; "a=b" makes b another name of a."""
    split = [name.split("=") for name in names.split()]
    return tuple(Family(name, also=tuple(also), **shared) for name, *also in split)


WIDE: dict[str, Any] = {"width": "intermediate_size"}
SHARED: dict[str, Any] = {"shared": "n_shared_experts|num_shared_experts|moe_num_shared_experts"}
SPARSE: dict[str, Any] = {"block": "block_sparse_moe|mlp", "count": "num_local_experts"}
W123: dict[str, Any] = {**SPARSE, "experts": "w123"}
TEXT: dict[str, Any] = {"holder": "text_config"}
BIASED: dict[str, Any] = {"bias": "gate.e_score_correction_bias", "score": "sigmoid"}
V3: dict[str, Any] = {**BIASED, **SHARED, "group_top": 2, "count": "n_routed_experts"}
V3_BLOCK_BIAS: dict[str, Any] = {**V3, "bias": "e_score_correction_bias|gate.e_score_correction_bias"}
STACKED: dict[str, Any] = {"experts": "stacked", "count": "num_local_experts"}
GRANITE: dict[str, Any] = {**WIDE, **SPARSE, "experts": "linears", "router": "router.layer.weight|router.weight"}
ROUTED: dict[str, Any] = {**STACKED, "router": "router.weight"}
REMOTE: dict[str, Any] = {"transformers": False}
V4: dict[str, Any] = {  # a second bias is added for the tokens of images
    "block": "ffn|mlp",
    "experts": "w123",
    "bias": "|".join(f"gate.{name}{end}" for name in ("bias", "e_score_correction_bias") for end in ("", "_vl")),
    "table": "gate.tid2eid",
    "score": "sqrtsoftplus",
    "shared": "1",
    "count": "n_routed_experts",
    "mtp": "named",
}
GEMMA4: dict[str, Any] = {
    "block": "",
    "experts": "stacked",
    "router": "router.proj.weight",
    "bias": "router.per_expert_scale",
    "leave": "router.scale",
    "score": "identity",
    "top_k": "top_k_experts",
    **TEXT,
}
BAILING = "moe_intermediate_size|moe_shared_expert_intermediate_size"  # engines read the second for the shared expert
MORE_THAN_HIDDEN = "its decoder layers hand on more than hidden states"
CLASSIFIER: dict[str, Any] = dict.fromkeys(("no_gradient", "no_refit"), "it does not predict the next token")
SUSPENDED: dict[str, Any] = dict.fromkeys(("no_gradient", "no_refit"), MORE_THAN_HIDDEN)
TWO_STACKS: dict[str, Any] = {
    "experts": "named",
    "router": "router.classifier.weight",
    "bias": "router.classifier.bias",
    "stacks": ("encoder", "decoder"),
    "width": "",
    "only_pruned": "it is an encoder-decoder; only one stack can be run",
    "note": "encoder and decoder: pruned by a hand-written plan",
}

FAMILIES: tuple[Family, ...] = (
    *rows("qwen3_moe qwen2_moe"),
    *rows("olmoe flex_olmo", **WIDE),
    *rows("qwen3_next mellum", mtp="named"),
    *rows("qwen3_5_moe=qwen3_5_moe_text=qwen3_6_moe=qwen3_6_moe_text qwen4_exp=qwen4_exp_text", mtp="named", **TEXT),
    Family("qwen3_vl_moe", experts="stacked", **TEXT),
    Family(
        "qwen3_omni_moe",
        holder="thinker_config.text_config",
        only_pruned="the whole model has generate() only; its thinker is a family of its own",
        note="the talker's experts are left alone",
    ),
    Family("qwen3_omni_moe_thinker", **TEXT),
    Family("flint", score="sigmoid"),
    Family("cohere2_moe", score_key="expert_selection_fn", **WIDE, **SHARED),
    Family(
        "hunyuan_v1_moe",
        also=("hunyuan",),
        router="gate.wg.weight|gate.weight",
        top_k="moe_topk",
        width="intermediate_size|moe_intermediate_size",
        shared="1",
    ),
    Family("jamba", block="feed_forward", router="router.weight", **WIDE),
    Family("mixtral", **W123, **WIDE),
    *rows("minimax=minimax_text_01=minimax_m1", router="gate.weight|router.weight", **W123, **WIDE),
    *rows("phimoe", top_k="2", router="gate.weight|router.weight", **W123, **WIDE),
    *rows("minimax_m2", **WIDE, **W123 | {**BIASED, "bias": V3_BLOCK_BIAS["bias"]}),
    *rows("minimax_m3_vl=minimax_m3_vl_text", **WIDE, **TEXT, **W123 | {**BIASED, "bias": V3_BLOCK_BIAS["bias"]}),
    Family(
        "kimi_linear",
        **{**W123, **V3, "count": "num_experts", "top_k": "num_experts_per_token", "groups": "num_expert_group"},
    ),
    Family("lfm2_moe", block="feed_forward", experts="w123", bias="expert_bias", score="sigmoid"),
    Family("deepseek_v4", **V4),
    Family(
        "deepseek_v41",
        also=("deepseek_v41_text",),
        note="its Engram tables are copied as they are",
        **V4,
        **TEXT,
        **REMOTE,
    ),
    Family(
        "mistral_large4",
        block="|mlp",
        experts="w123",
        group_top=2,
        count="n_routed_experts",
        **SUSPENDED,
        **SHARED,
        **TEXT,
    ),
    Family("mistral4", group_top=2, count="n_routed_experts", **SHARED),
    Family(
        "deepseek_v2",
        also=("deepseek_ocr2_text", "unlimited_ocr_text", "deepseek_ocr2", "unlimited_ocr"),
        group_top=1,
        group_if=("topk_method", "group_limited_greedy"),
        count="n_routed_experts",
        **SHARED,
    ),
    *rows("deepseek_v3=kimi_k2 deepseek_v32 glm4_moe glm4_moe_lite glm_moe_dsa", mtp="numbered", **V3),
    *rows("dots1 solar_open axk1", **V3),
    Family("axk2", **V3),
    *rows("kimi_k25 glm4v_moe=glm4v_moe_text", **V3, **TEXT),
    Family("glm5_next", also=("glm5_next_text",), mtp="numbered", **V3, **TEXT),
    Family("dots3_note", also=("dots3_note_text",), mtp="numbered", **V3 | {"shared": ""}, **TEXT),
    Family("mimo_v2_flash", also=("mimo_v2",), mtp="dense", **V3),
    Family("beam", **{**V3, "count": "num_experts"}),
    Family("exaone_moe", mtp="named", **{**V3_BLOCK_BIAS, "count": "num_experts"}),
    Family(
        "bailing_hybrid",
        mtp="numbered",
        width=BAILING,
        **{**V3, "bias": "gate.expert_bias|gate.e_score_correction_bias", "count": "num_experts"},
    ),
    Family(
        "hy_v3",
        router="router.gate.weight|gate.weight",
        bias="expert_bias|e_score_correction_bias",
        score="sigmoid",
        mtp="numbered",
        **SHARED,
    ),
    Family("hy_v4", experts="stacked", mtp="named", **V3),
    Family("afmoe", router="router.gate.weight", bias="expert_bias", score="sigmoid", **SHARED),
    Family("laguna", bias="experts.e_score_correction_bias|gate.e_score_correction_bias", score="sigmoid"),
    Family("kolibri1", bias="/moe.router.expert_bias|gate.e_score_correction_bias", score="sigmoid"),
    Family(
        "ernie4_5_moe",
        bias="moe_statics.e_score_correction_bias|gate.moe_statics.e_score_correction_bias",
        count="moe_num_experts",
        top_k="moe_k",
        mtp="named",
        **SHARED,
    ),
    Family(
        "longcat_flash",
        router="router.classifier.weight",
        bias="router.classifier.bias|router.e_score_correction_bias",
        trailing="zero_expert_num",
        count="n_routed_experts",
        top_k="moe_topk",
        width="expert_ffn_hidden_size",
        mtp="dense",
        note="weights that transformers writes for the zero experts are dropped; it does not load without them",
    ),
    Family("nemotron_h", block="mixer", experts="up_down", mtp="named", **V3 | {"shared": ""}),
    Family("gpt_oss", bias="router.bias", alternating="gate_up_proj", **ROUTED, **WIDE),
    Family("openai_privacy_filter", bias="router.bias", **CLASSIFIER, **ROUTED, **WIDE),
    Family(
        "llama4", also=("llama4_text",), block="feed_forward", score="sigmoid", shared="1", **WIDE, **ROUTED, **TEXT
    ),
    Family(
        "dbrx",
        block="ffn",
        experts="folded",
        router="router.layer.weight",
        count="moe_num_experts",
        top_k="moe_top_k",
        width="ffn_hidden_size",
        holder="ffn_config",
    ),
    *rows("granitemoe granitemoeshared granitemoehybrid granitemoe_swa", **GRANITE),
    Family(
        "jetmoe",
        **{**GRANITE, "block": "mlp|self_attention.experts"},
        leave="bias",
        note="attention experts share the count and the plan of their layer",
    ),
    Family(
        "aria",
        also=("aria_text",),
        experts="fc",
        router="router.weight",
        count="moe_num_experts",
        top_k="moe_topk",
        **WIDE,
        **SHARED,
        **TEXT,
    ),
    Family("gemma4", also=("gemma4_text",), **GEMMA4),
    Family(
        "diffusion_gemma",
        also=("diffusion_gemma_text",),
        only_pruned="it has no causal forward: its canvas is random, and each decoder layer runs twice",
        **GEMMA4,
    ),
    Family(
        "zaya",
        experts="stacked",
        router="gate.router_mlp.out_proj.weight",
        bias="gate.balancing_biases",
        leave="gate.down_proj|gate.router_mlp|gate.router_states_scale",
        trailing=1,
        no_gradient=MORE_THAN_HIDDEN,
        note="the row after the experts' skips the layer",
    ),
    Family(
        "inkling",
        also=("inkling_mm_model", "inkling_text"),
        experts="w13",
        alternating="w13",
        bias="gate.bias|gate.e_score_correction_bias",
        leave="gate.global_scale",
        trailing="n_shared_experts",
        shared="1",
        score="sigmoid",
        count="n_routed_experts",
        **TEXT,
    ),
    Family(
        "inkling2",
        also=("inkling2_text",),
        experts="w13",
        alternating="w13",
        bias="gate.bias|gate.e_score_correction_bias",
        score="sigmoid",
        score_key="scoring_func",
        count="n_routed_experts",
        **SUSPENDED,
        **TEXT,
    ),
    Family(
        "step3p7",
        also=("step3p5", "step3p7_text"),
        block="|moe|mlp",
        experts="bare",
        bias="router_bias|gate.e_score_correction_bias",
        score="sigmoid",
        count="moe_num_experts|n_routed_experts",
        top_k="moe_top_k|num_experts_per_tok",
        mtp="dense",
        **TEXT,
    ),
    Family(
        "muse_spark",
        also=("muse_spark_text",),
        block="mlp|moe|feed_forward",
        leave="experts.post_expert_norm",
        **STACKED,
        **BIASED,
        **TEXT,
    ),
    Family(
        "doge",
        experts="embedded",
        router="router_gate.weight",
        refused="its experts are product keys: the number of experts must stay a square",
    ),
    *rows("switch_transformers", top_k="1", **TWO_STACKS),
    *rows("nllb-moe", block="ffn", top_k="2", **TWO_STACKS),
    Family(
        "ernie4_5_vl_moe",
        also=("ernie4_5_moe_vl",),
        router="gate.weight|gate.weight_1",
        bias="moe_statics.e_score_correction_bias",
        count="moe_num_experts",
        top_k="moe_k",
        refused="text and vision experts share one numbering and have two routers",
        **TEXT,
    ),
    Family("bailing_moe", **SHARED, **REMOTE),
    Family("llada_moe", width="expert_intermediate_size", **REMOTE),
    Family(
        "bailing_moe_v2",
        mtp="numbered",
        width=BAILING,
        **REMOTE,
        **{**V3, "bias": "gate.expert_bias", "count": "num_experts"},
    ),
    Family("deepseek", count="n_routed_experts", **SHARED, **REMOTE),
    Family("deepseek_vl_v2", score_key="scoring_func", holder="language_config", **REMOTE, **V3 | {"score": "softmax"}),
    Family("arctic", **W123, **WIDE, **REMOTE),
    Family("grok-2", also=("git",), **W123, **REMOTE),
    Family("grok-1", block="", experts="grok", router="router.weight", width="", **REMOTE),
    Family(
        "step3_text",
        also=("step3_vl",),
        block="|moe",
        experts="bare",
        count="moe_num_experts",
        top_k="moe_top_k",
        **TEXT,
        **REMOTE,
    ),
    Family("pangu_ultra_moe", mtp="numbered", **{**V3_BLOCK_BIAS, "group_top": 0}, **REMOTE),
    Family("grove_moe", experts="pairs", refused="each pair of experts shares a chunk expert", **REMOTE),
    Family(
        "smallthinker",
        block="block_sparse_moe",
        experts="short",
        router="primary_router.weight",
        score="sigmoid",
        score_key="moe_primary_router_apply_softmax",
        count="moe_num_primary_experts",
        top_k="moe_num_active_primary_experts",
        width="moe_ffn_hidden_size",
        **REMOTE,
    ),
    Family(
        "kimi_k3",
        **{**W123, **V3, "count": "num_experts", "top_k": "num_experts_per_token|num_experts_per_tok"},
        width="",
        **TEXT,
        **REMOTE,
    ),
)

BY_NAME: Mapping[str, Family] = {name: family for family in FAMILIES for name in (family.name, *family.also)}

# Other names of families that transformers builds, for which it has no class: only a checkpoint's own code knows them.
UNBUILT = frozenset((
    "qwen3_6_moe", "qwen3_6_moe_text", "hunyuan", "minimax_text_01", "minimax_m1", "kimi_k2", "mimo_v2", "inkling",
    "step3p7_text", "ernie4_5_moe_vl",
))  # fmt: skip


def family_named(model_type: str) -> Family | None:
    """The row of a model_type, of a whole model or of its text part."""
    return BY_NAME.get(model_type) or BY_NAME.get(model_type.removesuffix("_text"))


def built_by_transformers(model_type: str) -> bool:
    """Whether transformers has a class for this model_type, as far as the table knows."""
    family = family_named(model_type)
    return family is not None and family.transformers and model_type not in UNBUILT

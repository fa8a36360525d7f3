"""What engines can load and run: one table of rules about expert counts, each with its source.

A rule that `stops` names what does not load or gives wrong results; the others name what runs, but slowly or not in
full. Which models an engine knows at all is in `engines`, what it makes of the weights' format in `formats`, of the
width of experts in `widths`, of MTP layers in `mtp`. Sources are the engines' code, of the versions in `engines.json`
unless a rule names another, and their issue trackers. Speeds were not measured here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

from moekern.errors import InputError, nearest_name
from moekern.plan.engines import Finding, listed, mlx_problem, names_of
from moekern.plan.formats import format_finding
from moekern.plan.mtp import Mtp, mtp_finding
from moekern.plan.shards import Shards, heads_problem
from moekern.plan.widths import Stored, multiple_of, width_cost, width_problem
from moekern.router import Router, count_problem

ENGINES = ("transformers", "vllm", "sglang", "llama.cpp", "ik_llama.cpp", "mlx-lm", "mistral.rs")
PARALLEL = ("vllm", "sglang")  # engines whose rules depend on tp and ep
GROUP = 32  # numbers that share a scale in the smallest groups of GGUF, MX formats and most others
ORDER: Mapping[bool | None, int] = {True: 0, None: 1, False: 2}  # of findings


@dataclass(frozen=True, slots=True)
class Target:
    """An engine, with the number of tensor-parallel and expert-parallel ranks it is to run on."""

    engine: str
    tp: int = 1
    ep: int = 1

    def __str__(self) -> str:
        ranks = ",".join(f"{name}={n}" for name, n in (("tp", self.tp), ("ep", self.ep)) if n > 1)
        return f"{self.engine}:{ranks}" if ranks else self.engine


@dataclass(frozen=True, slots=True)
class Served:
    """A model as far as engines' rules look at it. router.num_experts is the whole model's count.

    names: the class names and the model_type of its config.json; where these are not known, all that the family may
    have. quantization: the format of its weights, as `formats.weight_format` names it; "" if none is known.
    keys: those of config.json's root; empty where it was not seen. rope: theta and kind of rope_parameters, where that
    alone has them. shards: what tensor parallelism divides. replaced: dropped experts are constants, and the router is
    whole.
    """

    family: str
    score: str
    router: Router
    names: frozenset[str] = frozenset()
    quantization: str = ""
    keys: frozenset[str] = frozenset()
    shards: Shards = Shards()
    rope: tuple[float, str] | None = None
    replaced: bool = False

    @property
    def known_as(self) -> frozenset[str]:
        return self.names or names_of(self.family)

    def stored(self) -> Stored:
        """The experts as rules of width see them."""
        return Stored(self.family, self.quantization, self.shards)

    def narrowed(self, width: int | None) -> Served:
        """The same with experts of `width` channels (None: as it is)."""
        return self if width is None else replace(self, shards=replace(self.shards, width=width))

    @property
    def grouped(self) -> bool:
        return self.router.n_group > 1


@dataclass(frozen=True, slots=True)
class Rule:
    """broken(kept experts a layer, model, target) -> what is wrong, or None."""

    engines: tuple[str, ...]
    stops: bool
    broken: Callable[[int, Served, Target], str | None]


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _when(condition: bool, text: str) -> str | None:
    return text if condition else None


# csrc/moe/topk_softmax_kernels.cu: sizes that the fused kernel is compiled for; softmax and sigmoid have a workspace
# path for others.
VLLM_TOPK = frozenset({1 << n for n in range(10)} | {192, 320, 384, 448, 576})
# csrc/moe, fused_topk_softplus_sqrt (vllm-project/vllm#51521, #50982): no path for other sizes.
VLLM_SOFTPLUS = frozenset({1 << n for n in range(7)} | {128, 192, 256, 320, 384, 448, 512, 576})
# vllm/models/deepseek_v4: tp in the code for AMD, Intel and CPU, ep there for Intel and in the mega-MoE kernels;
# vllm/models/kimi_k3: ep in the mega-MoE kernels. Elsewhere experts may be spread unevenly.
VLLM_DIVIDES = {"deepseek_v4": ("tp", "ep"), "kimi_k3": ("ep",)}
# vllm/models/flint/ops/moe.py: a static assertion of its router on one Blackwell GPU; elsewhere it is plain code.
FLINT = "on Blackwell GPUs with tp=1 its Flint kernels take powers of two up to 256"
# conversion/: keys of published configs that the converter needs, and that transformers 5 does not write; of each group
# one. Run with the converter of August 2026: it stops, but where no kind of scores is named. llama.cpp v0.5.0 then
# computes DeepSeek-V3 otherwise, without a word, and ends for the others.
SCORE = ("scoring_func", "score_function", "score_func", "moe_router_activation", "moe_router_activation_func",
         "expert_selection_fn")  # fmt: skip
CONVERTER_KEYS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("deepseek_v3", "dots1", "exaone_moe"), (SCORE,)),
    "hunyuan_v1_moe": (("moe_intermediate_size",),),
    "mimo_v2_flash": (("swa_head_dim",),),
    "minimax_m2": (SCORE, ("rotary_dim",)),
    "step3p7": (("num_attention_groups",),),
}


def _lacks(model: Served) -> str | None:
    """What llama.cpp's converter does not find in config.json, where that was seen."""
    groups = CONVERTER_KEYS.get(model.family, ()) if model.keys else ()
    missing = [keys[0] for keys in groups if not model.keys.intersection(keys)]
    return f"its converter needs {', '.join(missing)} in config.json" if missing else None


RULES: tuple[Rule, ...] = (
    # torch.topk raises below top_k; the group rules are the model's own: transformers reshapes tokens and groups into
    # one another without an error, vLLM then routes as if there were no groups, SGLang's view and llama.cpp's assertion
    # fail.
    Rule(ENGINES, True, lambda n, model, target: count_problem(n, model.router)),
    # The sparse blocks of most models in vllm/model_executor/models, and those that SGLang took over: "Tensor parallel
    # size ... is greater than the number of experts".
    Rule(
        ("vllm", "sglang"), True,
        lambda n, model, target: _when(target.tp > n, f"tp={target.tp} needs at least as many experts"),
    ),
    # Attention in vllm/model_executor/models (vllm/config/model.py asks for the heads first), and in sglang/srt/models:
    # assertions on heads, and on key-value heads, of which ranks have copies where there are fewer than ranks.
    Rule(PARALLEL, True, lambda n, model, target: heads_problem(model.shards, target.tp)),
    # fused_moe/moe_align_block_size: the count rounded up to a warp of 32 must stay below 1024 threads.
    Rule(
        ("vllm",), True,
        lambda n, model, target: _when(-(-n // 32) * 32 >= 1024, "its Triton experts take at most 992"),
    ),
    Rule(  # see VLLM_SOFTPLUS
        ("vllm",), True,
        lambda n, model, target: _when(
            model.score == "sqrtsoftplus" and n not in VLLM_SOFTPLUS,
            f"its sqrt-softplus router takes {_listed(VLLM_SOFTPLUS)} only",
        ),
    ),
    Rule(  # see VLLM_DIVIDES
        ("vllm",), False,
        lambda n, model, target: _when(
            any(n % getattr(target, ranks) for ranks in VLLM_DIVIDES.get(model.family, ())),
            f"on some back ends its {model.family} code needs a multiple of tp={target.tp} and of ep={target.ep}",
        ),
    ),
    # model_executor/layers/fused_moe/router/grouped_topk_router.py: the fused kernel for up to 32 groups and top-32,
    # with a selection bias; else torch.
    Rule(
        ("vllm",), False,
        lambda n, model, target: _when(
            model.grouped and (model.router.n_group > 32 or model.router.top_k > 32),
            "more than 32 groups or 32 experts a token: torch chooses",
        ),
    ),
    # model_executor/layers/fused_moe/experts/trtllm_fp8_moe.py asserts global_num_experts % 4 == 0.
    Rule(
        ("vllm",), False,
        lambda n, model, target: _when(
            model.quantization.startswith("fp8") and bool(n % 4), "its TRT-LLM kernels for FP8 take multiples of 4"
        ),
    ),
    Rule(  # see VLLM_TOPK; grouped routers have a kernel of their own
        ("vllm",), False,
        lambda n, model, target: _when(
            model.score in ("softmax", "sigmoid") and not model.grouped and n not in VLLM_TOPK,
            f"its fused top-k kernel is made for {_listed(VLLM_TOPK)}; others take a slower path",
        ),
    ),
    Rule(  # see FLINT
        ("vllm",), False,
        lambda n, model, target: _when(
            model.family == "flint" and target.tp == target.ep == 1 and (not _power_of_two(n) or n > 256), FLINT
        ),
    ),
    # vllm/distributed/eplb: experts % ep == 0 (vllm-project/vllm#52435); without it experts may be spread unevenly.
    Rule(
        ("vllm",), False,
        lambda n, model, target: _when(bool(n % target.ep), f"balancing (EPLB) needs a multiple of ep={target.ep}"),
    ),
    # sglang/srt/layers/moe/fused_moe_triton/layer.py asserts num_experts % moe_ep_size == 0.
    Rule(
        ("sglang",), True,
        lambda n, model, target: _when(bool(n % target.ep), f"experts must be a multiple of ep={target.ep}"),
    ),
    # sglang/kernels/ops/moe/router.py, which its Grok code always calls: Triton's ranges are powers of two.
    Rule(
        ("sglang",), True,
        lambda n, model, target: _when(
            model.family in ("grok-1", "grok-2") and not _power_of_two(n), "its Grok router takes powers of two"
        ),
    ),
    # sglang/srt/layers/moe/topk.py: fused gates for powers of two with at most 32 experts a group; other grouped counts
    # go to a Triton router where there is a selection bias, and to torch where there is none.
    Rule(
        ("sglang",), False,
        lambda n, model, target: _when(
            model.grouped and (not _power_of_two(n) or n // model.router.n_group > 32),
            "its fused gate takes powers of two with at most 32 experts in a group; others take a slower path",
        ),
    ),
    # The same file: the Triton router for experts without groups ends at 1024, beyond it torch chooses.
    Rule(
        ("sglang",), False,
        lambda n, model, target: _when(not model.grouped and n > 1024, "more than 1024 experts: torch chooses"),
    ),
    # src/llama-hparams.h, LLAMA_MAX_EXPERTS (ggml-org/llama.cpp#26185); 512 in builds before October 2026.
    Rule(("llama.cpp",), True, lambda n, model, target: _when(n > 1024, "at most 1024 experts")),
    # ik_llama.cpp's src/llama-hparams.cpp.
    Rule(("ik_llama.cpp",), True, lambda n, model, target: _when(n > 512, "at most 512 experts")),
    # src/llama-model.cpp, load_hparams: n_expert_groups < n_expert, n_group_used < n_expert_groups.
    Rule(
        ("llama.cpp",), True,
        lambda n, model, target: _when(
            model.grouped and (n <= model.router.n_group or model.router.topk_group >= model.router.n_group),
            f"needs more experts than the {model.router.n_group} groups, and fewer chosen groups than all",
        ),
    ),
    # src/llama-graph.cpp, build_moe_ffn: the sum of the two best scores of each group, as DeepSeek-V3 has it. Run with
    # v0.5.0: DeepSeek-V2's own code takes the best one, and other tokens came out, pruned or not.
    Rule(
        ("llama.cpp",), True,
        lambda n, model, target: _when(
            model.grouped and model.router.group_top != 2,
            f"it ranks groups by their two best experts, this model by its best {model.router.group_top}",
        ),
    ),
    Rule(("llama.cpp",), True, lambda n, model, target: _lacks(model)),  # see CONVERTER_KEYS
    # mlx_lm/models: ModelArgs. Run with 0.32.2: a TypeError without what has no default, and what has one is taken.
    Rule(("mlx-lm",), True, lambda n, model, target: mlx_problem(model.names, model.keys, model.rope)),
    # mlx_lm/models/gpt_oss.py: `sanitize` gives plain weights names that no module has. names: config.json was seen.
    Rule(
        ("mlx-lm",), True,
        lambda n, model, target: _when(
            model.family == "gpt_oss" and bool(model.names) and not model.quantization,
            "its gpt-oss code reads MXFP4 experts only",
        ),
    ),
)  # fmt: skip

# vllm/model_executor/layers/fused_moe/expert_substitution.py, first in 0.33.0, whose code was run: docs/engines.md.
REPLACED = "dropped experts are constants (expert substitution), which vLLM alone loads"
SUBSTITUTION = "needs 0.33.0 or later, without data parallelism, EPLB, MoE LoRA and monolithic kernels"
# One scalar in config.json sizes every layer: in transformers' models and those of vLLM, SGLang, mlx-lm (its sanitize
# stacks that many experts a layer) and mistral.rs, and n_expert in GGUF.
NONUNIFORM = "layers have {low} to {high} experts; the engine takes one count for all layers"


def parse_target(text: str) -> Target:
    """ "vllm", "sglang:tp=2,ep=4". Raises InputError."""
    engine, colon, options = text.partition(":")
    if engine not in ENGINES:
        near = nearest_name(engine, ENGINES)
        raise InputError(f"--target {text:.60}: expected one of {', '.join(ENGINES)}, such as vllm:tp=2,ep=2{near}")
    target = Target(engine)
    given = options.split(",") if colon else []
    for option in given:
        found = re.fullmatch(r"(tp|ep)=([1-9][0-9]{0,4})", option)
        if found and sum(other.startswith(found[1]) for other in given) > 1:
            raise InputError(f"--target {text:.60}: {found[1]} is given twice")
        if not found or engine not in PARALLEL:
            known = "tp=N and ep=N" if engine in PARALLEL else f"none for {engine}"
            raise InputError(f"--target {text:.60}: option {option[:60]!r} is not known; known are {known}")
        target = replace(target, tp=int(found[2])) if found[1] == "tp" else replace(target, ep=int(found[2]))
    return target


def findings(target: Target, counts: Mapping[str, int], served: Served, mtp: Mtp | None = None) -> list[Finding]:
    """Every rule that a model with these experts a layer breaks: those that stop it first, then what is not known.

    counts: layer key -> routed experts. mtp: the MTP layers that are there; None: not known, and not looked at.
    """
    found: list[Finding] = []
    if served.replaced:
        found += _replaced(target)
        counts = dict.fromkeys(counts, served.router.num_experts)  # the router's rows, which engines go by
    low, high = min(counts.values()), max(counts.values())
    if low != high:
        found.append(Finding(True, NONUNIFORM.format(low=low, high=high)))
    for count in sorted(set(counts.values())):
        found += _broken(target, count, served)
    known = not any(finding.stops for finding in found)
    told = mtp_finding(target.engine, served.family, mtp, high) if mtp is not None and known else None
    return sorted(dict.fromkeys([*found, told] if told else found), key=lambda finding: ORDER[finding.stops])


def _replaced(target: Target) -> list[Finding]:
    if target.engine != "vllm":
        return [Finding(True, REPLACED)]
    whole = "its expert substitution runs without expert parallelism"
    return [Finding(True, whole)] if target.ep > 1 else [Finding(False, SUBSTITUTION)]


def check_counts(what: str, counts: Mapping[str, int], served: Served, targets: Sequence[Target]) -> None:
    """Raise InputError, with the rule and the nearest counts that run, unless every target runs these counts."""
    for target in targets:
        stopping = [finding for finding in findings(target, counts, served) if finding.stops]
        if stopping:
            fixed = served.replaced or len(set(counts.values())) > 1
            counted = "" if fixed else nearest(max(counts.values()), served, targets)
            raise InputError(f"{what}: {target} would not run it: {stopping[0].text}{counted}")


def runs(count: int, served: Served, targets: Sequence[Target]) -> bool:
    """Whether every target runs a model with so many experts in each layer."""
    return all(not finding.stops for target in targets for finding in _broken(target, count, served))


def nearest(count: int, served: Served, targets: Sequence[Target]) -> str:
    """The counts below and above that run, as the end of a message."""
    if any(width_problem(target.engine, served.stored(), expert_ranks(target)) for target in targets):
        return ""  # which says what widths run
    legal = [n for n in range(1, served.router.num_experts + 1) if runs(n, served, targets)]
    around = [*[n for n in legal if n < count][-1:], *[n for n in legal if n > count][:1]]
    return f"; nearest that runs: {' or '.join(map(str, around))}" if around else "; no other count would help"


def check_width(what: str, width: int, served: Served, targets: Sequence[Target]) -> list[str]:
    """Raise InputError, with the rule and the nearest widths that run, unless every target runs experts of `width`
    channels. Returns a line for each target that they cost something on."""
    stored, costs = served.narrowed(width).stored(), {target: "" for target in targets}
    for target in targets:
        problem = width_problem(target.engine, stored, expert_ranks(target))
        if problem:
            raise InputError(f"{what}: {target} would not run it: {problem}")
        costs[target] = width_cost(target.engine, stored, expert_ranks(target)) or ""
    return [f"{target}: {cost}" for target, cost in costs.items() if cost]


def widths_for(
    served: Served, targets: Sequence[Target], share: float, held: Collection[int] | None = None
) -> list[int]:
    """Widths up to that of the model's experts that every target and transformers run, rising, from the widest that is
    no more than `share` of it: at `share` of the bytes all experts have room then. `held`: those that the format of the
    experts can hold (None: all).

    Where some narrower ones break no rule at all, these alone; else, if there are any, those that quantisers' groups of
    32 divide. The model's own is there if it is run.
    """
    asked, width = {*targets, Target("transformers")}, served.shards.width
    engines = [(target.engine, served.stored(), expert_ranks(target)) for target in asked]
    least, own = lcm(*(multiple_of(*each) for each in engines)), list[int]()
    if not any(width_problem(*each) for each in engines):
        own.append(width)
    for step in (lcm(*(multiple_of(*each, whole=True) for each in engines)), lcm(least, GROUP), least):
        found = [m for m in range(step, width + 1, step) if held is None or m in held]
        least_kept = max((m for m in found if m <= share * width), default=0)
        if narrow := [m for m in found if least_kept <= m < width]:
            return [*narrow, *own]
    return own


def _broken(target: Target, count: int, served: Served) -> list[Finding]:
    texts = ((rule, rule.broken(count, served, target)) for rule in RULES if target.engine in rule.engines)
    model = listed(target.engine, served.known_as)
    weights = format_finding(target.engine, served.family, served.known_as, served.quantization)
    width = width_problem(target.engine, served.stored(), expert_ranks(target))
    told = [found for found in (model, weights, Finding(True, width) if width else None) if found]
    return [*told, *(Finding(rule.stops, text) for rule, text in texts if text)]


def expert_ranks(target: Target) -> int:
    """Ranks that share each expert: with ep vLLM shards none, and SGLang spreads each over tp / ep ranks."""
    if target.ep == 1:
        return target.tp
    return max(1, target.tp // target.ep) if target.engine == "sglang" else 1


def _listed(numbers: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))

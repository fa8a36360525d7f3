"""What engines run: each rule broken once, and what is said about it."""

from dataclasses import replace

import pytest

from moekern.errors import InputError
from moekern.plan.make import make_plan
from moekern.plan.mtp import Mtp
from moekern.plan.shards import Shards
from moekern.plan.targets import (
    ENGINES,
    RULES,
    Served,
    Target,
    check_counts,
    check_width,
    findings,
    nearest,
    parse_target,
    runs,
    widths_for,
)
from moekern.router import Router, count_problem
from tests.helpers.measured import model_statistics

QWEN = Served("qwen3_moe", "softmax", Router(128, 8))
WIDE = Served("wide", "softmax", Router(2048, 40))
V3 = Served("deepseek_v3", "sigmoid", Router(256, 8, 8, 4, 2))
V4 = Served("deepseek_v4", "sqrtsoftplus", Router(256, 6))
REMOTE = Served("arctic", "softmax", Router(128, 2))
GROUPED = Served("x", "sigmoid", Router(330, 8, 33, 8, 2))
GPT_OSS = Served("gpt_oss", "softmax", Router(32, 4), frozenset({"gpt_oss", "GptOssForCausalLM"}))
SHARDED = replace(QWEN, shards=Shards(heads=64, kv_heads=4, width=1536, block=128))
FP8 = Served("qwen3_moe", "softmax", Router(128, 8), quantization="fp8")

BROKEN = {  # target, model, count, whether it stops, words of the finding
    "top-k": ("transformers", QWEN, 6, True, "fewer than the 8 that each token chooses"),
    "groups": ("sglang", V3, 100, True, "not a multiple of the router's 8 groups"),
    "tp": ("vllm:tp=64", QWEN, 48, True, "tp=64 needs at least as many experts"),
    "tp of sglang": ("sglang:tp=64", QWEN, 48, True, "tp=64 needs at least as many experts"),
    "heads": ("vllm:tp=3", SHARDED, 64, True, "tp=3 does not divide the 64 attention heads"),
    "heads of sglang": ("sglang:tp=3", SHARDED, 64, True, "tp=3 does not divide the 64 attention heads"),
    "key-value heads": (
        "vllm:tp=8", replace(QWEN, shards=Shards(64, 12)), 64, True, "neither divides the 12 key-value heads nor",
    ),
    "copies of key-value heads": (
        "sglang:tp=8", replace(QWEN, shards=Shards(64, 3)), 64, True, "divides the 3 key-value heads nor",
    ),
    "width": ("vllm:tp=32", replace(QWEN, shards=Shards(64, 64, 48)), 64, True, "do not divide an expert's 48"),
    "blocks": ("vllm:tp=8", SHARDED, 64, True, "channels over 8 ranks: a scale goes with 128 rows"),
    "992": ("vllm", WIDE, 993, True, "at most 992"),
    "softplus": ("vllm", V4, 144, True, "sqrt-softplus router takes 1, 2, 4, 8, 16, 32, 64, 128, 192"),
    "v4 divides": ("vllm:tp=3", V4, 128, False, "deepseek_v4 code needs a multiple of tp=3"),
    "33 groups": ("vllm", GROUPED, 66, False, "more than 32 groups"),
    "fp8 of 4": ("vllm", FP8, 66, False, "FP8 take multiples of 4"),
    "slow top-k": ("vllm", QWEN, 96, False, "others take a slower path"),
    "eplb": ("vllm:ep=3", QWEN, 64, False, "EPLB"),
    "ep": ("sglang:ep=3", QWEN, 64, True, "multiple of ep=3"),
    "fused gate": ("sglang", V3, 192, False, "powers of two"),
    "fused gate, group": (
        "sglang",
        Served("x", "sigmoid", Router(256, 8, 4, 2, 2)),
        256,
        False,
        "at most 32 experts in",
    ),
    "torch chooses": ("sglang", WIDE, 1025, False, "torch chooses"),
    "1024": ("llama.cpp", WIDE, 1025, True, "at most 1024"),
    "512": ("ik_llama.cpp", WIDE, 513, True, "at most 512"),
    "all groups chosen": ("llama.cpp", Served("x", "sigmoid", Router(64, 4, 4, 4, 1)), 32, True, "fewer chosen groups"),
    "groups by the best expert": (
        "llama.cpp", Served("deepseek_v2", "softmax", Router(160, 6, 8, 3, 1)), 80, True, "this model by its best 1",
    ),
    "no kind of scores": ("llama.cpp", replace(V3, keys=frozenset({"n_group"})), 128, True, "needs scoring_func in"),
    "flint": ("vllm", Served("flint", "sigmoid", Router(256, 6)), 96, False, "Flint kernels take powers of two"),
    "a config of transformers 5": (
        "mlx-lm", replace(QWEN, names=frozenset({"qwen3_moe"}), keys=frozenset({"hidden_size", "rope_parameters"})),
        64, True, "its code needs",
    ),
    "gpt-oss in BF16": ("mlx-lm", GPT_OSS, 16, True, "reads MXFP4 experts only"),
    "grok": ("sglang", Served("grok-2", "softmax", Router(8, 2)), 6, True, "Grok router takes powers of two"),
}  # fmt: skip
LISTED = {  # the same for what an engine's list says
    "removed": ("vllm", REMOTE, 64, True, "removed after 0.28.0"),
    "remote code": ("transformers", REMOTE, 64, False, "the checkpoint's own code"),
    "not known": ("llama.cpp", WIDE, 64, None, "class name is not known"),
    "awq": ("llama.cpp", replace(QWEN, quantization="awq"), 64, True, "does not read experts stored as awq"),
}


@pytest.mark.parametrize("case", BROKEN | LISTED)
def test_every_rule_is_told(case):
    text, model, count, stops, words = (BROKEN | LISTED)[case]
    told = [f for f in findings(parse_target(text), {"0": count, "1": count}, model) if words in f.text]
    assert [f.stops for f in told] == [stops]


def test_no_rule_is_forgotten_here():
    broken = {
        i
        for text, model, count, _, _ in BROKEN.values()
        for i, rule in enumerate(RULES)
        if parse_target(text).engine in rule.engines and rule.broken(count, model, parse_target(text))
    }
    assert broken == set(range(len(RULES)))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_half_runs_everywhere(engine):
    assert findings(Target(engine), {"0": 64, "1": 64}, QWEN) == []
    assert runs(128, V3, [Target(engine)])


@pytest.mark.parametrize(
    "text", ["vllm:tp=4", "vllm:tp=2", "vllm:tp=8,ep=8", "sglang:tp=4", "sglang:tp=8,ep=2", "transformers", "llama.cpp"]
)
def test_heads_are_copied_and_experts_stay_whole_where_the_engine_does_so(text: str) -> None:
    """Four key-value heads serve eight ranks; with ep an expert is on one rank of vLLM, and on tp / ep of SGLang."""
    assert not [finding for finding in findings(parse_target(text), {"0": 64}, SHARDED) if finding.stops]


def test_a_width_that_does_not_run_is_told_with_the_nearest_that_does() -> None:
    narrow = replace(QWEN, shards=replace(SHARDED.shards, width=1400, block=0))
    with pytest.raises(InputError) as caught:
        check_width("--shape 64x700", 700, narrow, [parse_target("llama.cpp"), parse_target("transformers")])
    assert str(caught.value) == (
        "--shape 64x700: transformers would not run it: experts have 700 channels: its grouped product takes multiples "
        "of 8, unless loaded with experts_implementation='eager'; nearest width that runs: 696 or 704"
    )
    with pytest.raises(InputError, match="vllm:tp=8 would not run it: 8 ranks do not .* runs: 696 or 704$"):
        check_width("--shape 64x700", 700, narrow, [parse_target("vllm:tp=8")])
    (line,) = check_width("--shape 64x704", 704, narrow, [parse_target("llama.cpp"), parse_target("vllm:tp=8")])
    assert line.startswith("llama.cpp: experts have 704 channels: K-quants")
    assert line.endswith("nearest width without this: 512 or 768")
    odd = replace(narrow, shards=replace(narrow.shards, width=700))
    assert not runs(64, odd, [Target("transformers")])
    assert nearest(64, odd, [Target("transformers")]) == ""


@pytest.mark.parametrize(
    ("texts", "width", "share", "expected"),
    [
        ((), 96, 0.5, [48, 56, 64, 72, 80, 88, 96]),
        (("vllm:tp=48",), 768, 0.75, [576, 624, 672, 720, 768]),
        (("llama.cpp",), 2048, 0.6, [1024, 1280, 1536, 1792, 2048]),
        (("llama.cpp",), 256, 0.5, [128, 160, 192, 224, 256]),  # 256 divides none, 32 some
        (("llama.cpp", "sglang:tp=2,ep=2"), 32, 0.4, [8, 16, 24, 32]),
        (("vllm:tp=16",), 96, 0.5, [48, 64, 80, 96]),
        (("vllm:tp=16",), 72, 0.5, [32, 48, 64]),
        (("vllm:tp=96",), 96, 0.5, [96]),
        (("vllm:tp=97",), 96, 0.5, []),
    ],
)
def test_widths_that_all_targets_run(texts: tuple[str, ...], width: int, share: float, expected: list[int]) -> None:
    model = replace(QWEN, shards=Shards(width=width))
    found = widths_for(model, [parse_target(text) for text in texts], share)
    assert found == expected
    for m in found:
        check_width("", m, model, [Target("transformers"), *map(parse_target, texts)])


def test_widths_are_those_that_the_format_holds_too() -> None:
    model, asked = replace(QWEN, shards=Shards(width=768)), [parse_target("vllm")]
    assert widths_for(model, asked, 0.5, range(128, 769, 128)) == [384, 512, 640, 768]
    assert widths_for(model, asked, 0.4, [96, 192, 768]) == [192, 768]
    assert widths_for(model, asked, 0.4, [768]) == [768]


def test_gpt_oss_as_published_and_before_its_config_was_seen() -> None:
    for model in (replace(GPT_OSS, quantization="mxfp4"), replace(GPT_OSS, names=frozenset())):
        assert findings(Target("mlx-lm"), {"0": 16}, model) == []


def test_where_flint_runs_any_count() -> None:
    flint = Served("flint", "sigmoid", Router(256, 6))
    for text, count in (("vllm", 128), ("vllm:tp=2", 96), ("vllm:ep=2", 96), ("sglang", 96)):
        assert not [f for f in findings(parse_target(text), {"0": count}, flint) if "Flint kernels" in f.text]


def test_numbers_that_older_code_refused() -> None:
    """vLLM 0.33 and SGLang 0.5.23 choose elsewhere what their fused kernels do not take."""
    assert runs(66, GROUPED, [Target("vllm")])
    assert runs(600, WIDE, [Target("sglang")])
    assert not [f for f in findings(Target("sglang"), {"0": 600}, WIDE) if f.stops is False]
    assert runs(128, Served("step3p7", "sigmoid", Router(288, 8)), [parse_target("vllm:tp=3")])


@pytest.mark.parametrize("engine", ENGINES)
def test_different_counts_run_nowhere(engine):
    told = findings(Target(engine), {"0": 64, "1": 32}, QWEN)
    assert told[0].stops
    assert told[0].text == "layers have 32 to 64 experts; the engine takes one count for all layers"


def test_mtp_layers_are_looked_at_where_they_are_known():
    mtp = Mtp((256,), ("model.layers.61.",))
    without, told = findings(Target("vllm"), {"0": 64}, V3), findings(Target("vllm"), {"0": 64}, V3, mtp)
    assert len(told) == len(without) + 1
    assert findings(Target("llama.cpp"), {"0": 64}, V3, mtp) == []
    stopped = findings(Target("llama.cpp"), {"0": 2000}, WIDE, mtp)
    assert stopped == findings(Target("llama.cpp"), {"0": 2000}, WIDE)  # what stops it says enough


def test_the_nearest_counts_that_run():
    targets = [parse_target("sglang:ep=16"), parse_target("vllm")]
    with pytest.raises(InputError) as caught:
        check_counts("--keep 60", {"0": 60}, QWEN, targets)
    assert str(caught.value) == (
        "--keep 60: sglang:ep=16 would not run it: experts must be a multiple of ep=16; nearest that runs: 48 or 64"
    )
    assert nearest(60, Served("x", "softmax", Router(8, 9)), targets) == "; no other count would help"
    for count in range(1, 129):
        if runs(count, QWEN, targets):
            assert count % 16 == 0
            assert count_problem(count, QWEN.router) is None


@pytest.mark.parametrize(
    "text",
    ["vllm", "sglang:tp=2,ep=4", "llama.cpp", "transformers", "vllm:ep=8", "mlx-lm", "mistral.rs", "ik_llama.cpp"],
)
def test_targets_read_as_they_are_written(text):
    assert str(parse_target(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tgi",
        "vllm:",
        "vllm:tp",
        "vllm:tp=0",
        "vllm:pp=2",
        "vllm:tp=x",
        "llama.cpp:tp=2",
        "vllm:tp=2,",
        "VLLM",
        "vllm:tp=2,tp=2",
        "sglang:ep=2,tp=1,ep=4",
    ],
)
def test_targets_that_mean_nothing_are_refused(text):
    with pytest.raises(InputError, match=f"--target {text}: "):
        parse_target(text)


def test_a_refused_target_is_not_repeated_at_length():
    for text in ("x" * 9999, f"vllm:{'x' * 9999}"):
        with pytest.raises(InputError) as caught:
            parse_target(text)
        assert len(str(caught.value)) < 250


def test_a_plan_is_made_for_its_targets():
    s = model_statistics()
    target = parse_target("sglang:ep=3")
    assert make_plan(s, "reap", 3, targets=[target]).provenance["targets"] == ["sglang:ep=3"]
    with pytest.raises(InputError, match="--keep 4: sglang:ep=3 would not run it: .* nearest that runs: 3 or 6"):
        make_plan(s, "reap", 4, targets=[target])

"""Patterns over module names mean after pruning what they meant before, or are refused by name."""

import fnmatch
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.checkpoint.expressions import may_never_end
from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.patterns import Ambiguous, ExpertModules, is_pattern, rewritten
from moekern.pruning.prune import prune
from moekern.verification.tensors import verify
from tests.helpers.synthetic import deepseek_v3, gpt_oss_mxfp4, qwen3, write

KEEP = {"0": (0, 2, 3, 7), "1": (1, 4, 5, 6)}
PLAN = Plan({key: LayerPlan(keep) for key, keep in KEEP.items()})
TAILS = ("", ".down_proj", ".down_proj.weight", ".up_proj", ".up_proj.weight")
OTHERS = ("model", "model.layers.3.self_attn.q_proj", "model.layers.0.mlp.gate", "lm_head")
E12, EXPERT = 12, "model.layers.{}.mlp.experts.{}{}"


def layer(key: str, keep: Sequence[int], experts: int = E12) -> ExpertModules:
    bare = f"layers.{key}.mlp.experts."
    return ExpertModules(f"model.{bare}", bare, frozenset(range(experts)), {e: n for n, e in enumerate(keep)}, TAILS)


def hits(patterns: Sequence[str], name: str) -> bool:
    """By the loaders' own rules."""
    for text in patterns:
        if text.startswith("re:"):
            if re.match(text[3:], name):
                return True
        elif fnmatch.fnmatchcase(name, text):
            return True
    return False


def check(text: str, new: Sequence[str], keeps: dict[str, Sequence[int]]) -> None:
    for key, keep in keeps.items():
        for number, old in enumerate(keep):
            for tail in TAILS:
                before, after = EXPERT.format(key, old, tail), EXPERT.format(key, number, tail)
                assert hits([text], before) == hits(new, after), (text, new, before)
    for name in OTHERS:
        assert hits([text], name) == hits(new, name)


KEEPS: dict[str, Sequence[int]] = {"0": (0, 3, 7, 11), "1": (1, 2, 10)}
REWRITTEN = [
    r"re:.*layers\.0\.mlp\.experts\.(3|7)\..*",
    r"re:.*layers\.1\.mlp\.experts\.[2-9]\.down_proj$",
    r"re:.*\.experts\.(0|1[01])\..*",
    r"re:.*experts\.1\d?($|\.)",
    r"re:^model\.layers\.0\.mlp\.experts\.11\.",
    r"re:.*experts\.7",
    r"re:.*mlp\.experts\.\d\..*",
    r"re:.*layers\.0\.mlp\.experts\.2\..*",
    "model.layers.0.mlp.experts.3.*",
    "*.experts.1?.up_proj*",
    "*experts.[37]*",
]
UNTOUCHED = [
    r"re:.*self_attn.*", r"re:.*mlp.gate$", "re:.*experts.*", r"re:.*experts\.\d+\..*", r"re:.*layers\.1\..*",
    "*", "*mlp.gate*", "model.layers.3*", r"re:.*experts\.[0-9]+\.down_proj", "re:.*(",
    "*lm_head", r"re:.*layers\.(0|1)\..*",
]  # fmt: skip


@pytest.mark.parametrize("text", REWRITTEN)
def test_what_names_experts_by_number_is_written_anew(text: str) -> None:
    new = rewritten(text, [layer(key, keep) for key, keep in KEEPS.items()], OTHERS)
    assert new != (text,)
    check(text, new, KEEPS)


@pytest.mark.parametrize("text", UNTOUCHED)
def test_what_names_none_by_number_stays(text: str) -> None:
    assert is_pattern(text)
    assert rewritten(text, [layer(key, keep) for key, keep in KEEPS.items()], OTHERS) == (text,)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (r"re:.*\.3\..*", "other modules too|outside"),
        (r"re:experts\.3\..*", "searched or matched from its beginning"),
        (r"re:.*experts\.(\d+\.?)*3.*", "forever"),
    ],
)
def test_what_cannot_be_written_anew_is_refused(text: str, why: str) -> None:
    with pytest.raises(Ambiguous, match=why):
        rewritten(text, [layer(key, keep) for key, keep in KEEPS.items()], OTHERS)


def test_a_layer_whose_name_ends_in_anothers() -> None:
    mtp = ExpertModules(
        "mtp.layers.0.mlp.experts.", "mtp.layers.0.mlp.experts.", frozenset(range(E12)), {5: 0, 3: 1}, TAILS
    )
    (first, second) = rewritten(r"re:.*layers\.0\.mlp\.experts\.3\..*", [layer("0", (0, 1, 3)), mtp], OTHERS)
    assert re.match(first[3:], "model.layers.0.mlp.experts.2.down_proj")
    assert not re.match(first[3:], "mtp.layers.0.mlp.experts.2.down_proj")
    assert re.match(second[3:], "mtp.layers.0.mlp.experts.1.down_proj")
    assert not re.match(second[3:], "model.layers.0.mlp.experts.1.down_proj")


numbers = st.sampled_from([r"\d+", r"\d", r"1\d*", "(3|7)", "[2-5]", "(0|1[01])", "11", "1", "(?:2|9)?", ".", ".*"])
heads = st.sampled_from([".*", r".*layers\.0\.", r".*layers\.[01]\.", r"model\.layers\.1\.", "^.*mlp"])
ends = st.sampled_from([r"\..*", "", "$", r"\.(up|down)_proj$", r"(\..*)?$", r"\.down_proj"])
kept = st.sets(st.integers(0, 11), min_size=1, max_size=11).map(lambda found: tuple(sorted(found)))


@settings(deadline=None, max_examples=150)
@given(head=heads, number=numbers, end=ends, first=kept, second=kept)
def test_any_rewritten_pattern_means_the_same(head: str, number: str, end: str, first: Any, second: Any) -> None:
    text = f"re:{head}.*experts\\.{number}{end}"
    keeps = {"0": first, "1": second}
    try:
        new = rewritten(text, [layer(key, keep) for key, keep in keeps.items()], OTHERS)
    except Ambiguous:
        return
    check(text, new, keeps)


@pytest.mark.parametrize(
    ("text", "endless"),
    [
        (r".*layers\.(0|1)\..*experts\.\d+\..*", False), (r"(\.\w+)*x", True), ("(a|a)+b", True), (r"\(a*\)*", False),
        ("[(*+]*", False), (".*" * 9, True), (".*" * 8 + "5X", True), (".*" * 4 + "5X", False), (r"\.\d+" * 8, False),
        (r"(?:.*\.)?layers\.\d+\..*experts\.[0-9]+\..*", False), ("((a+))+", True), ("x" * 5000, True),
        ("(a*)?", False),
    ],
)  # fmt: skip
def test_expressions_that_may_take_forever(text: str, endless: bool) -> None:
    assert may_never_end(text) == endless


def settings_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_patterns_in_every_place_where_settings_stand(tmp_path: Path) -> None:
    config, tensors = qwen3()
    old, new = r"re:.*layers\.1\.mlp\.experts\.(5|6)\..*", r"re:(?:.*\.)?layers\.1\.mlp\.experts\.(?:2|3)\..*"
    config["quantization_config"] = {
        "ignore": ["lm_head", old, "re:.*gate$"],
        "config_groups": {"group_0": {"targets": ["Linear", old]}},
        "dynamic": {"-:" + old[3:]: {}, r"+:.*": {"bits": 4}},
    }
    folder = write(tmp_path / "in", config, tensors)
    (folder / "quantization_config.json").write_text(json.dumps({"exclude": ["*layers.1.mlp.experts.5*"]}))
    report = prune(folder, PLAN, tmp_path / "out")
    assert settings_of(tmp_path / "out") == {
        "ignore": ["lm_head", new, "re:.*gate$"],
        "config_groups": {"group_0": {"targets": ["Linear", new]}},
        "dynamic": {"-:" + new[3:]: {}, r"+:.*": {"bits": 4}},
    }
    side = json.loads((tmp_path / "out/quantization_config.json").read_text())
    assert side == {"exclude": ["*layers.1.mlp.experts.2", "*layers.1.mlp.experts.2.*"]}
    assert [note.split(":")[0] for note in report.notes] == ["quantization_config.json", "config.json"]
    assert verify(folder, PLAN, tmp_path / "out").problems == ()


def test_short_names_are_spelt_out_where_layers_differ(tmp_path: Path) -> None:
    config, tensors = qwen3()
    config["quantization_config"] = {
        "modules_to_not_convert": ["experts.7.up_proj", "experts.1", "mlp.experts.3", "a.7"]
    }
    folder = write(tmp_path / "in", config, tensors)
    prune(folder, PLAN, tmp_path / "out")
    assert settings_of(tmp_path / "out")["modules_to_not_convert"] == [
        "model.layers.0.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.0", "model.layers.0.mlp.experts.2", "a.7",
    ]  # fmt: skip
    assert verify(folder, PLAN, tmp_path / "out").problems == ()


@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_a_refusal_names_file_and_pattern_and_writes_nothing(tmp_path: Path, place: str) -> None:
    config, tensors = qwen3()
    held = {"quantization_config": {"ignore": [r"re:.*\.1\..*"]}}
    folder = write(tmp_path / "in", config | (held if place == "config.json" else {}), tensors)
    if place != "config.json":
        (folder / place).write_text(json.dumps(held))
    with pytest.raises(InputError, match=rf"{place}: 're:\.\*.*' names experts by number, .*; write the names"):
        prune(folder, PLAN, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_names_of_stacked_experts(tmp_path: Path) -> None:
    """Settings may number the experts of a stack, which some loaders take apart."""
    config, tensors = gpt_oss_mxfp4()
    config["quantization_config"] = {
        "ignore": ["model.layers.0.mlp.experts.7", r"re:.*layers\.1\.mlp\.experts\.[56]\..*"]
    }
    folder = write(tmp_path / "in", config, tensors)
    prune(folder, PLAN, tmp_path / "out")
    assert settings_of(tmp_path / "out")["ignore"] == [
        "model.layers.0.mlp.experts.3", r"re:(?:.*\.)?layers\.1\.mlp\.experts\.(?:2|3)\..*",
    ]  # fmt: skip
    assert verify(folder, PLAN, tmp_path / "out").problems == ()


def test_an_mtp_layer_that_keeps_all_keeps_its_numbers(tmp_path: Path) -> None:
    config, tensors = deepseek_v3()
    config["quantization_config"] = {"ignore": [r"re:.*layers\.[23]\.mlp\.experts\.5\..*"]}
    folder = write(tmp_path / "in", config, tensors)
    plan = Plan({"1": LayerPlan((0, 3, 5, 6)), "2": LayerPlan((1, 2, 5, 7))})
    prune(folder, plan, tmp_path / "out", mtp="keep")
    assert settings_of(tmp_path / "out")["ignore"] == [
        r"re:(?:.*\.)?layers\.2\.mlp\.experts\.2\..*", r"re:(?:.*\.)?layers\.3\.mlp\.experts\.5\..*",
    ]  # fmt: skip
    assert verify(folder, plan, tmp_path / "out").problems == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ignore": [r"re:.*layers\.1\.mlp\.experts\.(5|6)\..*", "lm_head"]},
        {"ignore": [r"re:.*layers\.1\.mlp\.experts\.2\..*", "lm_head"]},
        {"ignore": ["lm_head"]},
        {"ignore": [r"re:.*layers\.1\.mlp\.experts\.(2|3)\..*"]},
        {"ignore": [r"re:.*layers\.1\.mlp\.experts\.(2|3)\..*", "lm_head", "re:.*layernorm"]},
    ],
    ids=["old numbers", "one too few", "none", "a plain name less", "one too many"],
)
def test_verify_finds_settings_that_mean_another_thing(tmp_path: Path, wrong: Any) -> None:
    config, tensors = qwen3()
    config["quantization_config"] = {"ignore": [r"re:.*layers\.1\.mlp\.experts\.(5|6)\..*", "lm_head"]}
    folder = write(tmp_path / "in", config, tensors)
    prune(folder, PLAN, tmp_path / "out")
    after = json.loads((tmp_path / "out/config.json").read_text())
    good = r"re:.*layers\.1\.mlp\.experts\.(2|3)\..*"  # another pattern that means the same
    for value, problems in (({"ignore": [good, "lm_head"]}, 0), (wrong, 1)):
        (tmp_path / "out/config.json").write_text(json.dumps(after | {"quantization_config": value}))
        found = verify(folder, PLAN, tmp_path / "out").problems
        assert len(found) == problems, found
        assert all(line.startswith("config.json: quantization_config is ") for line in found)

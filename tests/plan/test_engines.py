"""What engines' own lists say of a family."""

import re

import pytest

from moekern.architectures import FAMILIES
from moekern.plan.engines import HUB_NAMES, Finding, listed, names_of, registries, release
from moekern.plan.targets import ENGINES
from tests.helpers.findings import check_finding

KNOWN = {  # family, engine -> whether it stops and words; None: the engine has it
    ("flex_olmo", "llama.cpp"): (True, "converter does not know FlexOlmoForCausalLM (0c1e57098 of 2026-10-01)"),
    ("flex_olmo", "vllm"): (False, "falls back on transformers' code"),
    ("flex_olmo", "mlx-lm"): (True, "does not know flex_olmo (0.32.2 of 2026-10-16)"),
    ("longcat_flash", "llama.cpp"): (True, "converter does not know LongcatCausalLM/LongcatFlashForCausalLM"),
    ("longcat_flash", "mlx-lm"): None,
    ("dots1", "vllm"): (False, "no Dots1ForCausalLM of its own (0.33.0 of 2026-11-01); falls back"),
    ("dots1", "mlx-lm"): None,
    ("arctic", "vllm"): (True, "no ArcticForCausalLM (0.33.0 of 2026-11-01; removed after 0.28.0)"),
    ("grok-2", "transformers"): (False, "no class for git/grok-2; the checkpoint's own code"),
    ("switch_transformers", "sglang"): (True, "has no SwitchTransformersForConditionalGeneration"),
    ("qwen3_moe", "transformers"): None,
    ("nemotron_h", "transformers"): (False, "needs transformers >= 5.3"),
    ("mistral_large4", "transformers"): (False, "needs transformers >= 5.22"),
    ("qwen3_vl_moe", "ik_llama.cpp"): None,
    ("olmoe", "ik_llama.cpp"): (True, "does not know GGUF files of olmoe (0a9ff1255 read 2026-11-29)"),
    ("jetmoe", "ik_llama.cpp"): (True, "llama.cpp's converter does not know JetMoeForCausalLM"),
    ("qwen3_moe", "mistral.rs"): None,
    ("zaya", "mistral.rs"): (None, "no ZayaForCausalLM in the list that was read"),
}


@pytest.mark.parametrize(("family", "engine"), KNOWN)
def test_what_a_list_says(family: str, engine: str) -> None:
    said, expected = listed(engine, names_of(family)), KNOWN[family, engine]
    check_finding(said, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_family_has_a_verdict(engine: str) -> None:
    for family in FAMILIES:
        assert names_of(family.name) >= {family.name}, family.name
        assert any(name != name.lower() for name in names_of(family.name)), f"{family.name}: no class name"
        said = listed(engine, names_of(family.name))
        assert said is None or (said.text and said.stops in (True, False, None))
        if said is not None and (said.stops or engine == "mistral.rs"):
            assert registries()[engine]["version"] in said.text or engine == "ik_llama.cpp"


def test_a_model_without_names_is_not_judged() -> None:
    assert names_of("nothing") == frozenset()
    for engine in ENGINES:
        said = listed(engine, frozenset())
        assert said is not None
        assert said.stops is None


def test_the_name_in_config_json_decides() -> None:
    """One family may have several, and an engine some of them."""
    assert listed("mistral.rs", frozenset({"PhiMoEForCausalLM", "phimoe"})) is None
    said = listed("llama.cpp", frozenset({"PhimoeForCausalLM", "phimoe"}))
    assert said == Finding(True, "its converter does not know PhimoeForCausalLM (0c1e57098 of 2026-10-01)")


def test_a_class_of_remote_code_does_not_fall_back() -> None:
    """Engines look the name in config.json up in transformers."""
    ours = listed("vllm", frozenset({"MiniMaxForCausalLM", "minimax"}))
    theirs = listed("vllm", frozenset({"MiniMaxText01ForCausalLM", "minimax"}))
    assert ours is not None
    assert ours.stops is False
    assert theirs is not None
    assert theirs.stops is True
    assert "removed after 0.23.0" in theirs.text


def test_the_data_are_well_formed() -> None:
    assert set(registries()) == set(ENGINES)
    for engine, entry in registries().items():
        assert entry["version"], engine
        assert re.fullmatch(r"2\d{3}-\d\d-\d\d", entry["read"]), engine
        names = entry["types"] if engine == "transformers" else entry["names"]
        assert len(names) > 40, engine
        assert list(names) == sorted(set(names)), engine
        assert all(isinstance(name, str) and name for name in names)
    transformers = registries()["transformers"]
    assert set(transformers["types"]) <= set(transformers["since"])
    assert set(transformers["replaceable"]) <= set(transformers["types"])
    assert all(release(first) >= release(transformers["oldest"]) for first in transformers["since"].values())
    assert set(HUB_NAMES) <= {family.name for family in FAMILIES}
    for family in FAMILIES:  # the table says which families transformers builds; so does its own list
        assert family.transformers == any(n in transformers["types"] for n in (family.name, *family.also)), family.name


def test_releases_compare_by_number() -> None:
    assert release("5.10.4") > release("5.9.0") > release("4.57.6")
    assert release("5.4.0rc1") == (5, 4)

"""Which models each engine loads: the names in its own list, read from its source, with version and date.

`engines.json` holds the lists; `python -m moekern.plan.registries` refreshes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moekern.architectures.table import BY_NAME, family_named

DATA = Path(__file__).with_name("engines.json")

# Class names of published config.json files that differ from transformers' own, or that it does not have.
HUB_NAMES: Mapping[str, tuple[str, ...]] = {
    "arctic": ("ArcticForCausalLM",),
    "bailing_hybrid": (
        "BailingMoeV2_5ForCausalLM",
        "BailingMoeV3ForCausalLM",
        "BailingMoeV3VLForConditionalGeneration",
    ),
    "bailing_moe": ("BailingMoeForCausalLM",),
    "bailing_moe_v2": ("BailingMoeV2ForCausalLM",),
    "deepseek": ("DeepseekForCausalLM",),
    "deepseek_v4": ("DeepseekV4ForConditionalGeneration",),
    "deepseek_v41": ("DeepseekV41ForCausalLM",),
    "deepseek_vl_v2": ("DeepseekVLV2ForCausalLM",),
    "exaone_moe": ("ExaoneMoEForCausalLM",),
    "grok-1": ("Grok1ModelForCausalLM", "GrokForCausalLM"),
    "grok-2": ("Grok1ForCausalLM",),
    "grove_moe": ("GroveMoeForCausalLM",),
    "kimi_k3": ("KimiK3ForConditionalGeneration", "KimiK3LinearForCausalLM"),
    "llada_moe": ("LLaDAMoEModelLM", "LLaDAMoEModel"),
    "longcat_flash": ("LongcatCausalLM",),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "MiMoV2OmniForCausalLM"),
    "minimax": ("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM"),
    "kimi_k25": ("KimiK25ForConditionalGeneration",),
    "minimax_m3_vl": ("MiniMaxM3SparseForCausalLM", "MiniMaxM3VLForConditionalGeneration"),
    "pangu_ultra_moe": ("PanguUltraMoEForCausalLM", "PanguProMoEV2ForCausalLM"),
    "phimoe": ("PhiMoEForCausalLM",),
    "smallthinker": ("SmallThinkerForCausalLM",),
    "step3_text": ("Step3VLForConditionalGeneration", "Step3TextForCausalLM"),
    "step3p7": ("Step3p5ForCausalLM",),
}
BY_MODEL_TYPE = ("transformers", "mlx-lm")  # engines that choose by model_type, not by the class's name
SAVED_AS = {"num_experts": "num_local_experts", "rope_theta": "rope_parameters"}  # keys as transformers 5 spells them


@dataclass(frozen=True, slots=True)
class Finding:
    """What an engine does not do with a model. stops: whether it does not run it; None where that is not known."""

    stops: bool | None
    text: str


def release(version: str) -> tuple[int, ...]:
    """ "5.10.4" -> (5, 10, 4), so that releases compare by number; letters and what follows them do not count."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


@cache
def registries() -> Mapping[str, Mapping[str, Any]]:
    """engine -> its list: version, dated and names, and what else `registries.READERS` says of it."""
    data: Mapping[str, Mapping[str, Any]] = json.loads(DATA.read_text(encoding="utf-8"))
    return data


@cache
def names_of(family: str) -> frozenset[str]:
    """Every model_type and class name that a config.json of the family may have. Empty for an unknown family."""
    row = family_named(family)
    if row is None:
        return frozenset()
    kinds = (row.name, *row.also)
    classes = registries()["transformers"]["types"]
    return frozenset({*kinds, *HUB_NAMES.get(row.name, ()), *(c for kind in kinds for c in classes.get(kind, ()))})


def listed(engine: str, names: frozenset[str]) -> Finding | None:
    """What the engine's list says of a model with these names; None where it has one of them.

    names: the class names and the model_type of a config.json, or all that its family may have; empty: not known.
    """
    entry = registries()[engine]
    where = _where(entry)
    if not names:
        return Finding(None, f"the model's class name is not known, and so not whether {where} loads it")
    if engine == "transformers":
        return _transformers(entry, names)
    if engine == "ik_llama.cpp":
        return _ik_llama_cpp(entry, names, where)
    if names & set(entry["names"]):
        return None
    if engine in ("vllm", "sglang"):
        return _own_or_generic(engine, entry, names, where)
    tool = "its converter " if engine == "llama.cpp" else ""
    missing = _shown(names, types=engine in BY_MODEL_TYPE)
    if "note" in entry:
        return Finding(None, f"no {missing} in the list that was read ({where}; {entry['note']})")
    return Finding(True, f"{tool}does not know {missing} ({where})")


def mlx_problem(names: frozenset[str], keys: frozenset[str], rope: tuple[float, str] | None) -> str | None:
    """What mlx-lm's code for the model type does not find at the root of config.json; None where that is all there.

    keys: those of config.json; empty where it was not seen. rope: theta and kind of its rope_parameters, where it has
    them.
    """
    entry = registries()["mlx-lm"]
    missing = sorted({key for name in names for key in entry["needs"].get(name, ())} - keys) if keys else []
    if missing:
        saved = [SAVED_AS[key] for key in missing if SAVED_AS.get(key) in keys]
        instead = f"; transformers 5 saves them in {', '.join(saved)}, from where they can be copied" if saved else ""
        return f"its code needs {', '.join(missing)} at the root of config.json{instead}"
    taken = {entry["rope_theta"][name] for name in names if name in entry["rope_theta"]}
    if rope is None or not taken or (rope[0] in taken and rope[1] == "default"):
        return None
    kind = "" if rope[1] == "default" else f" without {rope[1]}"
    return (
        f"its code does not look into rope_parameters, and would take rope_theta {min(taken):g}{kind} for the "
        f"{rope[0]:g} there; give rope_theta and rope_scaling at the root of config.json"
    )


def _where(entry: Mapping[str, Any]) -> str:
    """ "0.33.0 of 2026-11-01": the list's version and date."""
    return f"{entry['version']} {'of' if 'dated' in entry else 'read'} {entry.get('dated', entry['read'])}"


def _transformers(entry: Mapping[str, Any], names: frozenset[str]) -> Finding | None:
    """The release that a model needs, where older ones that people still use do not have it."""
    types = _model_types(names)
    first = [entry["since"][name] for name in types if name in entry["since"]]
    if not first:
        missing = _shown(names, types=True)
        return Finding(False, f"{entry['version']} has no class for {missing}; the checkpoint's own code is needed")
    needed = min(first, key=release)
    if release(needed) <= release(entry["oldest"]):
        return None
    return Finding(False, f"needs transformers >= {'.'.join(needed.split('.')[:2])}")


def _own_or_generic(engine: str, entry: Mapping[str, Any], names: frozenset[str], where: str) -> Finding:
    """Both engines take a class of transformers that they have no code for, if its attention can be replaced."""
    removed = [f"; removed after {entry['removed'][name]}" for name in sorted(names & set(entry.get("removed", ())))]
    missing = _shown(names, types=False)
    transformers = registries()["transformers"]
    able = {name for kind in transformers["replaceable"] for name in transformers["types"][kind]}
    if names & (able | set(entry.get("generic", ()))):
        return Finding(False, f"has no {missing} of its own ({where}); falls back on transformers' code, slower")
    return Finding(True, f"has no {missing} ({where}{removed[0] if removed else ''})")


def _ik_llama_cpp(entry: Mapping[str, Any], names: frozenset[str], where: str) -> Finding | None:
    """It loads files that llama.cpp's converter makes; its list is of their architectures."""
    converter = registries()["llama.cpp"]
    made = {converter["names"][name] for name in names & set(converter["names"])}
    if not made:
        return Finding(True, f"llama.cpp's converter does not know {_shown(names, types=False)} ({_where(converter)})")
    if made & set(entry["names"]):
        return None
    return Finding(True, f"does not know GGUF files of {', '.join(sorted(made))} ({where})")


def _model_types(names: frozenset[str]) -> set[str]:
    """The model types among the names, and those that transformers has for the classes among them."""
    types = registries()["transformers"]["types"]
    given = {name for name in names if name in BY_NAME and BY_NAME[name].transformers}
    return given or {kind for kind, classes in types.items() if names & set(classes)}


def _shown(names: frozenset[str], *, types: bool) -> str:
    """The class's name, or the model type, as a message gives it."""
    kinds = {name for name in names if name in BY_NAME or name == name.lower()}
    return "/".join(sorted(kinds if types else names - kinds)) or "/".join(sorted(names))

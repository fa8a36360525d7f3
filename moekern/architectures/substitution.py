"""Experts that are constants, as vLLM's expert substitution spells them (vllm/model_executor/layers/fused_moe/
expert_substitution.py): which models it can be written for, what config.json says of it, and the checkpoint as it was.

The router keeps a row for every expert, and experts that stay keep their numbers and names. Of a layer's replaced
experts config.json names the numbers, and a tensor each holds the vector that stands for its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from moekern.architectures.layout import Layout, MoeLayer
from moekern.checkpoint.folder import CONFIG, Checkpoint
from moekern.checkpoint.header import TensorEntry
from moekern.checkpoint.strict_json import shown
from moekern.errors import InputError

APPROXIMATE, COMPRESSION = "approximate-experts", "compression-config"
# The first is the default: vLLM before 0.33.0 refuses it, and takes the other for a whole model, without a word.
FORMS = (COMPRESSION, APPROXIMATE)
KEY, VALUE = "approximate_experts", ".approx_value"
NESTED = ("compression_config", "transform_config", "expert_substitution")
LAYOUT, CONSTANT = "compact_retained_experts", "constant-v1"
SEMANTICS = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}
PLAIN = ("BF16", "F16", "F32")  # dtypes of experts that are not quantised
INSTEAD = "take the original, whose plans can be evaluated and pruned anew"


@dataclass(frozen=True, slots=True)
class Constants:
    """Of one layer: the name of its experts, and the tensor of each replaced one."""

    prefix: str  # such as model.layers.1.mlp.experts
    tensors: Mapping[int, str]


def check_form(form: str) -> None:
    """Raise InputError for a form that is none."""
    if form not in FORMS:
        raise InputError(f"--form {form:.40}: expected one of {', '.join(FORMS)}")


def replace_problem(checkpoint: Checkpoint, layout: Layout) -> str | None:
    """Why experts of a model cannot become constants in a form that vLLM loads, and what to do; None where they can."""
    for layer in layout.layers.values():
        if (problem := _layer_problem(checkpoint, layer)) is not None:
            return f"layer {layer.key}: {problem}"
    if layout.family.name == "llama4":
        return "Llama 4 multiplies an expert's input by its gate, which vLLM's expert substitution does not do"
    return None


def _layer_problem(checkpoint: Checkpoint, layer: MoeLayer) -> str | None:
    heads = set()
    for tensor in layer.of_role("expert"):
        if tensor.action != "drop":
            why = "vLLM's expert substitution reads one tensor an expert"
            return f"{tensor.name} holds all experts in one tensor, and {why}; write them one by one first"
        entry, (head, word, _) = checkpoint.tensors[tensor.name], tensor.template.partition(".{}.")
        if entry.dtype not in PLAIN:
            return f"{tensor.name} is {entry.dtype}: vLLM's expert substitution is for plain experts; dequantise them"
        if not word:
            return f"{tensor.name}: the number of its expert is no part of its own"
        heads.add(head)
    numbers = [part for head in heads for part in head.split(".") if part.isdecimal()]
    if len(heads) != 1 or numbers != [layer.key]:
        return f"{', '.join(sorted(heads))}: vLLM knows the experts of a layer by the one number in their name"
    return None


def experts_prefix(layer: MoeLayer) -> str:
    """The name of a layer's experts, where `replace_problem` knows none."""
    return next(layer.of_role("expert")).template.partition(".{}.")[0]


def constant_name(form: str, prefix: str, expert: int) -> str:
    """The tensor of a replaced expert."""
    if form == APPROXIMATE:
        return f"{prefix}.{expert}{VALUE}"
    return f"{prefix.rpartition('.')[0]}.expert_replacements.{expert}.value"


def with_replaced(
    config: Mapping[str, Any], layout: Layout, replaced: Mapping[str, Iterable[int]], form: str
) -> dict[str, Any]:
    """config.json with what says which experts of which layer are constants, behind all other keys. Raises InputError
    where another value stands in the place of its sections."""
    out = deepcopy(dict(config))
    if form == APPROXIMATE:
        out[KEY] = {key: list(experts) for key, experts in replaced.items() if experts}
        return out
    targets = {}
    for key, experts in replaced.items():
        layer, prefix = layout.layers[key], experts_prefix(layout.layers[key])
        values = {str(e): {"format": CONSTANT, "tensors": {"value": constant_name(form, prefix, e)}} for e in experts}
        if values:
            counted = {"num_logical_experts": layer.num_experts, "weight_layout": LAYOUT, "replacements": values}
            targets[prefix] = counted
    place = out
    for key in NESTED[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise InputError(f"--form {form}: {CONFIG}: {key} is no object; use --form {APPROXIMATE}")
    place[NESTED[-1]] = {"version": 1, "router_semantics": dict(SEMANTICS), "targets": targets}
    return out


def has_replaced(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that experts are constants."""
    return any(section.get(KEY) is not None for section in _sections(config)) or _nested(config) is not None


def refuse_replaced(checkpoint: Checkpoint) -> None:
    """Raise InputError for a checkpoint whose dropped experts are constants."""
    if has_replaced(checkpoint.config):
        what = "its dropped experts are constants (vLLM's expert substitution)"
        can = "moekern inspects, checks, evaluates and verifies such a folder and does nothing else with it"
        raise InputError(f"{checkpoint.folder}: {what}; {can}: {INSTEAD}")


def as_whole(checkpoint: Checkpoint) -> tuple[Checkpoint, Mapping[str, Constants]]:
    """The checkpoint as if all experts were there, and its layers' constants by layer key: where an expert is replaced,
    the tensors of the first one that is not stand for its own, whose values nobody is to use.

    Of any other checkpoint the same, and none. Raises InputError for a config that is no sound substitution, and for
    constants that are missing or are no vectors of finite size.
    """
    if not has_replaced(checkpoint.config):
        return checkpoint, {}
    found, tensors = constants_of(checkpoint), dict(checkpoint.tensors)
    by_head: dict[str, dict[int, list[TensorEntry]]] = {constants.prefix: {} for constants in found.values()}
    for entry in checkpoint.tensors.values():
        for head, number in _numbers_in(entry.name):
            if head in by_head:
                by_head[head].setdefault(number, []).append(entry)
    for constants in found.values():
        held = by_head[constants.prefix]
        own = set(constants.tensors.values())
        kept = [e for e in held if e not in constants.tensors]
        if not kept:
            raise _unsound(checkpoint, f"{constants.prefix}: no expert is left")
        for expert in constants.tensors:
            for entry in held.get(expert, ()):
                if entry.name not in own:
                    raise _unsound(checkpoint, f"{entry.name} is there, though its expert is replaced")
            for entry in held[min(kept)]:
                name = f"{constants.prefix}.{expert}{entry.name.removeprefix(f'{constants.prefix}.{min(kept)}')}"
                tensors[name] = replace(entry, name=name)
        if len({checkpoint.tensors[name].shape for name in own}) > 1:
            raise _unsound(checkpoint, f"{constants.prefix}: constants of several lengths")
        sizes = {n for entry in held[min(kept)] for n in entry.shape}
        wrong = next((name for name in own if checkpoint.tensors[name].shape[0] not in sizes), None)
        if wrong is not None:
            raise _unsound(checkpoint, f"{wrong}: {checkpoint.tensors[wrong].shape[0]} numbers are no expert's output")
    for constants in found.values():
        for name in constants.tensors.values():
            tensors.pop(name, None)  # layers may share one
    return replace(checkpoint, tensors=tensors, config=_without(checkpoint.config)), found


def constants_of(checkpoint: Checkpoint) -> dict[str, Constants]:
    """Layer key -> constants, as config.json names them. Raises InputError as `as_whole`."""
    nested = _nested(checkpoint.config)
    listed = [section[KEY] for section in _sections(checkpoint.config) if section.get(KEY) is not None]
    if nested is not None and listed:
        raise _unsound(checkpoint, f"it has both {KEY} and {'.'.join(NESTED)}, and vLLM refuses that")
    found = _of_nested(checkpoint, nested) if nested is not None else _of_list(checkpoint, listed[0])
    for constants in found.values():
        for expert, name in constants.tensors.items():
            entry = checkpoint.tensors.get(name)
            if entry is None:
                raise _unsound(checkpoint, f"{shown(name)}, the constant of expert {expert}, is missing")
            if len(entry.shape) != 1 or entry.dtype not in PLAIN:
                raise _unsound(checkpoint, f"{name}: {entry.dtype} {list(entry.shape)} is no vector of plain numbers")
    return found


def _of_list(checkpoint: Checkpoint, value: Any) -> dict[str, Constants]:
    if not isinstance(value, dict):
        raise _unsound(checkpoint, f"{KEY} is {shown(value):.40}, expected layers and lists of experts")
    wanted = {str(key): _ids(checkpoint, key, experts) for key, experts in value.items()}
    prefixes: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name.endswith(VALUE):
            head = name.removesuffix(VALUE).rpartition(".")[0]
            numbers = [part for part in head.split(".") if part.isdecimal()]
            if len(numbers) == 1:
                prefixes.setdefault(numbers[0], head)
    for key, experts in wanted.items():
        if experts and key not in prefixes:
            raise _unsound(checkpoint, f"layer {key:.40}: no tensor ends in {VALUE}")
    found = {
        key: Constants(prefixes[key], {e: constant_name(APPROXIMATE, prefixes[key], e) for e in experts})
        for key, experts in wanted.items()
        if experts
    }
    listed = {name for constants in found.values() for name in constants.tensors.values()}
    for name in checkpoint.tensors:
        if name.endswith(VALUE) and name not in listed:
            raise _unsound(checkpoint, f"{name} is of no expert that {KEY} lists")
    return found


def _of_nested(checkpoint: Checkpoint, value: Any) -> dict[str, Constants]:
    if not isinstance(value, dict) or value.get("version") != 1 or value.get("router_semantics") != SEMANTICS:
        raise _unsound(checkpoint, f"{'.'.join(NESTED)}: expected version 1 with routing that is left alone")
    targets, found = value.get("targets"), dict[str, Constants]()
    for prefix, target in targets.items() if isinstance(targets, dict) else ():
        numbers = [part for part in prefix.split(".") if part.isdecimal()]
        if len(numbers) != 1 or not isinstance(target, dict) or target.get("weight_layout") != LAYOUT:
            raise _unsound(checkpoint, f"target {shown(prefix):.80}: expected one layer, laid out as {LAYOUT}")
        if numbers[0] in found:
            raise _unsound(checkpoint, f"target {shown(prefix):.80}: layer {numbers[0]} is there already")
        replacements = target.get("replacements")
        if not isinstance(replacements, dict):
            raise _unsound(checkpoint, f"target {shown(prefix):.80}: replacements: expected numbers of experts")
        tensors = {}
        for expert, each in zip(_ids(checkpoint, numbers[0], list(replacements)), replacements.values(), strict=True):
            named = each.get("tensors") if isinstance(each, dict) and each.get("format") == CONSTANT else None
            name = named.get("value") if isinstance(named, dict) else None
            if not isinstance(name, str):
                raise _unsound(checkpoint, f"target {prefix}: expert {expert}: expected a {CONSTANT} and its tensor")
            tensors[expert] = name
        found[numbers[0]] = Constants(prefix, tensors)
    return found


def _ids(checkpoint: Checkpoint, layer: str, experts: Any) -> list[int]:
    """Numbers of experts, which vLLM takes as texts too. Raises InputError for what is none, or is there twice."""
    ids = [int(e) for e in experts if _is_number(e)] if isinstance(experts, list) else []
    if not isinstance(experts, list) or len(ids) < len(experts) or len(set(ids)) < len(ids):
        raise _unsound(checkpoint, f"layer {str(layer):.40}: expected different numbers of experts")
    return ids


def _is_number(value: Any) -> bool:
    return (type(value) is int and value >= 0) or (isinstance(value, str) and value.isdecimal() and len(value) < 9)


def _numbers_in(name: str) -> Iterator[tuple[str, int]]:
    """Each place of a name that may be the number of an expert: what stands before it, and the number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and len(part) < 9:
            yield ".".join(parts[:i]), int(part)


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    text = config.get("text_config")
    return [text, config] if isinstance(text, dict) else [config]


def _nested(config: Mapping[str, Any]) -> Any:
    place: Any = config
    for key in NESTED:
        place = place.get(key) if isinstance(place, dict) else None
    return place


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what says that experts are constants, and without the sections that hold nothing else."""
    out = deepcopy(dict(config))
    for section in _sections(out):
        assert isinstance(section, dict)
        section.pop(KEY, None)
    holders: list[dict[str, Any]] = [out]
    if _nested(out) is not None:
        for key in NESTED[:-1]:
            holders.append(holders[-1][key])
        for holder, key in zip(reversed(holders), reversed(NESTED), strict=True):
            if key == NESTED[-1] or not holder[key]:
                del holder[key]
    return out


def _unsound(checkpoint: Checkpoint, why: str) -> InputError:
    return InputError(f"{checkpoint.folder / CONFIG}: expert substitution: {why}")

"""Settings of quantisers: whether they say about the pruned model's modules what they said about the original's."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moekern.architectures import ExpertTensor, Layout, MoeLayer
from moekern.checkpoint.expressions import Endless, compiled

WRAPPERS = ("model", "language_model", "text_model")
UNSTACKED = ("", ".gate_proj", ".up_proj", ".down_proj", ".gate_up_proj", ".w1", ".w2", ".w3")
MARKS = ("re:", "+:", "-:")


@dataclass(frozen=True)
class Modules:
    """renamed: every module at or below a numbered expert -> its name in the pruned model, None when the expert is
    dropped; each by its key and without the wrappers' names ("model.", "language_model."). others: all other modules.
    """

    renamed: Mapping[str, str | None]
    others: Sequence[str]
    stems: frozenset[str]  # what stands before an expert's number, without wrappers

    @cached_property
    def levels(self) -> frozenset[str]:
        """The last word before an expert's number, such as "experts."."""
        return frozenset(re.split(r"\.(?=.)", stem)[-1] for stem in self.stems)


def renumbered(tensor: ExpertTensor, keep: tuple[int, ...], num_experts: int) -> int | None:
    """New number of an expert: its rank among the kept; past the last routed expert the distance to the end stays."""
    if tensor.expert in keep:
        return keep.index(tensor.expert)
    past = (tensor.expert or 0) - num_experts
    return len(keep) + past if past >= 0 else None


def modules_of(layout: Layout, names: Iterator[str], kept: Mapping[str, tuple[int, ...]], *, drop_mtp: bool) -> Modules:
    """names: of the source's tensors."""
    renamed: dict[str, str | None] = {}
    stems: set[str] = set()
    inside: set[str] = set()
    for key, layer in [*layout.layers.items(), *layout.mtp.items()]:
        keep = kept.get(key, () if drop_mtp and key in layout.mtp else tuple(range(layer.num_experts)))
        for stem, old, tail, new in _numbered(layer, keep):
            stems.add(unwrapped(stem))
            for start in (stem, unwrapped(stem)):
                renamed[f"{start}{old}{tail}"] = None if new is None else f"{start}{new}{tail}"
        inside |= {tensor.name for tensor in layer.tensors if tensor.action == "drop"}
    others = sorted({name.rpartition(".")[0] for name in names if name not in inside})
    return Modules(renamed, others, frozenset(stems))


def _numbered(layer: MoeLayer, keep: tuple[int, ...]) -> Iterator[tuple[str, int, str, int | None]]:
    """(what stands before the number, number, what stands behind, new number) of every module in an expert; of those
    in a stack as loaders name them that take it apart."""
    for tensor in layer.tensors:
        if tensor.action == "drop" and tensor.expert is not None:
            stem, _, rest = tensor.template.partition("{}")
            tails = rest.split(".")
            new = renumbered(tensor, keep, layer.num_experts)
            yield from ((stem, tensor.expert, ".".join(tails[:end]), new) for end in range(1, len(tails) + 1))
        elif tensor.role == "expert" and (stack := re.match(r".*(?:^|\.)experts\.", tensor.name)):
            for expert in range(layer.num_experts):
                new = keep.index(expert) if expert in keep else None
                yield from ((stack[0], expert, tail, new) for tail in UNSTACKED)


def renamed_settings(value: Any, modules: Modules) -> Any:
    """Lists and dict keys with module names replaced, and those of dropped experts left out; patterns stay."""
    if isinstance(value, dict):
        pairs = [(_renamed(key, modules), renamed_settings(item, modules)) for key, item in value.items()]
        return {key: item for key, item in pairs if key is not None}
    if isinstance(value, list):
        new = [_renamed(x, modules) if isinstance(x, str) else renamed_settings(x, modules) for x in value]
        return [item for item, old in zip(new, value, strict=True) if item is not None or old is None]
    return value


def same_settings(before: Any, after: Any, modules: Modules) -> bool:
    """Whether `after` is `before` with names replaced, in its lists and keys that hold patterns or parts of names too:
    there each module must be chosen by what chose it before."""
    if isinstance(before, dict) and isinstance(after, dict):
        if any(_is_open(key, modules) for key in before):
            return _same_choice(list(before.items()), list(after.items()), modules)
        names = {key: _renamed(key, modules) for key in before}
        stay = [key for key in before if names[key] is not None]
        return [names[key] for key in stay] == list(after) and all(
            same_settings(before[key], new, modules) for key, new in zip(stay, after.values(), strict=True)
        )
    if not isinstance(before, list) or not isinstance(after, list):
        return json.dumps(before) == json.dumps(after)
    if any(isinstance(item, str) and _is_open(item, modules) for item in before):
        old, new = ([(item, None) for item in items if isinstance(item, str)] for items in (before, after))
        return _same_choice(old, new, modules)
    if not any(isinstance(item, str) for item in before):
        pairs = zip(before, after, strict=False)
        return len(before) == len(after) and all(same_settings(old, new, modules) for old, new in pairs)
    return json.dumps(renamed_settings(before, modules)) == json.dumps(after)


Entries = Sequence[tuple[str, Any]]  # a name or a pattern, and the value that it gives to modules


def _same_choice(before: Entries, after: Entries, modules: Modules) -> bool:
    plain = [[e for e in entries if not _is_open(e[0], modules) and not _touches(e[0], modules)]
             for entries in (before, after)]  # fmt: skip
    if json.dumps(plain[0]) != json.dumps(plain[1]):
        return False
    for search in (False, True):
        old, new = (_chooser(entries, modules, search) for entries in (before, after))
        pairs = ((name, other) for name, other in modules.renamed.items() if other is not None)
        if any(old(name) != new(other) for name, other in pairs):
            return False
        if any(old(name) != new(name) for name in modules.others):
            return False
    return True


def _chooser(entries: Entries, modules: Modules, search: bool) -> Callable[[str], list[str]]:
    """A function from a module's name to the values that its entries give, in their order."""
    named = {unwrapped(text): at for at, (text, _) in enumerate(entries) if _touches(text, modules)}
    patterns = [(at, _predicate(text, search)) for at, (text, _) in enumerate(entries) if _is_open(text, modules)]
    values = [json.dumps(value) for _, value in entries]

    def chosen(name: str) -> list[str]:
        hits = [at for at, matches in patterns if matches(name)]
        part = unwrapped(name)
        while part:
            if part in named:
                hits.append(named[part])
            part = part.rpartition(".")[0]
        return list(dict.fromkeys(values[at] for at in sorted(hits)))

    return chosen


def _predicate(text: str, search: bool) -> Callable[[str], object]:
    mark = next((mark for mark in MARKS if text.startswith(mark)), "")
    body = text.removeprefix(mark)
    if not _is_pattern(text):
        return lambda name: f".{body}." in f".{name}."
    if not mark and not re.search(r"[\\(|+^$){}]", body):
        return re.compile(fnmatch.translate(body)).match
    try:
        expression = compiled(body)
    except Endless:
        expression = None
    if expression is None:
        return lambda name: False
    return expression.search if search else expression.match


def _is_pattern(text: str) -> bool:
    return text.startswith(MARKS) or re.search(r"[*?\[\]\\(|+^$){}]", text) is not None


def _is_open(text: str, modules: Modules) -> bool:
    """Whether it is a pattern, or the end of a module's name from an expert's level on, and may name several."""
    if _is_pattern(text):
        return True
    for number in re.finditer(r"(?<![^._])\d+(?=\.|$)", text):
        before = unwrapped(text[: number.start()])
        if before.endswith(tuple(modules.levels)) and before not in modules.stems:
            return any(f".{stem}".endswith(f".{before}") for stem in modules.stems)
    return False


def _touches(text: str, modules: Modules) -> bool:
    return not _is_pattern(text) and (text in modules.renamed or unwrapped(text) in modules.renamed)


def _renamed(name: str, modules: Modules) -> str | None:
    if name in modules.renamed:
        return modules.renamed[name]
    bare = unwrapped(name)
    if bare not in modules.renamed:
        return name
    new = modules.renamed[bare]
    return None if new is None else name.removesuffix(bare) + new


def unwrapped(name: str) -> str:
    """The name from after its leading wrappers on."""
    while (head := name.split(".", 1)[0]) in WRAPPERS and head != name:
        name = name.split(".", 1)[1]
    return name

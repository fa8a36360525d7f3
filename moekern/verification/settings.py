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
HOW = ("match", "search")  # loaders' ways with regular expressions


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
    """Whether `after` is `before` with names replaced, also where they are patterns or parts of names: there each
    module must be chosen by what chose it before."""
    if isinstance(before, str) and isinstance(after, str) and names_experts(before, modules):
        return _same_choice([(before, None)], [(after, None)], modules)
    if isinstance(before, dict) and isinstance(after, dict):
        if any(_is_open(key, modules) for key in before):
            old = [(key, renamed_settings(value, modules)) for key, value in before.items()]
            return _same_choice(old, list(after.items()), modules)
        names = {key: _renamed(key, modules) for key in before}
        stay = [key for key in before if names[key] is not None]
        return [names[key] for key in stay] == list(after) and all(
            same_settings(before[key], new, modules) for key, new in zip(stay, after.values(), strict=True)
        )
    if not isinstance(before, list) or not isinstance(after, list):
        return json.dumps(before) == json.dumps(after)
    held = [[item for item in items if not isinstance(item, str)] for items in (before, after)]
    if len(held[0]) != len(held[1]) or not all(same_settings(a, b, modules) for a, b in zip(*held, strict=True)):
        return False
    texts = [[item for item in items if isinstance(item, str)] for items in (before, after)]
    if any(_is_open(text, modules) for text in texts[0]):
        old, new = ([(text, None) for text in found] for found in texts)
        return _same_choice(old, new, modules)
    return renamed_settings(texts[0], modules) == texts[1]


def names_experts(text: str, modules: Modules) -> bool:
    """Whether it is the name of something in an expert, or may name several."""
    return _is_open(text, modules) or _lies_inside(text, modules)


Entries = Sequence[tuple[str, Any]]  # a name or a pattern, and the value that it gives to modules


def _same_choice(before: Entries, after: Entries, modules: Modules) -> bool:
    """Whether plain names are replaced, what is not about experts stays, and modules are given the values that they
    were given before. Where patterns have become plain names, loaders may hold these against whole names only."""
    old, new = _Choice(before, modules), _Choice(after, modules)
    inside = ((text, value) for text, value in old.entries if _lies_inside(text, modules))
    moved = {(name, value) for text, value in inside if (name := _renamed(text, modules)) is not None}
    odd = {text for text, _ in after if _lies_inside(text, modules) and text not in modules.renamed}
    if not moved <= {*new.entries} or not odd <= {text for text, _ in moved} or old.elsewhere() != new.elsewhere():
        return False
    pairs = [(name, other) for name, other in modules.renamed.items() if other is not None]
    return all(
        any(old.made(name, how, exact) == new.made(other, how, exact) for exact in (False, True))
        for how in HOW
        for name, other in [*pairs, *((name, name) for name in modules.others)]
    )


class _Choice:
    """What a list of names and patterns says about a module."""

    def __init__(self, entries: Entries, modules: Modules) -> None:
        self.modules = modules
        self.entries = [(text, json.dumps(value)) for text, value in entries]
        self.texts, self.values = [text for text, _ in self.entries], [value for _, value in self.entries]
        self.named = {text: at for at, text in enumerate(self.texts) if _touches(text, modules)}
        self.bare = {unwrapped(text): at for text, at in self.named.items()}
        self.open = {at: _predicates(text) for at, text in enumerate(self.texts) if _is_open(text, modules)}

    def made(self, name: str, how: str, exact: bool) -> list[str]:
        """The values that the entries give to a module, in their order. exact: a plain name is that of one module, and
        not of what lies in it, or of one under other wrappers."""
        hits = {at for at, matches in self.open.items() if matches[how](name)}
        if exact and name in self.named:
            hits.add(self.named[name])
        part = "" if exact else unwrapped(name)
        while part:
            if part in self.bare:
                hits.add(self.bare[part])
            part = part.rpartition(".")[0]
        return list(dict.fromkeys(self.values[at] for at in sorted(hits)))

    def elsewhere(self) -> list[tuple[str, str]]:
        """The entries that name or choose nothing in experts, which must stay as they are."""
        names = self.modules.renamed
        within = {at for at, text in enumerate(self.texts) if _lies_inside(text, self.modules)}
        within |= {at for at, m in self.open.items() if any(m["search"](name) or m["match"](name) for name in names)}
        return [entry for at, entry in enumerate(self.entries) if at not in within]


def _predicates(text: str) -> dict[str, Callable[[str], object]]:
    """Whether a name is chosen, where loaders match an expression from the name's beginning, and where they search."""
    mark = next((mark for mark in MARKS if text.startswith(mark)), "")
    body = text.removeprefix(mark)
    if not _is_pattern(text):
        return dict.fromkeys(HOW, lambda name: f".{body}." in f".{name}.")
    if not mark and not re.search(r"[\\(|+^$){}]", body):
        return dict.fromkeys(HOW, re.compile(fnmatch.translate(body)).match)
    try:
        expression = compiled(body)
    except Endless:
        expression = None
    if expression is None:
        return dict.fromkeys(HOW, lambda name: False)
    return {"match": expression.match, "search": expression.search}


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
    """The name in the pruned model of what lies in an expert, however deep; None where the expert is dropped."""
    head = _head(name, modules)
    if not head:
        return name
    bare = unwrapped(head)
    new = modules.renamed[bare]
    return None if new is None else f"{name[: len(head) - len(bare)]}{new}{name[len(head) :]}"


def _lies_inside(name: str, modules: Modules) -> bool:
    """Whether it is the whole name of something in an expert."""
    return not _is_pattern(name) and bool(_head(name, modules))


def _head(name: str, modules: Modules) -> str:
    """The longest beginning of a name that names a module in an expert."""
    while name and unwrapped(name) not in modules.renamed:
        name = name.rpartition(".")[0]
    return name


def unwrapped(name: str) -> str:
    """The name from after its leading wrappers on."""
    while (head := name.split(".", 1)[0]) in WRAPPERS and head != name:
        name = name.split(".", 1)[1]
    return name

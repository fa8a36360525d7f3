"""Names of modules inside numbered experts, before and after pruning, as settings of quantisers write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from moekern.architectures import Layout, MoeLayer
from moekern.checkpoint.strict_json import shown
from moekern.errors import InputError
from moekern.pruning.patterns import Ambiguous, ExpertModules, is_pattern, picks_any, rewritten

WRAPPERS = ("model", "language_model", "text_model")
STACKED = re.compile(r".*(?:^|\.)experts\.")
# Modules of experts that the checkpoint holds in one stack, as loaders name them that take the stack apart.
UNSTACKED = ("", ".gate_proj", ".up_proj", ".down_proj", ".gate_up_proj", ".w1", ".w2", ".w3")
NUMBER = re.compile(r"(?<![^._])\d+(?=\.|$)")
NAME = re.compile(r"[\w.-]+")
NUMBERED = re.compile(r"experts?(?:[./\[(\\{]+|_)\d", re.IGNORECASE)  # by the look of it the name of an expert


class Renamer:
    """From a name, or a pattern of names, to those that mean the same modules in the pruned model.

    `source` is the file whose strings these are. Wrapper names ("model.", "language_model.") may differ from the tensor
    keys', as those of loaded models do.
    """

    def __init__(
        self, source: str, tensors: Iterable[str], layout: Layout, kept: Mapping[str, Sequence[int]], *, drop_mtp: bool
    ) -> None:
        self.source = source
        self.tensors = tensors
        self.modules = expert_modules(layout, kept, drop_mtp=drop_mtp)
        self.by_suffix: dict[str, list[ExpertModules]] = {}
        for modules in self.modules:
            parts = modules.bare.split(".")
            for start in range(len(parts) - 1):
                self.by_suffix.setdefault(".".join(parts[start:]), []).append(modules)
        self.rewritten: dict[str, tuple[str, ...]] = {}  # patterns that had to change
        self.unknown: dict[str, None] = {}  # what looks like names of experts, none of which the checkpoint holds

    def __call__(self, text: str) -> tuple[str, ...]:
        """The strings to stand in the place of `text`: itself, a new name, none, or several. Raises InputError."""
        if not is_pattern(text):
            return self._renumbered(text)
        try:
            new = rewritten(text, self.modules, self._others)
            if new == (text,) and NUMBERED.search(text) and not picks_any(text, self.modules):
                self.unknown[text] = None
        except Ambiguous as why:
            what = f"{shown(text)} names experts by number, and {why}"
            raise InputError(f"{self.source}: {what}; write the names of the modules in its place") from None
        if new != (text,):
            self.rewritten[text] = new
        return new

    def only(self, text: str) -> str:
        """The string in the place of one that stands alone, not in a list. Raises InputError."""
        new = self(text)
        if len(new) != 1:
            what = f"several names are needed in its place ({shown(new[0])}, ...)" if new else "none of these stay"
            raise InputError(
                f"{self.source}: {shown(text)} names experts, and {what}; make it a list of names, or take it out"
            )
        return new[0]

    def notes(self, name: str) -> Iterator[str]:
        """What was done to patterns in the file `name`, and what stays though it looks like the name of an expert."""
        if self.rewritten:
            yield f"{name}: what names experts by number was written anew: {_first_of(self.rewritten)}"
        if self.unknown:
            yield f"{name}: names experts that the checkpoint does not hold; left as it is: {_first_of(self.unknown)}"

    def _renumbered(self, name: str) -> tuple[str, ...]:
        if not NAME.fullmatch(name):
            parts = re.split(r"[,;\s]+", name.strip())
            if all("." in part for part in parts) and any(self._known(part) for part in parts):
                raise InputError(f"{self.source}: {shown(name)} names several modules; make it a list of names")
            if NUMBERED.search(name):
                self.unknown[name] = None
            return (name,)
        for number, modules in self._found(name):
            expert, tail = int(number[0]), name[number.end() :]
            new = {m.rank.get(expert) for m in modules}
            if new == {None}:
                return ()
            if len(new) == 1:
                return (f"{name[: number.start()]}{new.pop()}{tail}",)
            return tuple(f"{m.stem}{m.rank[expert]}{tail}" for m in modules if expert in m.rank)
        if NUMBERED.search(name):
            self.unknown[name] = None
        return (name,)

    def _known(self, name: str) -> bool:
        """Whether it is a plain name of something in an expert."""
        return NAME.fullmatch(name) is not None and any(True for _ in self._found(name))

    def _found(self, name: str) -> Iterator[tuple[re.Match[str], list[ExpertModules]]]:
        """Numbers in a name that may be an expert's, and the layers that it may be of: all those that it fits, where it
        is the end of a module's name."""
        for number in NUMBER.finditer(name):
            stem, tail = name[: number.start()], name[number.end() :]
            bare = _bare(stem)
            near = [m for m in self.by_suffix.get(bare, ()) if int(number[0]) in m.numbers]
            if modules := [m for m in near if m.bare == bare or (stem == bare and tail in m.tails)]:
                yield number, modules

    @cached_property
    def _others(self) -> tuple[str, ...]:
        """Names of all modules that lie in no numbered expert."""
        holders = set()
        for name in self.tensors:
            inside = next((stem for stem in _stems_of(name) if stem in self._stem_set), None)
            parts = (inside or name).rstrip(".").split(".")
            stop = len(parts) + 1 if inside else len(parts)
            holders |= {".".join(parts[:end]) for end in range(1, stop)}
        return tuple(sorted(holders - {stem.rstrip(".") for stem in self._stem_set if not stem.endswith(".")}))

    @cached_property
    def _stem_set(self) -> frozenset[str]:
        return frozenset(m.stem for m in self.modules)


def _first_of(texts: Mapping[str, object]) -> str:
    first, *others = texts
    return f"{shown(first)}{f' and {len(others)} more' if others else ''}"


def expert_modules(layout: Layout, kept: Mapping[str, Sequence[int]], *, drop_mtp: bool) -> tuple[ExpertModules, ...]:
    """Of every layer with numbered experts; where a layer is not cut, its experts keep their numbers."""
    found = []
    for key, layer in {**layout.layers, **layout.mtp}.items():
        tails: dict[str, set[str]] = {}
        numbers: dict[str, set[int]] = {}
        for tensor in layer.tensors:
            if tensor.action == "drop" and tensor.expert is not None:
                stem, _, rest = tensor.template.partition("{}")
                parts = rest.split(".")
                tails.setdefault(stem, set()).update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
                numbers.setdefault(stem, set()).add(tensor.expert)
            elif tensor.role == "expert" and (stacked := STACKED.match(tensor.name)):
                tails.setdefault(stacked[0], set()).update(UNSTACKED)
                numbers.setdefault(stacked[0], set()).update(range(layer.num_experts))
        for stem, experts in numbers.items():
            stays = [*sorted(kept[key]), *_past_the_routed(layer)] if key in kept else sorted(experts)
            rank = {} if drop_mtp and key in layout.mtp else {old: new for new, old in enumerate(stays)}
            found.append(ExpertModules(stem, _bare(stem), frozenset(experts), rank, tuple(sorted(tails[stem]))))
    return tuple(found)


def _past_the_routed(layer: MoeLayer) -> list[int]:
    """Numbers of experts that are never routed by weight (LongCat's zero experts) and so never dropped."""
    return sorted({t.expert for t in layer.tensors if t.expert is not None and t.expert >= layer.num_experts})


def _stems_of(name: str) -> Iterable[str]:
    return (name[: number.start()] for number in NUMBER.finditer(name))


def _bare(stem: str) -> str:
    return ".".join(part for part in stem.split(".") if part not in WRAPPERS)

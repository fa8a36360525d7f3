"""Patterns over module names (regular expressions, wildcards) that name experts by number, written anew.

What a pattern means is what it matches: it is tried on the names of all experts' modules, and stays as it is where it
matches the right ones of the pruned model too.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from moekern.checkpoint.expressions import Endless, compiled

MARKS = ("re:", "+:", "-:")  # of a regular expression: compressed-tensors and others; GPTQModel's two
REGEX_ONLY = re.compile(r"[\\(|+^$){}]")
# Letters, dots between letters, escaped dots, ".*" and groups: no part of such a pattern tells one number from another.
BLIND = re.compile(r"(?:\.\*|\\\.|(?<=[A-Za-z_])\.(?=[A-Za-z_])|[A-Za-z_$^|()-]|\(\?:)*")
BLIND_WILDCARD = re.compile(r"[A-Za-z_.*-]*")
Matches = Callable[[str], object]


class Ambiguous(Exception):
    """Why a pattern cannot be written anew."""


@dataclass(frozen=True)
class ExpertModules:
    """The modules below one layer's numbered experts: stem + number + tail."""

    stem: str  # as the tensors' keys have it, up to the number
    bare: str  # without the names of wrappers ("model.", "language_model.")
    numbers: frozenset[int]
    rank: Mapping[int, int]  # number -> number in the pruned model, of the experts that stay
    tails: tuple[str, ...]  # "", ".down_proj", ".down_proj.weight", ...

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What may stand before `bare`: what the keys have, nothing, and the wrappers of models with other parts."""
        own = self.stem.removesuffix(self.bare) if self.stem.endswith(self.bare) else ""
        more = ("model.language_model.", "language_model.model.") if "language_model" in own else ()
        return tuple(dict.fromkeys((own, "", *more)))

    @cached_property
    def new(self) -> frozenset[int]:
        return frozenset(self.rank.values())


Picked = dict[tuple[int, str, str], frozenset[int]]  # position of the modules, prefix, tail -> numbers that match


def is_pattern(text: str) -> bool:
    return text.startswith(MARKS) or bool(re.search(r"[*?\[\]\\(|+^$){}]", text))


def rewritten(text: str, modules: Sequence[ExpertModules], others: Iterable[str] | None) -> tuple[str, ...]:
    """The patterns that match in the pruned model what `text` matches in the original; (text,) where it does itself.

    others: names of the modules outside of experts. Raises Ambiguous.
    """
    mark, body, wildcard = _parts(text)
    if (BLIND_WILDCARD if wildcard else BLIND).fullmatch(body):
        return (text,)
    readings = [picked(matches, modules) for matches in _readings(body, wildcard)]
    found = [reading for reading in readings if reading]
    if all(_stands(reading, modules) for reading in found):
        return (text,)
    if len(found) < len(readings) or any(reading != found[0] for reading in found):
        raise Ambiguous("what it matches depends on whether a name is searched or matched from its beginning")
    wanted = _wanted(found[0], modules)
    outside = tuple(others or ())
    if any(matches(name) for matches in _readings(body, wildcard) for name in outside):
        raise Ambiguous("it matches modules outside of experts too")
    new = _written(wanted, modules, wildcard)
    _check(new, wanted, modules, outside, wildcard)
    return tuple(f"{mark}{pattern}" for patterns in new.values() for pattern in patterns)


def _parts(text: str) -> tuple[str, str, bool]:
    """A pattern's mark, what stands behind it, and whether that is a wildcard."""
    mark = next((mark for mark in MARKS if text.startswith(mark)), "")
    body = text.removeprefix(mark)
    return mark, body, not mark and not REGEX_ONLY.search(body)


def _readings(body: str, wildcard: bool) -> list[Matches]:
    """What loaders may take a pattern for: a wildcard over whole names, else an expression that is matched from the
    beginning, or searched."""
    if wildcard:
        return [re.compile(fnmatch.translate(body)).match]
    try:
        expression = compiled(body)
    except Endless:
        raise Ambiguous("its repeats may take forever") from None
    return [] if expression is None else [expression.match, expression.search]


def picks_any(text: str, modules: Sequence[ExpertModules]) -> bool:
    """Whether a pattern that `rewritten` has taken matches anything in numbered experts."""
    _, body, wildcard = _parts(text)
    return any(picked(matches, modules) for matches in _readings(body, wildcard))


def picked(matches: Matches, modules: Sequence[ExpertModules]) -> Picked:
    found: Picked = {}
    for position, m in enumerate(modules):
        for prefix in m.prefixes:
            stem = f"{prefix}{m.bare}"
            for tail in m.tails:
                numbers = frozenset(n for n in m.numbers if matches(f"{stem}{n}{tail}"))
                if numbers:
                    found[position, prefix, tail] = numbers
    return found


def _wanted(found: Picked, modules: Sequence[ExpertModules]) -> Picked:
    """The same in the new numbers."""
    return {
        key: frozenset(modules[key[0]].rank[n] for n in numbers if n in modules[key[0]].rank)
        for key, numbers in found.items()
    }


def _stands(found: Picked, modules: Sequence[ExpertModules]) -> bool:
    """Whether the pattern picks the right modules of the pruned model as it is."""
    wanted = _wanted(found, modules)
    return all(numbers & modules[key[0]].new == wanted[key] for key, numbers in found.items())


def _written(wanted: Picked, modules: Sequence[ExpertModules], wildcard: bool) -> dict[int, tuple[str, ...]]:
    """Position of the modules -> its patterns, one for each set of numbers."""
    groups: dict[int, dict[frozenset[int], dict[str, set[str]]]] = {}
    for (position, prefix, tail), numbers in wanted.items():
        if numbers:
            groups.setdefault(position, {}).setdefault(numbers, {}).setdefault(tail, set()).add(prefix)
    new = {}
    write = _wildcards if wildcard else _expressions
    for position, sets in groups.items():
        patterns: list[str] = []
        for numbers, tails in sets.items():
            by_prefixes: dict[frozenset[str], list[str]] = {}
            for tail, found in tails.items():
                by_prefixes.setdefault(frozenset(found), []).append(tail)
            for prefixes, ends in by_prefixes.items():
                heads = [] if _anywhere(modules, position, prefixes) else sorted(prefixes)
                patterns += write(modules[position], heads, sorted(numbers), ends)
        new[position] = tuple(patterns)
    return new


def _anywhere(modules: Sequence[ExpertModules], position: int, prefixes: frozenset[str]) -> bool:
    """Whether anything may stand before the bare name: all prefixes match, and no other name ends in this one."""
    m = modules[position]
    return prefixes == frozenset(m.prefixes) and not any(o is not m and o.bare.endswith(m.bare) for o in modules)


def _expressions(m: ExpertModules, heads: Sequence[str], numbers: Sequence[int], ends: Sequence[str]) -> Iterator[str]:
    """heads: what may stand before the bare name; where there are none, anything may."""
    head = f"^{_either(heads)}" if heads else r"(?:.*\.)?"
    if set(ends) == set(m.tails):
        tail = r"(?:\..*)?$"
    elif set(ends) == set(m.tails) - {""}:
        tail = r"\..*"
    else:
        tail = f"{_either(ends)}$"
    yield f"{head}{_escaped(m.bare)}{_either(map(str, numbers))}{tail}"


def _wildcards(m: ExpertModules, heads: Sequence[str], numbers: Sequence[int], ends: Sequence[str]) -> Iterator[str]:
    """heads: as above."""
    tails = [*([""] if "" in ends else []), ".*"] if set(ends) >= set(m.tails) - {""} else ends
    yield from (f"{head}{m.bare}{number}{tail}" for head in heads or ["*"] for number in numbers for tail in tails)


def _either(texts: Iterable[str]) -> str:
    parts = [_escaped(text) for text in texts]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _escaped(text: str) -> str:
    return re.sub(r"[^\w-]", r"\\\g<0>", text)


def _check(
    new: Mapping[int, Sequence[str]],
    wanted: Picked,
    modules: Sequence[ExpertModules],
    others: Sequence[str],
    wildcard: bool,
) -> None:
    """The new patterns must match what is wanted and nothing else, however they are read. A layer's patterns hold its
    bare name: they are tried on the layers whose names end in it, and outside."""
    for position, patterns in new.items():
        m = modules[position]
        near = [i for i, other in enumerate(modules) if other.bare.endswith(m.bare)]
        readings = zip(*(_readings(pattern, wildcard) for pattern in patterns), strict=True)
        for reading in readings:
            hits = picked(_any_of(reading), [modules[i] for i in near])
            got = {(near[i], prefix, tail): n & modules[near[i]].new for (i, prefix, tail), n in hits.items()}
            want = {key: numbers for key, numbers in wanted.items() if key[0] == position}
            right = {k: v for k, v in got.items() if v} == {k: v for k, v in want.items() if v}
            if not right or any(map(_any_of(reading), others)):
                raise Ambiguous("no pattern was found that means the same in the pruned model")


def _any_of(readings: Sequence[Matches]) -> Matches:
    return lambda name: any(matches(name) for matches in readings)

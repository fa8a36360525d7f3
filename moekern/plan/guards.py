"""Experts that stay or go whatever their score: by hand, by extreme outputs, and by what sets domains apart."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moekern.errors import InputError
from moekern.layer_keys import natural
from moekern.plan.choose import super_experts
from moekern.router import check_keep, parse_keep
from moekern.statistics.file import Statistics

DISTINCTIVE = 10  # experts that --guard and --suppress name unless told otherwise, as many as MoTE switches off

Experts = Mapping[str, tuple[int, ...]]  # layer key -> expert numbers, rising


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One class of domains, and how many of the experts that distinguish it from the others are meant."""

    domains: tuple[str, ...]
    count: int = DISTINCTIVE


@dataclass(frozen=True, slots=True)
class Guards:
    """What a person asks for, above what scores say.

    protect_super: keep experts whose outputs are extreme. keep_always, drop_first: layer key -> expert numbers, rising.
    guard, suppress: classes of domains with the number of their most distinctive experts that stay, or go first.
    domain_floor: domain (or "" for all) -> the share in (0, 1] of its mass (gate x norm) that every layer keeps.
    """

    protect_super: bool = False
    keep_always: Experts = field(default_factory=dict)
    drop_first: Experts = field(default_factory=dict)
    guard: tuple[Behaviour, ...] = ()
    suppress: tuple[Behaviour, ...] = ()
    domain_floor: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Marks:
    """What the guards come to: experts kept in any case, experts dropped before all others, and why."""

    kept: Mapping[str, frozenset[int]]
    drop_first: Mapping[str, frozenset[int]]
    provenance: Mapping[str, Any]


def parse_experts(flag: str, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """ "3:17" and "3:17,40" name experts of layer 3; repeated layers are united. Raises InputError."""
    found: dict[str, set[int]] = {}
    for text in texts:
        key, _, numbers = text.rpartition(":")
        parts = numbers.split(",")
        if not key or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
            raise InputError(f"{flag} {text}: expected LAYER:EXPERT[,EXPERT], such as 3:17 or 3:17,40")
        found.setdefault(key, set()).update(map(int, parts))
    return {key: tuple(sorted(experts)) for key, experts in found.items()}


def parse_behaviours(flag: str, texts: Sequence[str]) -> tuple[Behaviour, ...]:
    """ "code" and "code=20" name the experts that distinguish a domain, "code,maths=20" those of two together."""
    found = []
    for text in texts:
        names, equals, number = text.rpartition("=") if "=" in text else (text, "", "")
        if equals and not (number.isascii() and number.isdecimal() and int(number[:9]) > 0 and len(number) < 10):
            raise InputError(f"{flag} {text}: expected DOMAIN or DOMAIN=COUNT, such as refusal=10")
        domains = tuple(dict.fromkeys(names.split(",")))
        found.append(Behaviour(domains, int(number)) if equals else Behaviour(domains))
    return tuple(found)


def parse_floors(texts: Sequence[str]) -> dict[str, float]:
    """ "0.8" is a floor for every domain, "code=0.9" for one. Raises InputError."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, share = text.rpartition("=")
        value = parse_keep(share, "--domain-floor")
        if isinstance(value, int):
            raise InputError(f"--domain-floor {text}: expected a share such as 0.8 or 80%")
        if name in found:
            raise InputError(f"--domain-floor {text}: {name or 'all domains'} has a floor already")
        found[name] = value
    return found


def marks(statistics: Statistics, guards: Guards, domains: Sequence[str] | None = None) -> Marks:
    """Resolve the guards on a model's statistics; super experts are looked for in `domains` (None: all).

    Raises InputError for a layer, expert or domain that is not there, and for an expert that is to be kept and dropped.
    """
    kept: dict[str, set[int]] = {key: set() for key in statistics.layers}
    drop_first: dict[str, set[int]] = {key: set() for key in statistics.layers}
    provenance: dict[str, Any] = {}

    def mark(name: str, into: dict[str, set[int]], experts: Experts) -> dict[str, list[int]]:
        for key, numbers in experts.items():
            _check_place(f"--{name.replace('_', '-')}", statistics, key, numbers)
            into[key].update(numbers)
        return {key: list(numbers) for key, numbers in experts.items() if numbers}

    if guards.protect_super:
        largest = {key: statistics.layer(key, domains, ()).max_abs.tolist() for key in _ordered(statistics)}
        provenance["protect_super"] = mark("protect_super", kept, super_experts(largest))
    for name, into, given in (("keep_always", kept, guards.keep_always), ("drop_first", drop_first, guards.drop_first)):
        if given:
            provenance[name] = mark(name, into, given)
    for name, into, behaviours in (("guard", kept, guards.guard), ("suppress", drop_first, guards.suppress)):
        for behaviour in behaviours:
            experts = mark(name, into, distinctive(statistics, behaviour, f"--{name}"))
            entry = {"domains": list(behaviour.domains), "count": behaviour.count, "experts": experts}
            provenance.setdefault(name, []).append(entry)
    if guards.domain_floor:
        provenance["domain_floor"] = {name or "all": share for name, share in guards.domain_floor.items()}
    for key in statistics.layers:
        both = sorted(kept[key] & drop_first[key])
        if both:
            raise InputError(
                f"layer {key}: expert {both[0]} is to be kept in any case (--protect-super, --keep-always, --guard) "
                "and dropped first (--drop-first, --suppress); take one of them back or name fewer experts"
            )
    return Marks(
        {key: frozenset(experts) for key, experts in kept.items()},
        {key: frozenset(experts) for key, experts in drop_first.items()},
        provenance,
    )


def contrast(
    statistics: Statistics, domains: Sequence[str], flag: str = "--guard", against: Sequence[str] = ()
) -> dict[str, list[float]]:
    """How much more often a token of `domains` uses an expert than one of the others, or of `against`: layer -> [E].

    MoTE's differential map (fTRI, arXiv:2502.11096): mean activations of one class minus those of the rest. An
    activation is a routed slot; the mean is over all the tokens of the class, where the paper takes prompts one by one.
    Raises InputError for an unknown domain, one on both sides, and where either side has no tokens.
    """
    for name, of in (*((name, flag) for name in domains), *((name, "--against") for name in against)):
        if name not in statistics.domains:
            raise InputError(f"{of} {name}: no such domain; the statistics hold {', '.join(statistics.domains)}")
        if of == "--against" and name in domains:
            raise InputError(f"{of} {name}: is what {flag} names too: a domain stands on one side")
    rest = list(against) or [name for name in statistics.domains if name not in domains]
    if not rest:
        raise InputError(f"{flag} {','.join(domains)}: no domain is left to compare with; calibrate with several")
    found = {}
    for key in _ordered(statistics):
        mine, theirs = statistics.layer(key, domains, ()), statistics.layer(key, rest, ())
        for sums, names in ((mine, domains), (theirs, rest)):
            if not int(sums.tokens):
                raise InputError(f"{flag} {','.join(domains)}: layer {key} has no tokens of {', '.join(names)}")
        found[key] = (mine.count.double() / mine.tokens - theirs.count.double() / theirs.tokens).tolist()
    return found


def distinctive(statistics: Statistics, behaviour: Behaviour, flag: str = "--guard") -> dict[str, tuple[int, ...]]:
    """The experts of all layers that a class of domains uses most above the others; ties go to the earlier layer and
    the lower number, and experts that it does not use more are left out."""
    return by_layer(ranked(contrast(statistics, behaviour.domains, flag))[: behaviour.count])


def ranked(differences: Mapping[str, Sequence[float]]) -> list[tuple[str, int]]:
    """Layer and number of each expert whose difference is above 0, the largest first; ties go to the earlier layer and
    the lower number."""
    order = sorted(
        (-value, n, e, key)
        for n, (key, row) in enumerate(differences.items())
        for e, value in enumerate(row)
        if value > 0
    )
    return [(key, e) for _, _, e, key in order]


def by_layer(experts: Sequence[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    """Layer, first to last, -> numbers, rising."""
    keys = sorted({key for key, _ in experts}, key=natural)
    return {key: tuple(sorted(e for other, e in experts if other == key)) for key in keys}


def domain_masses(
    statistics: Statistics, key: str, floors: Mapping[str, float]
) -> dict[str, tuple[float, list[float]]]:
    """Domain -> (its floor, each expert's share of the domain's mass [E]), of the domains that have a floor.

    Mass is the sum of gate x norm, no less than 0. Domains without tokens in this layer are left out.
    """
    for name in floors:
        if name and name not in statistics.domains:
            raise InputError(f"--domain-floor {name}: no such domain; there are {', '.join(statistics.domains)}")
    found = {}
    for name in statistics.domains:
        floor = floors.get(name, floors.get(""))
        if floor is None:
            continue
        mass = statistics.layer(key, [name], ()).gated_norm_sum.clamp(min=0)
        total = float(mass.sum())
        if total > 0:
            check_keep(floor, "--domain-floor")
            found[name] = floor, (mass / total).tolist()
    return found


def with_floors(
    choose: Callable[[Collection[int]], tuple[int, ...]],
    masses: Mapping[str, tuple[float, Sequence[float]]],
    protected: Collection[int],
    drop_first: Collection[int],
    quota: int,
    group_size: int,
    where: str,
) -> frozenset[int]:
    """The experts to protect so that choose(protected) leaves every domain its floor; `protected` are among them.

    While a domain is below its floor, the one that lacks most gets its largest expert that is not protected yet, in a
    group with a place for it (`quota` each). Greedy: it may miss a set that would do. Raises InputError when the places
    are used up.
    """
    held = frozenset(protected)
    while True:
        kept = frozenset(choose(held))
        lacks = {name: floor - sum(shares[e] for e in kept) for name, (floor, shares) in masses.items()}
        worst = max(lacks, key=lambda name: lacks[name], default=None)
        if worst is None or lacks[worst] <= 1e-12:  # rounding of a sum of shares
            return held
        floor, shares = masses[worst]
        open_ = [
            e
            for e, share in enumerate(shares)
            if share > 0 and e not in held and e not in drop_first and _in_group(held, e, group_size) < quota
        ]
        if not open_:
            raise InputError(
                f"--domain-floor: {where}: {worst} keeps {floor - lacks[worst]:.3f} of its mass, not {floor:g}, with "
                f"{len(kept)} experts; keep more experts or lower the floor"
            )
        held |= {min(open_, key=lambda e: (-shares[e], e))}


def _ordered(statistics: Statistics) -> list[str]:
    """The model's layers from first to last."""
    return sorted(statistics.layers, key=natural)


def _in_group(experts: Collection[int], expert: int, size: int) -> int:
    return sum(e // size == expert // size for e in experts)


def _check_place(flag: str, statistics: Statistics, key: str, experts: Sequence[int]) -> None:
    if key not in statistics.layers:
        raise InputError(f"{flag} {key}: no such layer; the statistics hold {', '.join(statistics.layers)}")
    size = statistics.num_experts(key)
    for e in experts:
        if e >= size:
            raise InputError(f"{flag} {key}:{e}: the layer has experts 0 to {size - 1}")

"""Which text, as a person writes it: NAME=SOURCE:AMOUNT, mixes of data sets, and mixes that have names.

It needs no torch: what is wrong with --data is known before that is imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moekern.data.readers import COMPRESSED, FORMATS, plain_suffix
from moekern.errors import InputError

DEFAULT_DOMAIN = "text"
# Data sets of the hub with about equal shares of --tokens. code: the six that published REAP models were calibrated on.
PRESETS = {
    "code": (
        "theblackcat102/evol-codealpaca-v1,Salesforce/xlam-function-calling-60k,"
        "open-r1/Mixture-of-Thoughts[code],open-r1/Mixture-of-Thoughts[math],open-r1/Mixture-of-Thoughts[science],"
        "SWE-bench/SWE-smith-trajectories(tool)"
    ),
    "general": "mlabonne/open-perfectblend,HuggingFaceH4/ultrachat_200k(train_sft),allenai/c4[en]",
    "reasoning": (
        "open-r1/Mixture-of-Thoughts[code],open-r1/Mixture-of-Thoughts[math],open-r1/Mixture-of-Thoughts[science]"
    ),
}
_AMOUNT = re.compile(r"(?P<source>.+):(?P<number>\d{1,15}(?:\.\d+)?|\.\d+)(?P<unit>[kKmM%]?)")
_AMOUNTS = "an amount is a number of sequences (4096), of tokens with a unit (200k, 2M), or a share (0.5, 50%)"
_HUB = re.compile(r"(?P<path>[^\[\]()]+?)(?:\[(?P<subset>[^\[\]]+)\])?(?:\((?P<split>[^()]+)\))?")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Amount:
    """How much of a domain: a number of tokens or of sequences, or a share of --tokens. At most one is given."""

    tokens: int | None = None
    sequences: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class Domain:
    """Text under one name: a file or folder, or a data set of the hub with its subset and split."""

    name: str
    path: str
    amount: Amount = Amount()
    on_hub: bool = False
    subset: str | None = None
    split: str | None = None

    @property
    def shown(self) -> str:
        """The source without the folders it lies in."""
        if not self.on_hub:
            return Path(self.path).name
        path = self.path if _HUB_ID.fullmatch(self.path) else Path(self.path).name
        return path + (f"[{self.subset}]" if self.subset else "") + (f"({self.split})" if self.split else "")


def parse_tokens(text: str) -> int | None:
    """ "500k" is 500,000 tokens, "2M" 2,000,000, "all" None. Raises InputError."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)([kKmM]?)", text.strip())
    if text.strip() == "all":
        return None
    if not found or ("." in found[1] and not found[2]):
        raise InputError(f"--tokens {text:.80}: expected a number such as 500000, 500k or 2M, or all")
    return round(float(found[1]) * _times(found[2])) if "." in found[1] else int(found[1]) * _times(found[2])


def _times(unit: str) -> int:
    return {"": 1, "k": 1_000, "m": 1_000_000}[unit.lower()]


def domains_of(specs: Sequence[str]) -> list[Domain]:
    """The domains that --data names. Raises InputError for what is not there, or is named twice."""
    found = [domain for spec in specs for domain in _domains(spec)]
    if not found:
        raise InputError("--data: expected at least one NAME=PATH, or a --preset")
    if len(found) == 1 and not found[0].on_hub and "=" not in specs[0]:
        found = [replace(found[0], name=DEFAULT_DOMAIN)]
    names = [domain.name for domain in found]
    for domain in found:
        if not domain.name.isprintable():
            raise InputError(f"--data {domain.path}: expected NAME=PATH with a plain name")
        if names.count(domain.name) > 1:
            raise InputError(
                f"--data {domain.shown}: the domain {domain.name!r} is named twice; put both into one folder"
            )
    return found


def _domains(spec: str) -> list[Domain]:
    name, equals, rest = spec.partition("=")
    source = rest if equals else spec
    if not source:
        raise InputError(f"--data {spec}: no path is given; expected NAME=PATH")
    if equals and (not name or "/" in name):
        raise InputError(f"--data {spec}: expected NAME=PATH with a plain name")
    try:
        domain = _local(source, spec)
    except OSError as error:
        raise InputError(f"--data {spec}: {error.strerror}") from error
    if domain is None and "," in source:
        return [each for part in spec.split(",") if part.strip() for each in _domains(part.strip())]
    domain = domain or _hub(source, spec)
    return [replace(domain, name=name) if equals else domain]


def _local(source: str, spec: str) -> Domain | None:
    """A file or a folder that is there; a name that is one as it stands is never taken apart."""
    for path, amount in [(source, Amount()), *_taken_apart(source, spec)]:
        if Path(path).exists():
            stem = Path(path).stem if Path(path).suffix.lower() in COMPRESSED else Path(path).name
            return Domain(Path(stem).stem or DEFAULT_DOMAIN, path, amount)
    return None


def _taken_apart(source: str, spec: str) -> list[tuple[str, Amount]]:
    found = _AMOUNT.fullmatch(source)
    if not found:
        return []
    number, unit = found["number"], found["unit"]
    if unit == "%" or (not unit and "." in number):
        share = float(number) / (100 if unit else 1)
        if not 0 < share <= 1:
            raise InputError(f"--data {spec}: a share of --tokens is more than 0 and at most 1")
        return [(found["source"], Amount(share=share))]
    if not unit:
        return [(found["source"], Amount(sequences=int(number)))]
    return [(found["source"], Amount(tokens=parse_tokens(number + unit)))]


def _hub(source: str, spec: str) -> Domain:
    path, amount = next(iter(_taken_apart(source, spec)), (source, Amount()))
    found = _HUB.fullmatch(path)
    named = bool(found and (found["subset"] or found["split"]))
    there = Path(found["path"]).is_dir() if found and named else False
    a_file = plain_suffix(Path(path)) in FORMATS or Path(path).parent.is_dir() and Path(path).parent != Path(".")
    if not found or not (there or (_HUB_ID.fullmatch(found["path"]) and not a_file)):
        before, _, amount_text = path.rpartition(":")
        if before and (Path(before).exists() or _is_hub(before)):
            raise InputError(f"--data {spec}: {amount_text!r:.40} is no amount of {before}: {_AMOUNTS}")
        raise InputError(f"--data {spec}: no such file or folder: {path}")
    name = "-".join(word for word in (Path(found["path"]).name, found["subset"], found["split"]) if word)
    return Domain(name, found["path"], amount, True, found["subset"], found["split"])


def _is_hub(path: str) -> bool:
    found = _HUB.fullmatch(path)
    return bool(found and _HUB_ID.fullmatch(found["path"]))


def budgets(domains: Sequence[Domain], tokens: int | None, sequence_length: int) -> list[int | None]:
    """Tokens of each domain, None for all of it.

    A domain that names a number has so many; the others have the shares of `tokens` that they name, or evenly what
    these leave. Raises InputError for fewer than 2 tokens, for shares beyond 1 or shares of everything.
    """
    shares = [domain.amount.share for domain in domains if domain.amount.share is not None]
    if sum(shares) > 1 + 1e-9:
        raise InputError(f"--data: the shares of --tokens add up to {sum(shares):g}, more than 1")
    if shares and tokens is None:
        raise InputError("--data: a share is of --tokens; give a number of them")
    fixed = {domain.name: _fixed(domain.amount, tokens, sequence_length) for domain in domains}
    open_ = [domain.name for domain in domains if domain.amount == Amount()]
    left = None if tokens is None else tokens - sum(_fixed(d.amount, tokens, 0) or 0 for d in domains if d.amount.share)
    for n, name in enumerate(open_):
        fixed[name] = None if left is None else left // len(open_) + (n < left % len(open_))
    for domain in domains:
        budget = fixed[domain.name]
        if budget is not None and budget < 2:
            if domain.amount.tokens is None and domain.amount.sequences is None:
                raise InputError(f"--tokens {tokens}: expected at least 2 for each of {len(domains)} domains")
            raise InputError(f"--data {domain.name}: expected at least 2 tokens")
    return [fixed[domain.name] for domain in domains]


def _fixed(amount: Amount, tokens: int | None, sequence_length: int) -> int | None:
    if amount.sequences is not None:
        return amount.sequences * sequence_length
    if amount.share is not None:
        return int(amount.share * (tokens or 0) + 1e-6)
    return amount.tokens

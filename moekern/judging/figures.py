"""What continuations of prompts tell of a model: figures of each, their means, and how sure differences are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, sqrt
from typing import NamedTuple

from moekern.evaluation.losses import NORMAL, ORIGINAL, Difference, student

WINDOW, PERIOD, TIMES = 64, 32, 3  # tokens looked at, at least; the longest cycle; how often it comes, at least
GRAM = 4


@dataclass(frozen=True)
class Continuation:
    """What a model wrote behind a prompt, without the end token.

    end_probability: of the end tokens together, where the original ended, of the original's own continuation; None
    where it did not end. agreed: how many of the first tokens are the original's, an end being a token; None where
    tokens are drawn.
    """

    ids: tuple[int, ...]
    ended: bool
    end_probability: float | None = None
    agreed: int | None = None
    identical: bool | None = None

    @property
    def looped(self) -> bool:
        return cycle_of(self.ids) is not None

    @property
    def distinct(self) -> float | None:
        """Different 4-grams as a share of all; None of fewer than 4 tokens."""
        grams = [self.ids[i : i + GRAM] for i in range(len(self.ids) - GRAM + 1)]
        return len(set(grams)) / len(grams) if grams else None


def cycle_of(ids: Sequence[int]) -> int | None:
    """The shortest cycle, of at most 32 tokens, that the last tokens repeat: the last 64 of them, or three cycles where
    that is more, are all equal to the token a cycle before. None where there is none."""
    for period in range(1, PERIOD + 1):
        tail = list(ids[-max(WINDOW, TIMES * period) :])
        if len(tail) >= max(WINDOW, TIMES * period) and tail[period:] == tail[:-period]:
            return period
    return None


class Measure(NamedTuple):
    """A figure of a continuation (None: it has none), and whether it is a yes or no."""

    name: str
    words: str
    of: Callable[[Continuation], float | None]
    binary: bool


MEASURES = (
    Measure("ended", "ends", lambda c: float(c.ended), True),
    Measure("looped", "loops", lambda c: float(c.looped), True),
    Measure("length", "tokens", lambda c: float(len(c.ids)), False),
    Measure("distinct", "distinct 4-grams", lambda c: c.distinct, False),
    Measure("end_probability", "p(end)", lambda c: c.end_probability, False),
    Measure("agreed", "as the original", lambda c: None if c.agreed is None else float(c.agreed), False),
    Measure("identical", "identical", lambda c: None if c.identical is None else float(c.identical), True),
)
PAIRED = ("ended", "looped", "length", "distinct", "end_probability")  # held against the original's

Written = Mapping[str, Sequence[Continuation]]  # of "original" and each variant, prompt by prompt


class Figure(NamedTuple):
    """A mean over so many prompts, its standard error (None of fewer than two), and for shares Wilson's interval."""

    value: float
    error: float | None
    prompts: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Shift(Difference):
    """How much more of a measure a variant has than the original on the same prompts; `needed`: prompts that would tell
    it from 0 if it stays what it is (None: it is 0)."""

    prompts: int

    @property
    def needed(self) -> int | None:
        reach = (self.high - self.low) / 2
        return None if not self.mean or reach == inf else ceil(self.prompts * (reach / abs(self.mean)) ** 2)


def figure(measure: Measure, rows: Sequence[Continuation]) -> Figure | None:
    """None where no prompt has one."""
    values = [value for value in map(measure.of, rows) if value is not None]
    n = len(values)
    if not n:
        return None
    mean = sum(values) / n
    error = None if n < 2 else sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return Figure(mean, error, n, *(wilson(mean, n) if measure.binary else (None, None)))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval of 95 % for a share of n."""
    z2 = NORMAL**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = NORMAL / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def shift(measure: Measure, rows: Sequence[Continuation], original: Sequence[Continuation]) -> Shift | None:
    """Paired by prompt; None where no prompt has a figure of both."""
    pairs = [(measure.of(a), measure.of(b)) for a, b in zip(rows, original, strict=True)]
    apart = [a - b for a, b in pairs if a is not None and b is not None]
    n = len(apart)
    if not n:
        return None
    mean = sum(apart) / n
    if measure.binary:
        return Shift(mean, *_of_shares(sum(d > 0 for d in apart), sum(d < 0 for d in apart), n), n)
    if n < 2:
        return Shift(mean, -inf, inf, n)
    reach = student(n - 1) * sqrt(sum((d - mean) ** 2 for d in apart) / (n - 1) / n)
    return Shift(mean, mean - reach, mean + reach, n)


def _of_shares(more: int, less: int, n: int) -> tuple[float, float]:
    """An interval of 95 % for the difference of two shares of the same n, of which so many pairs differ: a half is
    added to each of the four cells (Agresti and Min, Statistics in Medicine 24, 2005), so that few pairs which are all
    alike prove nothing."""
    mean = (more - less) / (n + 2)
    reach = NORMAL * sqrt((more + less + 1) / (n + 2) - mean**2) / sqrt(n + 2)
    return max(-1.0, mean - reach), min(1.0, mean + reach)


def shifts(written: Written) -> dict[str, dict[str, Shift]]:
    """Variant -> measure -> its difference to the original."""
    original = written[ORIGINAL]
    found: dict[str, dict[str, Shift]] = {}
    for name, rows in written.items():
        if name != ORIGINAL:
            all_of = {m.name: shift(m, rows, original) for m in MEASURES if m.name in PAIRED}
            found[name] = {measure: each for measure, each in all_of.items() if each is not None}
    return found


def doubts(written: Written) -> list[str]:
    """A line for each variant whose share that ends or loops differs from the original's by what may be chance."""
    lines = []
    for name, found in shifts(written).items():
        for measure, verb in (("ended", "ends"), ("looped", "loops")):
            each = found.get(measure)
            if each is not None and each.mean and not each.clear:
                more = "" if each.needed is None else f"; about {_rounded(each.needed):,} would, if it stays so"
                lines.append(
                    f"{name}: {each.prompts} prompts do not tell the share that {verb} ({each.mean:+.1%}, 95 % "
                    f"interval {each.low:+.1%} to {each.high:+.1%}) from the original's{more}"
                )
    return lines


def _rounded(n: int) -> int:
    """Up to two digits, upwards."""
    unit = 10 ** max(0, len(str(n)) - 2)
    return -(-n // unit) * unit

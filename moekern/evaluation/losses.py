"""Losses of a model's variants against the original: sums by sequence, what they come to, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, log, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

ORIGINAL = "original"
Metric = Literal["nll", "kl", "top1"]
METRICS: tuple[Metric, ...] = ("nll", "kl", "top1")
TOKENS, SHARED, BYTES = 3, 4, 5  # columns of sums behind those of the metrics
IN_MEMORY = ("sums", "buckets", "layers")
NORMAL = 1.959964  # of the normal distribution: 95 % lie within so many standard deviations


@dataclass(frozen=True)
class LayerFigures:
    """What became of a model's stream of hidden states behind a decoder layer, against the original's, over tokens.

    error: norm of the difference by the norm of the original's; cosine: mean over tokens. Of layers with experts, None
    where they have none or it is not known: orphans, the share of tokens of whose choice in the original nothing
    stays; load, how often the busiest expert that stays is chosen by the mean of those; same_top1, the share of tokens
    whose largest gate is that of the same expert as in the original; overlap, the mean share of the original's choice
    that is chosen still. Of the original itself only the load is told.
    """

    error: float | None = None
    cosine: float | None = None
    orphans: float | None = None
    load: float | None = None
    same_top1: float | None = None
    overlap: float | None = None


@dataclass(frozen=True)
class Loss:
    """Means over predicted tokens.

    nll and kl(original || plan) are in nats; top1 is the share of tokens whose likeliest is the original's;
    one_minus_tv is 1 less the total variation to the original, the probability that both give alike; bits_per_byte is
    the sum of nll in bits by the bytes of the predicted tokens. The last two are None where they were not measured. The
    errors are standard errors by sequence (`sequences` of them; None of fewer than two). Not written, so that none are
    read: `sums` [sequences, 4 to 6], float64, as `predictions.summed` gives them, of which a difference is taken;
    `buckets` by axis, as `buckets.bucket_sums` does; `layers` by key, what became of the model's stream there.
    """

    nll: float
    kl: float
    top1: float
    tokens: int
    sequences: int = 0
    nll_error: float | None = None
    kl_error: float | None = None
    top1_error: float | None = None
    one_minus_tv: float | None = None
    one_minus_tv_error: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_error: float | None = None
    sums: Tensor | None = field(default=None, repr=False, compare=False)
    buckets: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    layers: Mapping[str, LayerFigures] | None = field(default=None, repr=False, compare=False)


Row = Mapping[str, Loss]  # domain -> loss
Evaluation = Mapping[str, Row]  # plan name (or "original") -> domain -> loss


@dataclass(frozen=True)
class Difference:
    """How much more of a metric one row has than another on the same sequences, each domain counting the same, in
    `low` to `high` with a confidence of 95 % (minus infinity to infinity where a domain has one sequence)."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the text tells the two apart."""
        return self.low > 0 or self.high < 0

    @property
    def interval(self) -> list[float | None]:
        """As JSON, which knows no infinity."""
        return [end if isfinite(end) else None for end in (self.low, self.high)]


def means(names: Iterable[str], found: Iterable[tuple[str, str, Tensor]]) -> dict[str, dict[str, Loss]]:
    """Name -> domain -> what sums, as `predictions.summed` gives them for a name and a domain, come to. Sums [4] of a
    whole batch count as one sequence."""
    sums: dict[tuple[str, str], list[Tensor]] = {}
    for name, domain, one in found:
        sums.setdefault((name, domain), []).append(one.reshape(-1, one.shape[-1]))
    table: dict[str, dict[str, Loss]] = {name: {} for name in names}
    for (name, domain), parts in sums.items():
        table[name][domain] = _loss(torch.cat(parts))
    return table


def _loss(rows: Tensor) -> Loss:
    tokens = rows[:, TOKENS]
    figures: dict[str, tuple[float, float | None]] = {}
    figures |= {name: _ratio(rows[:, i], tokens) for i, name in enumerate(METRICS)}
    if rows.shape[1] > SHARED:
        figures["one_minus_tv"] = _ratio(rows[:, SHARED], tokens)
    if rows.shape[1] > BYTES and float(rows[:, BYTES].sum()):
        figures["bits_per_byte"] = _ratio(rows[:, 0] / log(2), rows[:, BYTES])
    found: dict[str, Any] = {name: value for name, (value, _) in figures.items()}
    found |= {f"{name}_error": error for name, (_, error) in figures.items()}
    return Loss(**found, tokens=int(tokens.sum()), sequences=len(rows), sums=rows)


def _ratio(sums: Tensor, sizes: Tensor) -> tuple[float, float | None]:
    return float(sums.sum()) / float(sizes.sum()), _error(sums, sizes)


def _error(sums: Tensor, sizes: Tensor) -> float | None:
    """Standard error of sums / sizes, a ratio of means over sequences [n]; None of fewer than two."""
    total = float(sizes.sum())
    left = sums - sizes * (float(sums.sum()) / total)
    return ratio_error(float((left * left).sum()), len(sums), total)


def ratio_error(squares: float, n: int, total: float) -> float | None:
    """The same of the sum of squares of what n sequences have beyond their share, of `total` in all."""
    return None if n < 2 else sqrt(max(0.0, squares) * n / (n - 1)) / total


def difference(one: Row, other: Row, metric: Metric) -> Difference:
    """Paired by sequence. Both rows must hold the sums of the same text. Raises ValueError where they do not."""
    column, shift, variance, free = METRICS.index(metric), 0.0, 0.0, 0
    for domain, loss in one.items():
        mine, theirs = loss.sums, other[domain].sums
        if mine is None or theirs is None or not torch.equal(mine[:, TOKENS], theirs[:, TOKENS]):
            raise ValueError(f"domain {domain}: the two were not measured on the same sequences")
        apart = mine[:, column] - theirs[:, column]
        error = _error(apart, mine[:, TOKENS])
        shift += float(apart.sum()) / float(mine[:, TOKENS].sum()) / len(one)
        variance += inf if error is None else (error / len(one)) ** 2
        free += len(mine) - 1
    reach = student(free) * sqrt(variance) if free else inf
    return Difference(shift, shift - reach, shift + reach)


def student(free: int) -> float:
    """Within so many standard errors lie 95 % with so many degrees of freedom: the expansion of Student's t in 1 / free
    (Abramowitz and Stegun, 26.7.5); off by less than 0.1 % from four on."""
    if free < 4:
        return {1: 12.7062, 2: 4.3027, 3: 3.1824}[free]
    z = NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / free**n for n, term in enumerate(terms, start=1))


def mean_loss(row: Mapping[str, float]) -> float:
    """Mean over domains, each counting the same."""
    return sum(row.values()) / len(row)


def mean_of(row: Row, metric: str) -> float:
    """The same of a row's metric."""
    return mean_loss({domain: getattr(loss, metric) for domain, loss in row.items()})


def is_known(row: Row, figure: str) -> bool:
    """Whether all domains have a figure that is not always measured."""
    return all(getattr(loss, figure) is not None for loss in row.values())


def error_of(row: Row, metric: str) -> float | None:
    """Standard error of `mean_of`; None where a domain has none."""
    errors = [getattr(loss, f"{metric}_error") for loss in row.values()]
    return None if None in errors else sqrt(sum(error**2 for error in errors)) / len(errors)


def losses_document(table: Evaluation) -> dict[str, Any]:
    """The same as JSON."""
    return {name: row_document(row) for name, row in table.items()}


def row_document(row: Row) -> dict[str, Any]:
    """Losses by domain as JSON, without figures that were not measured."""
    return {
        domain: {name: value for name, value in vars(loss).items() if _written(loss, name)}
        for domain, loss in row.items()
    }


def _written(loss: Loss, name: str) -> bool:
    return name not in IN_MEMORY and getattr(loss, name.removesuffix("_error")) is not None


def row_of(document: Mapping[str, Mapping[str, Any]]) -> dict[str, Loss]:
    """The inverse, without sums. Raises TypeError for what is none."""
    return {domain: Loss(**loss) for domain, loss in document.items()}

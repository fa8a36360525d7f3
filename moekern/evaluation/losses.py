"""Losses of a model's variants against the original: sums by sequence, what they come to, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moekern.errors import InputError

ORIGINAL = "original"
Metric = Literal["nll", "kl", "top1"]
METRICS: tuple[Metric, ...] = ("nll", "kl", "top1")
NORMAL = 1.959964  # of the normal distribution: 95 % lie within so many standard deviations


@dataclass(frozen=True)
class Loss:
    """Means over predicted tokens.

    nll and kl(original || plan) are in nats; top1 is the share of tokens whose likeliest is the original's. The errors
    are standard errors by sequence (`sequences` of them; None of fewer than two). `sums` [sequences, 4], float64, as
    `compared` gives them, are what a difference is taken of; they are not written, so that none are read.
    """

    nll: float
    kl: float
    top1: float
    tokens: int
    sequences: int = 0
    nll_error: float | None = None
    kl_error: float | None = None
    top1_error: float | None = None
    sums: Tensor | None = field(default=None, repr=False, compare=False)


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


def compared(predicted: Tensor, original: Tensor, wanted: Tensor) -> Tensor:
    """Sums over each sequence's tokens [B, 4], float64: -log p of those wanted [B, S], KL, equal likeliest tokens,
    tokens.

    predicted and original are log probabilities [B, S, V]; a sequence is looked at at a time.
    """
    classes = predicted.shape[-1]
    if wanted.numel() and int(wanted.max()) >= classes:
        raise InputError(
            f"its head predicts {classes} classes, and the text has token {int(wanted.max())}: no loss of it"
        )
    sums = torch.zeros(len(wanted), 4, dtype=torch.float64)
    for row, mine, theirs, ids in zip(sums, predicted, original, wanted, strict=True):
        row[0] = -float(mine.gather(1, ids[:, None]).double().sum())
        divergence = F.kl_div(mine, theirs, reduction="none", log_target=True)
        impossible = theirs == -torch.inf  # tokens that a head masks add nothing
        row[1] = float(divergence.masked_fill_(impossible, 0).sum(1).double().sum())
        row[2] = int((mine.argmax(1) == theirs.argmax(1)).sum())
        row[3] = len(ids)
    return sums


def means(names: Iterable[str], found: Iterable[tuple[str, str, Tensor]]) -> dict[str, dict[str, Loss]]:
    """Name -> domain -> what sums, as `compared` gives them for a name and a domain, come to. Sums [4] of a whole batch
    count as one sequence."""
    sums: dict[tuple[str, str], list[Tensor]] = {}
    for name, domain, one in found:
        sums.setdefault((name, domain), []).append(one.reshape(-1, 4))
    table: dict[str, dict[str, Loss]] = {name: {} for name in names}
    for (name, domain), parts in sums.items():
        rows = torch.cat(parts)
        nll, kl, top1, count = rows.sum(0).tolist()
        first, second, third = (_error(rows[:, i], rows[:, 3]) for i in range(3))
        figures = nll / count, kl / count, top1 / count
        table[name][domain] = Loss(*figures, int(count), len(rows), first, second, third, rows)
    return table


def _error(sums: Tensor, tokens: Tensor) -> float | None:
    """Standard error of sums / tokens, a ratio of means over sequences [n]; None of fewer than two."""
    n, total = len(sums), float(tokens.sum())
    if n < 2:
        return None
    left = sums - tokens * (float(sums.sum()) / total)
    return sqrt(float((left * left).sum()) * n / (n - 1)) / total


def difference(one: Row, other: Row, metric: Metric) -> Difference:
    """Paired by sequence. Both rows must hold the sums of the same text. Raises ValueError where they do not."""
    column, shift, variance, free = METRICS.index(metric), 0.0, 0.0, 0
    for domain, loss in one.items():
        mine, theirs = loss.sums, other[domain].sums
        if mine is None or theirs is None or not torch.equal(mine[:, 3], theirs[:, 3]):
            raise ValueError(f"domain {domain}: the two were not measured on the same sequences")
        apart = mine[:, column] - theirs[:, column]
        error = _error(apart, mine[:, 3])
        shift += float(apart.sum()) / float(mine[:, 3].sum()) / len(one)
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


def mean_of(row: Row, metric: Metric) -> float:
    """The same of a row's metric."""
    return mean_loss({domain: getattr(loss, metric) for domain, loss in row.items()})


def error_of(row: Row, metric: Metric) -> float | None:
    """Standard error of `mean_of`; None where a domain has none."""
    errors = [getattr(loss, f"{metric}_error") for loss in row.values()]
    return None if None in errors else sqrt(sum(error**2 for error in errors)) / len(errors)


def losses_document(table: Evaluation) -> dict[str, Any]:
    """The same as JSON."""
    return {name: row_document(row) for name, row in table.items()}


def row_document(row: Row) -> dict[str, Any]:
    """Losses by domain as JSON."""
    return {
        domain: {name: value for name, value in vars(loss).items() if name != "sums"} for domain, loss in row.items()
    }


def row_of(document: Mapping[str, Mapping[str, Any]]) -> dict[str, Loss]:
    """The inverse, without sums. Raises TypeError for what is none."""
    return {domain: Loss(**loss) for domain, loss in document.items()}

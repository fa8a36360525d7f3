"""Numbers of one layer: what goes with the experts that go, how uneven load is, who is chosen together. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

POINTS = 41  # of a cut curve: shares of experts removed, from 0 to 1
SPIKES = 0.75  # quantile of the largest outputs of all layers' experts beyond which an expert spikes


def saliency(scores: Tensor, count: Tensor) -> tuple[Tensor, bool]:
    """Scores [E] as masses [E] in units of the largest of them; an expert without tokens has none. Where an expert with
    tokens scores below 0 the masses count from the lowest such score: then True."""
    scores = scores / (float(scores.abs().max()) or 1.0)
    used = count > 0 if count.any() else torch.ones_like(count, dtype=torch.bool)
    lowest = float(scores[used].min())
    mass = torch.where(used, scores - min(lowest, 0.0), 0.0)
    return mass, lowest < 0


def order(scores: Sequence[float]) -> list[int]:
    """Experts from the first to go to the last: rising score, of equal ones the highest number first."""
    return sorted(range(len(scores)), key=lambda e: (scores[e], -e))


def removed(going: Sequence[int], mass: Tensor) -> list[float]:
    """The share of `mass` [E] that is gone when 0, 1, ... E experts of `going` are; all 0 where there is none."""
    gone = torch.cat([torch.zeros(1, dtype=torch.float64), mass.double()[list(going)].cumsum(0)])
    total = float(gone[-1])
    return (gone / total).tolist() if total > 0 else [0.0] * len(gone)


def on_grid(shares: Sequence[float]) -> list[float]:
    """The same at POINTS even shares of experts removed, between counts by the straight line."""
    at = np.linspace(0, 1, POINTS)
    found: list[float] = np.interp(at, np.linspace(0, 1, len(shares)), shares).tolist()
    return found


def share_of(mass: Tensor, experts: Sequence[int]) -> float:
    """The share of `mass` [E] that these experts hold; 0 where there is none."""
    total = float(mass.sum())
    return float(mass[list(experts)].sum()) / total if total > 0 else 0.0


def knee(shares: Sequence[float]) -> int | None:
    """The place among even shares of experts removed where a curve is farthest below the diagonal, the first of equal
    ones; None where it is nowhere below."""
    below = [i / (len(shares) - 1) - share for i, share in enumerate(shares)]
    return below.index(max(below)) if max(below) > 1e-12 else None


def uneven(count: Tensor) -> tuple[float | None, float | None, float | None]:
    """Largest over mean, the Gini coefficient, and the standard deviation over the mean, of counts [E]; None where all
    are 0."""
    values = count.double().sort().values
    n, total = len(values), float(values.sum())
    if total == 0:
        return None, None, None
    place = torch.arange(1, n + 1, dtype=torch.float64)
    gini = float((2 * place - n - 1) @ values) / (n * total)
    return float(values[-1]) * n / total, max(gini, 0.0), float(values.std(correction=0)) * n / total


def absorbed(together: Tensor, keep: Sequence[int]) -> float | None:
    """Of the slots that tokens of dropped experts gave to other experts, the share of those that stay: `together`
    [E, E] counts tokens that chose both. None where dropped experts were never chosen with another."""
    pairs = together.double().clone().fill_diagonal_(0)
    kept = torch.zeros(len(pairs), dtype=torch.bool)
    kept[list(keep)] = True
    total = float(pairs[~kept].sum())
    return float(pairs[~kept][:, kept].sum()) / total if total > 0 else None


def spike(largest: Iterable[Tensor]) -> float:
    """The quantile SPIKES of the largest outputs [E] of all layers' experts."""
    return float(torch.cat(list(largest)).double().quantile(SPIKES))


def spiking(largest: Tensor, dropped: Sequence[int], limit: float) -> float | None:
    """The share of dropped experts whose largest output is beyond the limit. None: none goes."""
    if not dropped:
        return None
    return float((largest[list(dropped)] > limit).double().mean())


def lift(together: Tensor, tokens: int) -> Tensor:
    """P(i, j) / (P(i) P(j)) [E, E] float64 of tokens that chose both; NaN on the diagonal and of experts without
    tokens."""
    pairs = together.double().clone()
    alone = pairs.diagonal().clone()
    found = pairs * tokens / (alone[:, None] * alone)
    found[~torch.isfinite(found)] = torch.nan
    return found.fill_diagonal_(torch.nan)


def strongest(together: Tensor, tokens: int, most: int) -> list[tuple[int, int, int, float]]:
    """Pairs (i, j, tokens that chose both, lift), those first that fewest would be by chance: the log likelihood of
    being together beyond chance, n log lift, n their tokens."""
    found = lift(together, tokens)
    worth = torch.nan_to_num(together.double() * found.log(), nan=0.0, neginf=0.0).triu(1).flatten()
    E = len(together)
    cells = [(place // E, place % E) for place in largest(worth, most) if worth[place] > 0]
    return [(i, j, int(together[i, j]), float(found[i, j])) for i, j in cells]


def largest(values: Tensor, most: int) -> list[int]:
    """Places of the largest numbers [N], so many at most, the largest first, of equal ones the first."""
    least = values.topk(min(most, len(values))).values[-1]
    places = [*(values > least).nonzero().flatten().tolist(), *(values == least).nonzero().flatten()[:most].tolist()]
    return sorted(places, key=lambda place: (-float(values[place]), place))[:most]


def outlying(values: Tensor, used: Tensor) -> tuple[int, float] | None:
    """The expert that is farthest from the mean of those used [E] bool, and by how many standard deviations (signed);
    None of fewer than 3, or where all are equal."""
    if int(used.sum()) < 3:
        return None
    known = values[used].double()
    spread = float(known.std(correction=0))
    if not spread > 1e-12 * max(1.0, float(known.abs().max())):
        return None
    z = torch.where(used, (values.double() - known.mean()) / spread, 0.0)
    expert = int(z.abs().argmax())
    return expert, float(z[expert])

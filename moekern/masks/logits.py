"""One logit an expert, whose sigmoid is the probability that it stays, and a number of experts that is always exact.

All experts of all layers lie in one vector, of which a `Pool` is the part that shares a number n. The logits of a pool
lie on the surface sum sigmoid = n. A step of Adam is projected on the surface's tangent, goes back to the surface along
its normal by bisection, and Adam's first moment is projected on the tangent there (arXiv:2605.00649).

Adam's second moment is one number a pool, the mean of the squares: a straight-through gradient is next to nothing far
from the cut, and a root of its own would make a step of full size of it; more than that where the first moment has been
carried into the tangent and is no longer that expert's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

BETAS, SMALL = (0.9, 0.99), 1e-12
Own = TypeVar("Own", bound="Adam")
HALVINGS = 80


@dataclass(frozen=True)
class Pool:
    """Places of experts in the vector, int64, of which `kept` stay; of each of the ranges `parts` (of the vector) at
    least `least`."""

    places: Tensor
    kept: int
    parts: tuple[range, ...] = ()
    least: int = 0

    @property
    def free(self) -> bool:
        """There is something to choose."""
        return 0 < self.kept < len(self.places)


@dataclass(frozen=True)
class Pools:
    """Every expert is in one pool."""

    pools: tuple[Pool, ...]
    size: int

    @staticmethod
    def uniform(counts: Mapping[str, tuple[int, int]], groups: int) -> Pools:
        """counts: experts and how many of them stay, by layer. Each group of a layer keeps as many as any other."""
        pools, start = list[Pool](), 0
        for experts, kept in counts.values():
            size = experts // groups
            pools += [Pool(torch.arange(size) + start + g * size, kept // groups) for g in range(groups)]
            start += experts
        return Pools(tuple(pools), start)

    @staticmethod
    def total(counts: Mapping[str, tuple[int, int]], least: int) -> Pools:
        """All layers share a number; each keeps at least so many."""
        parts, start = list[range](), 0
        for experts, _ in counts.values():
            parts.append(range(start, start + experts))
            start += experts
        kept = sum(kept for _, kept in counts.values())
        return Pools((Pool(torch.arange(start), kept, tuple(parts), least),), start)

    @property
    def free(self) -> Iterator[Pool]:
        return (pool for pool in self.pools if pool.free)

    def chosen(self, values: Tensor) -> Tensor:
        """bool [size]: of each pool exactly as many as stay, those of the highest values; ties to the lowest place."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        for pool in self.pools:
            for part in pool.parts:
                mask[part.start + _ranked(values[part.start : part.stop])[: pool.least]] = True
            more = pool.kept - int(mask[pool.places].sum())
            others = pool.places[~mask[pool.places]]
            mask[others[_ranked(values[others])[:more]]] = True
        return mask

    def slope(self, values: Tensor, temperature: float) -> Tensor:
        """The straight-through derivative of `chosen` by each value: s (1 - s) / temperature of s = sigmoid((value -
        cut) / temperature), the cut midway between the last value that stays and the first that does not."""
        found = torch.zeros(self.size, dtype=torch.float64)
        for pool in self.free:
            own = values[pool.places].double()
            first, second = own.sort(descending=True).values[pool.kept - 1 : pool.kept + 1]
            soft = torch.sigmoid((own - (first + second) / 2) / temperature)
            found[pool.places] = soft * (1 - soft) / temperature
        return found

    def begun(self, scores: Tensor, kept: Tensor) -> Tensor:
        """float32 logits whose order is first whether experts are `kept`, then their scores within a pool: 1.5 apart at
        the cut, and 2 more from the best to the worst."""
        logits = torch.zeros(self.size)
        for pool in self.pools:
            order = sorted(range(len(pool.places)), key=lambda n: (bool(kept[pool.places[n]]), scores[pool.places[n]]))
            rank = torch.empty(len(order), dtype=torch.float64)
            rank[order] = torch.arange(len(order), dtype=torch.float64)
            own = 2 * rank / len(order) + 1.5 * kept[pool.places].double()
            if pool.free:
                own += _bisected(lambda t, own=own, n=pool.kept: float(torch.sigmoid(own + t).sum()) - n)  # type: ignore[misc]
            logits[pool.places] = own.float()
        return logits


def _ranked(values: Tensor) -> Tensor:
    return values.sort(descending=True, stable=True).indices


@dataclass
class Adam:
    """float32 [size] each: values, and Adam's moments."""

    pools: Pools
    values: Tensor
    mean: Tensor
    square: Tensor
    steps: int = 0

    @classmethod
    def of(cls: type[Own], pools: Pools, values: Tensor) -> Own:
        return cls(pools, values, torch.zeros_like(values), torch.zeros_like(values))

    def stepped(self, gradient: Tensor, rate: float) -> None:
        """One step against a gradient by the values, float64."""
        raise NotImplementedError

    def towards(self, mean: Tensor, square: Tensor, rate: float) -> Tensor:
        """What these moments, float64, take from the values."""
        first, second = (1 - beta**self.steps for beta in BETAS)
        return rate * (mean / first) / ((square / second).sqrt() + SMALL)


class Logits(Adam):
    """Of which as many as stay are expected."""

    def stepped(self, gradient: Tensor, rate: float) -> None:
        """One step against a gradient by the logits, which stay on their surfaces."""
        self.steps += 1
        mean, square = (old.double() for old in (self.mean, self.square))
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        for pool in self.pools.free:
            own = gradient[pool.places].square().mean()
            square[pool.places] = BETAS[1] * square[pool.places] + (1 - BETAS[1]) * own
        step = self.towards(mean, square, rate)
        values = self.values.double()
        for pool in self.pools.free:
            own, moment = values[pool.places], mean[pool.places]
            own, moment = moved(own, -step[pool.places], moment, pool.kept)
            values[pool.places], mean[pool.places] = own, moment
        self.values, self.mean, self.square = values.float(), mean.float(), square.float()


def moved(values: Tensor, step: Tensor, moment: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Values with sum sigmoid = n after a step along that surface, and the moment in its tangent there; float64."""
    there = values + _in_tangent(step, _normal(values))
    normal = _normal(there)
    there = there + normal * _bisected(lambda t: float(torch.sigmoid(there + t * normal).sum()) - n)
    return there, _in_tangent(moment, _normal(there))


def _normal(values: Tensor) -> Tensor:
    """Of the surface sum sigmoid = constant, of length 1."""
    p = torch.sigmoid(values)
    cost = p * (1 - p)
    return cost / cost.norm()


def _in_tangent(vector: Tensor, normal: Tensor) -> Tensor:
    return vector - (vector @ normal) * normal


def _bisected(excess: Callable[[float], float]) -> float:
    """Where a rising function is 0."""
    low, high = -1.0, 1.0
    while excess(low) > 0 and low > -1e9:
        low *= 2
    while excess(high) < 0 and high < 1e9:
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (low + high) / 2


def drawn(size: int, masks: int, seed: int, step: int) -> list[Tensor]:
    """Noise of the logits, float64 [size] each: the difference of two Gumbel variables, in antithetic pairs."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    found = list[Tensor]()
    while len(found) < masks:
        u = torch.rand(size, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        noise = torch.log(u) - torch.log1p(-u)
        found += [noise, -noise]
    return found[:masks]


def spread(mask: Tensor, counts: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Which experts of each layer a mask of all names."""
    return {key: tuple(own.nonzero().flatten().tolist()) for key, own in by_layer(mask, counts).items()}


def by_layer(values: Tensor, counts: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """What a vector of all experts holds of each layer's."""
    return dict(zip(counts, values.split([experts for experts, _ in counts.values()]), strict=True))


def gathered(of_layers: Mapping[str, Sequence[float] | Tensor], counts: Mapping[str, tuple[int, int]]) -> Tensor:
    """float64: one vector of what each layer has of its experts."""
    return torch.cat([torch.as_tensor(of_layers[key], dtype=torch.float64) for key in counts])

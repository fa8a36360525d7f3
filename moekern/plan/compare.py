"""How far plans agree, and what statistics say each of them drops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from moekern.architectures.twins import same_routers
from moekern.errors import InputError
from moekern.plan.document import Plan
from moekern.statistics.file import Statistics


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two plans: |kept by both| / |kept by either|, in each layer and as the mean over layers."""

    first: str
    second: str
    jaccard: float
    layers: Mapping[str, float]

    @property
    def lowest(self) -> str:
        """The layer in which they agree least; the first of several."""
        return min(self.layers, key=lambda key: self.layers[key])


@dataclass(frozen=True, slots=True)
class Dropped:
    """Shares that a plan drops, as means over layers, each layer counting the same.

    gates: of the sum of gates; outputs: of the sum of gate x output norm, in all and by domain; worst: the layer that
    loses most of the latter, and its share. Sums below 0 count as 0.
    """

    gates: float
    outputs: float
    worst: tuple[str, float]
    domains: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every pair of plans, and each plan against the statistics where there are any."""

    pairs: tuple[Agreement, ...]
    dropped: Mapping[str, Dropped]


def compare(plans: Mapping[str, Plan], statistics: Statistics | None = None) -> Comparison:
    """Compare plans of the same layers; those that only some name, such as MTP layers, must not differ.

    Raises InputError for plans of different layers, and for a plan that does not fit the statistics.
    """
    if len(plans) < 2 and statistics is None:
        raise InputError("compare: one plan alone has nothing to be compared with; name another, or --statistics")
    first = next(iter(plans))
    for name, plan in plans.items():
        odd = sorted(plan.layers.keys() ^ plans[first].layers.keys())
        if odd:
            raise InputError(f"compare: layer {odd[0]} is in one of {first} and {name} only; plans of one model agree")
    pairs = tuple(_agreement(a, plans[a], b, plans[b]) for a, b in combinations(plans, 2))
    return Comparison(pairs, {} if statistics is None else {n: dropped(n, p, statistics) for n, p in plans.items()})


def dropped(name: str, plan: Plan, statistics: Statistics) -> Dropped:
    """What `plan` drops of what was measured. Raises InputError for another model's plan."""
    check_fits(name, plan, statistics)
    outputs, gates = {}, []
    for key in statistics.layers:
        sums, keep = statistics.layer(key, tiers=()), plan.layers[key].keep
        outputs[key] = _share(sums.gated_norm_sum, keep)
        gates.append(_share(sums.gate_sum, keep))
    worst = max(outputs, key=lambda key: outputs[key])
    return Dropped(
        gates=_mean(gates),
        outputs=_mean(list(outputs.values())),
        worst=(worst, outputs[worst]),
        domains={domain: _mean(_domain_shares(plan, statistics, domain)) for domain in statistics.domains},
    )


def check_fits(name: str, plan: Plan, statistics: Statistics) -> None:
    """Raise InputError unless `plan` is of the model, or a twin of it, and of the layers and experts that were
    measured."""
    made_for = plan.provenance.get("fingerprint")
    twin = same_routers(plan.provenance.get("routers"), statistics.header.get("routers"))
    if made_for is not None and made_for != statistics.header["fingerprint"] and not twin:
        raise InputError(f"{name}: made for another model than the statistics (fingerprint {str(made_for)[:12]})")
    for key in statistics.layers:
        if key not in plan.layers:
            raise InputError(f"{name}: layer {key} of the statistics is missing")
        experts = statistics.num_experts(key)
        if max(plan.layers[key].keep) >= experts:
            raise InputError(f"{name}: layer {key}: expert {max(plan.layers[key].keep)}, but it has 0 to {experts - 1}")


def _agreement(first: str, a: Plan, second: str, b: Plan) -> Agreement:
    layers = {}
    for key in a.layers:
        left, right = set(a.layers[key].keep), set(b.layers[key].keep)
        layers[key] = len(left & right) / len(left | right)
    return Agreement(first, second, _mean(list(layers.values())), layers)


def _domain_shares(plan: Plan, statistics: Statistics, domain: str) -> list[float]:
    return [
        _share(statistics.layer(key, [domain], ()).gated_norm_sum, plan.layers[key].keep) for key in statistics.layers
    ]


def _share(values: Tensor, keep: Sequence[int]) -> float:
    """Of the sum of values [E], the share outside `keep`; 0 where there is nothing to lose."""
    positive = values.clamp(min=0)
    total = float(positive.sum())
    return 1 - float(positive[list(keep)].sum()) / total if total > 0 else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

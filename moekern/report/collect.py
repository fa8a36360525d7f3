"""From statistics and plans to all that a report holds, as plain data: dicts, lists, numbers and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from moekern.criteria import Criterion
from moekern.errors import InputError
from moekern.layer_keys import natural
from moekern.plan.agreement import rank_correlation
from moekern.plan.choose import choose_top
from moekern.plan.compare import check_fits
from moekern.plan.document import Plan
from moekern.report.commands import commands_of
from moekern.report.diagnostics import (
    coverage_of,
    domains_of,
    preferences,
    router_of,
    routing_term,
    routing_variance,
)
from moekern.report.orders import Order, Values, orders, scored, wanted
from moekern.report.recipe import Sizes, model_of, plan_rows, runs_of
from moekern.report.shares import (
    POINTS,
    absorbed,
    knee,
    on_grid,
    order,
    removed,
    saliency,
    share_of,
    spike,
    spiking,
    uneven,
)
from moekern.report.stability import SHARE, stability
from moekern.report.together import TIERS, known, room, together
from moekern.router import kept_count
from moekern.statistics.coverage import coverage, too_thin
from moekern.statistics.file import Statistics
from moekern.statistics.header import router_of as router_in

PREFERENCES = 400_000  # domain x expert numbers that are held
OVERLAP = 14  # plans and criteria at most
SHARES = ("experts", "saliency", "tokens")  # that are removed


@dataclass
class _Found:
    """What the layers, read one after another, come to."""

    scores: dict[str, Values] = field(default_factory=dict)
    count: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)
    gate: dict[str, Tensor] = field(default_factory=dict)  # means of the tokens that chose an expert
    norm: dict[str, Tensor] = field(default_factory=dict)
    together: dict[str, dict[str, Any]] = field(default_factory=dict)
    absorbed: dict[str, dict[str, float | None]] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    domains: list[dict[str, list[float | None]]] = field(default_factory=list)


def report_of(
    statistics: Statistics,
    plans: Mapping[str, Plan],
    losses: Mapping[str, Any] | None = None,
    sizes: Sizes | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that the page shows. `losses` is what `read_losses` gives, `names` the names that its plans have among
    `plans`. One layer is read at a time. Raises InputError for plans that do not fit the statistics."""
    for name, plan in plans.items():
        check_fits(name, plan, statistics)
    keys = sorted(statistics.layers, key=natural)
    found = _layers(statistics, keys, plans, wanted(statistics, plans))
    # a criterion counts where it has something to say of every layer
    scores = {name: values for name, values in found.scores.items() if len(values) == len(keys)}
    shown = orders(statistics, plans, scores)
    evaluation, doubted = None, list[str]()
    if losses is not None:  # whose module brings what runs models
        from moekern.report.losses import told, warnings_of

        evaluation = told(losses, names or {})
        doubted = warnings_of(evaluation, list(plans))
    stable, doubts = stability(statistics, shown)
    covered, limit, top_k = coverage(statistics), spike(found.largest.values()), statistics.header["top_k"]
    lines = [too_thin(covered), *doubts, *(line for o in shown for line in _remarks(o, statistics)), *doubted]
    return {
        "model": model_of(statistics, sizes),
        "runs": runs_of(statistics),
        "plans": plan_rows(plans),
        "commands": commands_of(statistics, plans, evaluation),
        "warnings": [line.removeprefix("warning: ") for line in lines if line],
        "evaluation": evaluation,
        "layers": found.layers,
        "curves": [_curve(each, keys, found) for each in shown],
        "by_plan": {
            each.name: [_in_layer(each, key, found, limit, top_k) for key in keys] for each in shown if each.plan
        },
        "follows": {each.name: [_follows(each, key, found) for key in keys] for each in shown},
        "kept": {each.name: {key: list(each.keep(key) or ()) for key in keys} for each in shown if each.plan},
        "values": {"tokens": {key: found.count[key].tolist() for key in keys}, **_values(shown, scores)},
        "shown": {each.name: _value_name(each, scores) for each in shown},
        "coverage": {name: asdict(each) for name, each in covered.items()},
        "stability": stable,
        "domains": found.domains,
        "pairs": [found.together[key] for key in keys],
        "overlap": _overlap(statistics, shown, scores),
    }


def _layers(statistics: Statistics, keys: Sequence[str], plans: Mapping[str, Plan], asked: list[Criterion]) -> _Found:
    found, tiers = _Found(), tuple({tier for row in asked for tier in row.tiers} | {*TIERS})
    pairs = room(len(keys), max(statistics.num_experts(key) for key in keys))
    groups = router_in(statistics.header).n_group
    most = PREFERENCES // max(1, sum(statistics.num_experts(key) for key in keys))
    for key in keys:
        sums = statistics.layer(key, tiers=tiers)
        for name, row in scored(asked, sums, key):
            found.scores.setdefault(name, {})[key] = row.tolist()
        parts = {name: statistics.part(key, name, ()) for name in statistics.layers[key]}
        preferred = list(preferences(parts).items())[:most] if len(parts) > 1 else []
        found.count[key], found.largest[key] = sums.count, sums.max_abs
        found.gate[key], found.norm[key] = (x / sums.count.clamp(min=1) for x in (sums.gate_sum, sums.norm_sum))
        found.together[key] = together(sums, min(pairs, sums.num_experts))
        found.absorbed[key] = {name: absorbed(sums.coactivation, plan.layers[key].keep) for name, plan in plans.items()}
        found.domains.append({name: known(row[None])[0] for name, row in preferred})
        router = {**router_of(sums), "variance": routing_variance(sums, groups)}
        found.layers.append({"key": key, **coverage_of(sums), "router": router, "domains": domains_of(parts)})
    return found


def _curve(each: Order, keys: Sequence[str], found: _Found) -> dict[str, Any]:
    """Shares of saliency and of tokens that are gone at even shares of experts removed, means over layers, and where
    the plan cuts; the knee is where saliency lags most behind experts."""
    rows, cuts, shifted = [], [], False
    for key in keys:
        mass, below = saliency(torch.tensor(each.scores[key], dtype=torch.float64), found.count[key])
        shifted |= below
        going = order(each.scores[key])
        rows.append([on_grid(removed(going, mass)), on_grid(removed(going, found.count[key]))])
        gone = _dropped(each, key)
        if gone is not None:
            cuts.append([len(gone) / len(mass), share_of(mass, gone), share_of(found.count[key], gone)])
    lines = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    at = knee(lines[0])
    cut = torch.tensor(cuts, dtype=torch.float64).mean(0).tolist() if cuts else None
    return {
        "name": each.name, "criterion": each.criterion, "from_lowest": shifted, "saliency": lines[0],
        "tokens": lines[1], "cut": cut and dict(zip(SHARES, cut, strict=True)),
        "knee": None if at is None else dict(zip(SHARES, (at / (POINTS - 1), lines[0][at], lines[1][at]), strict=True)),
    }  # fmt: skip


def _dropped(each: Order, key: str) -> list[int] | None:
    keep = each.keep(key)
    kept = set(keep or ())
    return None if keep is None else [e for e in range(len(each.scores[key])) if e not in kept]


def _in_layer(each: Order, key: str, found: _Found, limit: float, top_k: int) -> dict[str, Any]:
    """One layer of a plan. at_cut: the lowest mass of saliency that is kept, over the mean of the layer. Load is that
    of the tokens as they were routed before the others went. routing_term: over that of the whole layer; a router that
    stays whole has the same."""
    keep, gone = list(each.keep(key) or ()), _dropped(each, key) or []
    mass, _ = saliency(torch.tensor(each.scores[key], dtype=torch.float64), found.count[key])
    mean = float(mass.mean())
    largest, gini, variation = uneven(found.count[key][keep])
    tokens = int(found.count[key].sum()) // top_k
    whole = each.plan is not None and each.plan.replace is not None
    left = routing_term(len(keep), min(top_k, len(keep)), tokens) / routing_term(len(mass), top_k, tokens)
    return {
        "kept": len(keep),
        "at_cut": float(mass[keep].min()) / mean if mean > 0 else None,
        "saliency": share_of(mass, gone),
        "tokens": share_of(found.count[key], gone),
        "spiking": spiking(found.largest[key], gone, limit),
        "max_over_mean": largest,
        "gini": gini,
        "variation": variation,
        "absorbed": found.absorbed[key][each.name],
        "routing_term": 1.0 if whole else left,
    }


def _follows(each: Order, key: str, found: _Found) -> dict[str, float | None]:
    """What the scores of a layer go with: rank correlation, over experts with tokens, with their tokens, their mean
    gate and the mean norm of their outputs."""
    used, scores = found.count[key] > 0, torch.tensor(each.scores[key], dtype=torch.float64)
    driven = {"count": found.count[key].double(), "gate": found.gate[key], "norm": found.norm[key]}
    return {name: rank_correlation(scores[used], values[used]) if used.any() else None
            for name, values in driven.items()}  # fmt: skip


def _remarks(each: Order, statistics: Statistics) -> list[str]:
    """What is to be known of one plan."""
    if each.plan is None:
        return []
    lines, made = [], each.plan.provenance
    counts = sorted({len(each.plan.layers[key].keep) for key in statistics.layers})
    if len(counts) > 1 and each.plan.replace is None:
        lines.append(f"{each.name}: layers keep {counts[0]} to {counts[-1]} experts; most engines load one count")
    if each.plan.merges:
        lines.append(f"{each.name}: what it removes counts the experts that are merged into others")
    if each.plan.width is not None:
        lines.append(f"{each.name}: what it removes counts whole experts, and no channels of those that stay")
    ties = made.get("ties")
    if isinstance(ties, dict) and ties:
        lines.append(f"{each.name}: scores tie at the cut in {len(ties)} layers, where the lowest numbers stay")
    of = made.get("statistics")
    if isinstance(of, str) and statistics.sha256 is not None and of != statistics.sha256:
        lines.append(f"{each.name}: made of other statistics than these (sha256 {of:.12})")
    return lines


def _value_name(each: Order, scores: Mapping[str, Values]) -> str:
    """Under which name the values of an order are held: its criterion's, where they are the same numbers."""
    for name, values in scores.items():
        if values is each.scores or (name == each.criterion and _alike(values, each.scores)):
            return name
    return f"scores of {each.name}"


def _alike(one: Values, other: Values) -> bool:
    return all(
        torch.allclose(torch.tensor(row, dtype=torch.float64), torch.tensor(other[key], dtype=torch.float64), rtol=1e-9)
        for key, row in one.items()
    )


def _values(shown: Sequence[Order], scores: Mapping[str, Values]) -> dict[str, Values]:
    """Those of the orders first."""
    return {**{_value_name(each, scores): each.scores for each in shown}, **scores}


def _overlap(statistics: Statistics, shown: Sequence[Order], scores: Mapping[str, Values]) -> dict[str, Any]:
    """Jaccard index, mean over layers, of the sets that plans keep and that criteria would keep: as many as the first
    plan does, or SHARE."""
    router, sets = router_in(statistics.header), dict[str, dict[str, frozenset[int]]]()
    plan = next((each.plan for each in shown if each.plan is not None), None)
    for each in shown:
        if each.plan is not None:
            sets[f"plan {each.name}"] = {key: frozenset(each.keep(key) or ()) for key in statistics.layers}
    for name, values in list(scores.items())[: max(0, OVERLAP - len(sets))]:
        try:
            sets[name] = {
                key: frozenset(_top(row, None if plan is None else len(plan.layers[key].keep), router.of(len(row))))
                for key, row in values.items()
            }
        except InputError:  # a share that the router cannot work with
            break
    jaccard = {name: {name: 1.0} for name in sets}
    for a, b in combinations(sets, 2):
        alike = [len(left & sets[b][key]) / len(left | sets[b][key]) for key, left in sets[a].items()]
        jaccard[a][b] = jaccard[b][a] = sum(alike) / len(alike)
    return {"names": list(sets), "jaccard": [[jaccard[a][b] for b in sets] for a in sets]}


def _top(row: Sequence[float], count: int | None, router: Any) -> tuple[int, ...]:
    kept = kept_count(SHARE, router) if count is None else count
    groups = router.n_group if kept % router.n_group == 0 else 1
    return choose_top(row, kept, groups=groups)

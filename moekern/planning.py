"""From statistics and a criterion to a plan."""

from collections.abc import Collection, Sequence

from moekern.criteria import Criterion, criterion_named, score_layer
from moekern.errors import InputError
from moekern.keys import natural
from moekern.plan import (
    TIE,
    LayerPlan,
    Limits,
    Plan,
    Router,
    check_protected,
    choose_top,
    count_problem,
    kept_count,
    super_experts,
)
from moekern.statistics import LayerStatistics, Statistics
from moekern.version import __version__


def router_limits(statistics: Statistics) -> Limits:
    """The router's numbers as calibration recorded them."""
    names = ("num_experts", "top_k", "n_group", "topk_group", "group_top")
    return Limits(**{name: statistics.header[name] for name in names})


def make_plan(
    statistics: Statistics,
    criterion: str | Criterion,
    keep: float | int,
    layout: Router | None = None,
    *,
    seed: int = 0,
    domains: Sequence[str] | None = None,
    protect_super: bool = False,
) -> Plan:
    """Choose the kept experts of every measured layer, the same number in each.

    `keep` is a share (float in (0, 1], rounded to the nearest multiple of n_group) or a count (int). `layout` gives the
    router's numbers; None takes them from the statistics. `domains` counts only these (None: all). `protect_super`
    keeps experts with extreme outputs whatever their score. Raises InputError for a budget the router cannot work with,
    an unknown criterion or domain, domains without tokens, and more protected experts than places.
    """
    chosen = criterion_named(criterion) if isinstance(criterion, str) else criterion
    router = layout or router_limits(statistics)
    layers = {key: statistics.layer(key, domains) for key in sorted(statistics.layers, key=natural)}
    kept = _common_count(keep, router, layers)
    supers = super_experts({key: sums.max_abs.tolist() for key, sums in layers.items()}) if protect_super else {}
    plans = {
        key: _plan_layer(chosen, sums, key, kept, router.n_group, supers.get(key, ()), seed)
        for key, sums in layers.items()
    }
    provenance = {
        "moekern": __version__,
        "fingerprint": statistics.header["fingerprint"],
        "statistics": statistics.sha256,
        "criterion": chosen.name,
        "domains": list(statistics.domains if domains is None else domains),
        "keep": keep,
        "kept": kept,
        "num_experts": router.num_experts,
        "tie": TIE,
        "seed": seed,
        "protect_super": {key: list(experts) for key, experts in supers.items()} if protect_super else False,
    }
    return Plan(plans, provenance)


def _common_count(keep: float | int, router: Router, layers: dict[str, LayerStatistics]) -> int:
    sizes = {sums.num_experts: key for key, sums in layers.items()}
    if isinstance(keep, float) and len(sizes) > 1:
        raise InputError(
            f"--keep {keep}: layers have different numbers of experts ({', '.join(map(str, sorted(sizes)))}), and a "
            "share would keep different numbers; give a count"
        )
    kept = kept_count(keep, router)
    for size, key in sizes.items():
        problem = count_problem(kept, Limits(size, router.top_k, router.n_group, router.topk_group, router.group_top))
        if problem:
            raise InputError(f"--keep {keep}: layer {key}: {problem}")
    return kept


def _plan_layer(
    criterion: Criterion,
    statistics: LayerStatistics,
    key: str,
    kept: int,
    groups: int,
    protected: Collection[int],
    seed: int,
) -> LayerPlan:
    if criterion.kind != "seeded" and not statistics.count.any():
        raise InputError(f"layer {key}: no token was routed to any expert, so there is nothing to plan from")
    where = f"--protect-super: layer {key}"
    if criterion.kind == "selector":
        check_protected(statistics.num_experts, kept, groups, protected, where)
        selection = criterion.function(statistics, kept, groups, protected)
        return LayerPlan(selection.keep, tuple(selection.scores.tolist()))
    scores = tuple(score_layer(criterion, statistics, key, seed).tolist())
    return LayerPlan(choose_top(scores, kept, groups=groups, protected=protected, where=where), scores)

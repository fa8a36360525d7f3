"""Whether two halves of the text choose alike, layer by layer, for the orders of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moekern.errors import InputError
from moekern.plan.agreement import agreement_of_all, thin
from moekern.report.orders import Order
from moekern.statistics.file import Statistics

SHARE = 0.5  # where no plan says how many stay


def stability(
    statistics: Statistics, shown: Sequence[Order]
) -> tuple[dict[str, list[dict[str, Any]] | None], list[str]]:
    """Order -> its layers in their order, None where halves know nothing of its criterion; and what is to be doubted.

    What several orders share, a criterion, counts and domains, is looked at once."""
    known, lines = dict[Any, Any](), []
    found: dict[str, list[dict[str, Any]] | None] = {}
    for each in shown:
        found[each.name] = None
        if each.known is None or each.known.kind == "seeded":
            continue
        keep = SHARE if each.plan is None else {key: len(each.plan.layers[key].keep) for key in statistics.layers}
        replaced = each.plan is not None and (each.plan.replace is not None or _uneven(keep))
        domains = _made_of(each, statistics)
        asked = (each.known.name, str(keep), *domains)
        try:
            if asked not in known:
                known[asked] = agreement_of_all(statistics, each.known, keep, domains, replaced=replaced)
        except InputError:  # tiers that were not measured, counts that halves cannot be asked about
            continue
        found[each.name] = [asdict(layer) for layer in known[asked].values()]
        tokens = sum(statistics.header["tokens"][name] for name in domains)
        if line := thin(known[asked], each.known.name, tokens):
            lines.append(f"{each.name}: {line.removeprefix('warning: ')}")
    return found, lines


def _made_of(each: Order, statistics: Statistics) -> list[str]:
    """The domains that an order is of: those that its plan names, else all."""
    told = None if each.plan is None else each.plan.provenance.get("domains")
    named = [name for name in statistics.domains if isinstance(told, list) and name in told]
    return named or list(statistics.domains)


def _uneven(keep: Any) -> bool:
    return isinstance(keep, dict) and len(set(keep.values())) > 1

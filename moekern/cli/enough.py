"""Whether the text was enough, as `inspect`, `calibrate` and `merge` tell it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moekern.cli.console import detail, hint, say, show
from moekern.errors import InputError

if TYPE_CHECKING:
    from moekern.plan.agreement import Agreement
    from moekern.statistics.coverage import Coverage
    from moekern.statistics.file import Statistics

COLUMNS = ("domain", "tokens", "no token", "halves keep alike", "lowest, layer", "rank correlation", "undecided")


def enough(statistics: Statistics, criterion: str, keep: str) -> tuple[dict[str, Any], Callable[[], None]]:
    """What is known, as JSON and as a table: of each domain, and of all together.

    Raises InputError for a count that the router cannot work with.
    """
    from moekern.plan.agreement import agreement, mean_of, thin
    from moekern.router import parse_keep
    from moekern.statistics.coverage import THIN, coverage, too_thin

    found, covered = agreement(statistics, criterion, parse_keep(keep)), coverage(statistics)
    document = {
        name: {"coverage": asdict(covered[name]), "mean": asdict(mean_of(layers)), "layers": _documents(layers)}
        for name, layers in found.items()
    }

    def tell() -> None:
        rows = [_row(name, layers, covered[name]) for name, layers in found.items()]
        columns = (*COLUMNS[:3], f"fewer than {THIN}", *COLUMNS[3:])
        show(f"was the text enough? what {criterion} keeps at --keep {keep}; experts of all layers", columns, rows)
        whole = found["all"]
        if mean_of(whole).kept is None:
            say(f"whether two halves of the text keep alike is not known of {criterion}, or in these statistics")
        hint(too_thin(covered))
        hint(thin(whole, criterion, covered["all"].tokens))

    return {"criterion": criterion, "keep": keep, "domains": document}, tell


def layer_teller(criterion: str, keep: str) -> Callable[[Statistics], None]:
    """Tells of one layer after the other, while they are measured."""
    from moekern.plan.agreement import agreement_of_all
    from moekern.router import parse_keep
    from moekern.statistics.coverage import THIN, coverage

    def tell(statistics: Statistics) -> None:
        (key,) = statistics.layers
        covered = coverage(statistics)["all"]
        with suppress(InputError):  # a count that the router cannot work with is told at the end
            found = agreement_of_all(statistics, criterion, parse_keep(keep))[key]
            alike = "not known" if found.kept is None else f"{found.kept:.3f}"
            thin = f"{covered.thin} of {covered.experts} experts saw fewer than {THIN} tokens"
            detail(f"layer {key}: {thin}; sets kept by the two halves of the text are alike to {alike}")

    return tell


def _documents(layers: dict[str, Agreement]) -> dict[str, Any]:
    return {key: asdict(layer) for key, layer in layers.items()}


def _row(name: str, layers: dict[str, Agreement], covered: Coverage) -> tuple[Any, ...]:
    from moekern.plan.agreement import mean_of

    mean, known = mean_of(layers), {key: a.kept for key, a in layers.items() if a.kept is not None}
    worst = min(known, key=lambda key: known[key]) if known else None
    lowest = "not known" if worst is None else f"{known[worst]:.3f}, {worst}"
    numbers = ("not known" if n is None else f"{n:.3f}" for n in (mean.kept, mean.rank))
    undecided = "not known" if mean.undecided is None else f"{mean.undecided:.1%}"
    kept, rank = numbers
    return name, covered.tokens, covered.idle, covered.thin, kept, lowest, rank, undecided

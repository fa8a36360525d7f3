"""The command `compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.cli.console import show
from moekern.cli.given import named_plans, result
from moekern.cli.options import Json

if TYPE_CHECKING:
    from moekern.plan.compare import Comparison


def compare(
    plans: Annotated[list[Path], typer.Argument(help="Plans of one model.")],
    statistics: Annotated[
        Path | None, typer.Option(help="Also tell what each plan drops of what was measured.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How far plans keep the same experts, and how much of the gates and outputs each of them drops."""
    from moekern.plan.compare import compare as compared
    from moekern.statistics.file import Statistics

    found = compared(named_plans("compare", plans), None if statistics is None else Statistics.load(statistics))
    result(asdict(found), lambda: show_comparison(found))


def show_comparison(found: Comparison) -> None:
    """Agreement of every pair; what each plan drops."""
    if found.pairs:
        rows = [
            (pair.first, pair.second, f"{pair.jaccard:.3f}", f"{pair.layers[pair.lowest]:.3f} (layer {pair.lowest})")
            for pair in found.pairs
        ]
        show("kept by both / kept by either", ("plan", "and", "mean of layers", "lowest"), rows)
    if found.dropped:
        domains = list(next(iter(found.dropped.values())).domains)
        shares = [
            (name, f"{row.gates:.2%}", f"{row.outputs:.2%}", f"{row.worst[1]:.2%} (layer {row.worst[0]})",
             *(f"{row.domains[domain]:.2%}" for domain in domains))
            for name, row in found.dropped.items()
        ]  # fmt: skip
        show("dropped share, mean of layers", ("plan", "gates", "gate x norm", "worst layer", *domains), shares)

"""The command `contrast`."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli.console import show
from moekern.cli.given import check_statistics, result
from moekern.cli.options import Json, at_least
from moekern.errors import InputError
from moekern.files import check_new, make_parents

if TYPE_CHECKING:
    from moekern.plan.contrast import Contrast
    from moekern.statistics.file import Statistics


def contrast(
    statistics: Annotated[Path, typer.Argument(help="A statistics file with a domain for each class of text.")],
    of: Annotated[str, typer.Option(help="The class: a domain, or several with commas.")],
    against: Annotated[str | None, typer.Option(help="What it is held against. Default: all other domains.")] = None,
    count: Annotated[int, typer.Option(help="Experts that are shown.", callback=at_least(1))] = 10,
    out: Annotated[Path | None, typer.Option(help="Write the map of all experts there.")] = None,
    as_json: Json = False,
) -> None:
    """Experts that tell one class of text from others, such as refusals from answers: how much more often a token of it
    chooses them."""
    check_statistics(statistics)
    if out is not None:
        check_new(out)

    from moekern.plan.contrast import Contrast
    from moekern.statistics.file import Statistics

    measured = Statistics.load(statistics)
    found = Contrast.of(measured, _names("--of", of), () if against is None else _names("--against", against))
    rows = _rows(found, measured, count)
    if out is not None:
        make_parents(out)
        found.save(out, new=True)
    document = {**found.provenance, "out": None if out is None else str(out), "experts": rows}
    result(document, lambda: _show(found, rows))


def _names(flag: str, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not names:
        raise InputError(f"{flag} {text!r}: name a domain of the statistics")
    return names


def _rows(found: Contrast, statistics: Statistics, count: int) -> list[dict[str, Any]]:
    """The most distinctive experts, the most of all first."""
    from moekern.plan.guards import ranked

    rows = []
    for key, expert in ranked(found.layers)[:count]:
        shares, variance = [], 0.0
        for side in ("of", "against"):
            sums = statistics.layer(key, found.provenance[side], ())
            tokens = int(sums.tokens)
            share = int(sums.count[expert]) / tokens
            shares.append(share)
            variance += share * max(0.0, 1 - share) / tokens
        rows.append({
            "layer": key, "expert": expert, "difference": found.layers[key][expert], "error": sqrt(variance),
            "of": shares[0], "against": shares[1],
        })  # fmt: skip
    return rows


def _show(found: Contrast, rows: Sequence[dict[str, Any]]) -> None:
    of, against = (", ".join(found.provenance[side]) for side in ("of", "against"))
    title = (
        f"experts that {of} uses more than {against}: share of tokens (± standard error, if tokens were independent)"
    )
    table = [
        (
            row["layer"], str(row["expert"]), f"{row['difference']:+.1%} ± {row['error']:.1%}",
            f"{row['of']:.1%}", f"{row['against']:.1%}",
        )
        for row in rows
    ]  # fmt: skip
    show(title, ("layer", "expert", "more by", of, against), table)

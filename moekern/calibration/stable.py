"""Text in growing parts, until its halves agree about what is kept.

A pass sees all its text in one layer before it sees the next, so it cannot stop half-way through the text. Instead the
first part of every domain is measured in all layers, and as long as the halves of what was measured do not agree, a
part as large as all before it. Sums of parts add up, so no token is computed twice; but each part is a pass over the
weights, which are read once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.plan.agreement import agreement_of_all, known_by_halves, mean_of
from moekern.plan.fits_model import whole_router
from moekern.router import Router, check_share, kept_count
from moekern.statistics.file import Statistics, added

PARTS = 16  # the first part is this share of a domain's chunks, and at least LEAST
LEAST = 2  # chunks, of which each half of the text has one

Measure = Callable[[TokenData, int], Statistics]  # a part and its number


@dataclass(frozen=True)
class Stable:
    """Text is enough when the sets that its two halves keep have a Jaccard index of `threshold`, in the mean over
    layers, all `domains` (None: all) together, for each of `keeps`; `replaced` of a router that stays whole.

    Raises InputError for a threshold that is no share, and for a criterion that halves of the text do not know.
    """

    threshold: float
    criterion: str
    keeps: tuple[float | int, ...]
    domains: tuple[str, ...] | None = None
    replaced: bool = False

    def __post_init__(self) -> None:
        check_share("--until-stable", self.threshold)
        if not known_by_halves(self.criterion):
            raise InputError(
                f"--until-stable: what {self.criterion} keeps is not known of halves of the text: it needs more than a "
                "number an expert of the routed tier; leave it out, or name another --criterion"
            )

    def check(self, router: Router) -> None:
        """Raise InputError for a count that the router cannot work with."""
        for keep in self.keeps:
            kept_count(keep, whole_router(router) if self.replaced else router)

    def asked(self, data: TokenData) -> TokenData:
        """The text, with a recipe that says when it is to end."""
        told = {"threshold": self.threshold, "criterion": self.criterion, "keep": list(self.keeps)}
        told |= {} if self.domains is None else {"domains": list(self.domains)}
        told |= {"replaced": True} if self.replaced else {}
        return replace(data, recipe={**data.recipe, "until_stable": told})

    def agreed(self, statistics: Statistics) -> float:
        """The least index of the keeps; 0 where a half has seen no text."""
        found = (
            agreement_of_all(statistics, self.criterion, keep, domains=self.domains, replaced=self.replaced)
            for keep in self.keeps
        )
        return min(mean_of(layers).kept or 0.0 for layers in found)


def parts_of(data: TokenData) -> Iterator[TokenData]:
    """The text cut into parts by chunks, each about as large as all before it: of every domain what follows what was
    taken. Their recipes say which chunks they are."""
    whole = data.by_chunk()
    of = {domain: [b for b in whole.batches if b.domain == domain] for domain in whole.tokens}
    stops = {domain: max(LEAST, -(-len(chunks) // PARTS)) for domain, chunks in of.items()}
    starts = dict.fromkeys(of, 0)
    while any(starts[domain] < len(chunks) for domain, chunks in of.items()):
        taken = {d: [starts[d], min(stops[d], len(chunks))] for d, chunks in of.items() if starts[d] < len(chunks)}
        batches = tuple(batch for domain, (start, stop) in taken.items() for batch in of[domain][start:stop])
        yield replace(data, batches=batches, recipe={**data.recipe, "part": taken})
        starts, stops = stops, {domain: 2 * stop for domain, stop in stops.items()}


def _first(data: TokenData, chunks: Mapping[str, int]) -> TokenData:
    """The first chunks of each domain, so many of them, as a part."""
    whole = data.by_chunk()
    taken = (b for d, stop in chunks.items() for b in [b for b in whole.batches if b.domain == d][:stop])
    part = {domain: [0, stop] for domain, stop in chunks.items()}
    return replace(data, batches=tuple(taken), recipe={**data.recipe, "part": part})


def until_stable(
    data: TokenData,
    stable: Stable,
    measure: Measure,
    tell: Callable[[str], object] = lambda line: None,
    whole: Measure | None = None,
) -> Statistics:
    """The sums of as many parts of the text as it takes; `measure(part, number)` measures one.

    Where parts do not add up to what is wanted (`measurement.tiers.at_once`), `whole` measures the text that they are
    when they are enough, all at once, under the number of one more part. The header has one run, whose recipe is that
    of the whole text, and `chunks` of each domain that were measured.
    """
    wanted, held, used = sum(data.tokens.values()), list[Statistics](), dict[str, int]()
    data = stable.asked(data)
    for number, part in enumerate(parts_of(data)):
        held.append(measure(part, number))
        used |= {domain: stop for domain, (_, stop) in part.recipe["part"].items()}
        total = added(held)
        tokens, agreed = sum(total.header["tokens"].values()), stable.agreed(total)
        enough = agreed >= stable.threshold
        then = "that is enough" if enough else "more is measured" if tokens < wanted else "there is no more"
        tell(
            f"{tokens} of {wanted} tokens: sets kept by the two halves of the text are alike to {agreed:.3f} (Jaccard, "
            f"mean over layers); {then}"
        )
        if enough:
            break
    if whole is not None:
        total = whole(_first(data, used), len(held))
    run = (held[0] if whole is None else total).header["runs"][0]
    recipe: dict[str, Any] = {name: value for name, value in run["data"].items() if name != "part"}
    return Statistics({**total.header, "runs": [{**run, "data": recipe, "chunks": used}]}, total.layers)

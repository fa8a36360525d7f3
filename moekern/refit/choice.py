"""Which experts of a layer stay, chosen anew behind layers that are pruned and refitted already (the progressive form
of NAEE, arXiv:2402.14800)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from torch import nn

from moekern.criteria import criterion_named
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.iteration.rounds import needs_text
from moekern.measurement.batch import BatchContext, InFlight
from moekern.measurement.recorder import Recorder, gathered
from moekern.measurement.tiers import backends_of
from moekern.measurement.watch import watching
from moekern.model.layerwise import LayerwiseModel
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.make import make_plan
from moekern.statistics.file import Statistics
from moekern.statistics.header import Source, make_header
from moekern.version import versions

FLAG = "--reestimate"


@dataclass(frozen=True)
class Choice:
    """How experts are scored; each layer keeps as many as the plan says. `domains` None: all of the text."""

    criterion: str
    domains: tuple[str, ...] | None = None
    seed: int = 0

    @staticmethod
    def of(plan: Plan) -> Choice:
        """As a plan was made. Raises InputError for one that was not made by a criterion alone, and for criteria that
        no forward pass measures."""
        told = plan.provenance
        if not isinstance(told.get("criterion"), str):
            raise InputError(f"{FLAG}: the plan does not say by which criterion; take one that moekern made")
        if plan.width is not None:
            raise InputError(f"{FLAG}: the plan says which channels stay of the experts that it keeps; leave one out")
        check_criterion(told["criterion"], guarded=bool(told.get("protect_super") or told.get("guards")))
        domains, seed = told.get("domains", []), told.get("seed", 0)
        if not isinstance(domains, list) or not all(isinstance(d, str) for d in domains) or type(seed) is not int:
            raise InputError(f"{FLAG}: plan: provenance: expected a list of domains, and a seed that is a number")
        return Choice(told["criterion"], tuple(domains) or None, seed)


def check_criterion(criterion: str, *, guarded: bool) -> None:
    """Raise InputError for a criterion that one forward pass of a layer does not measure, and for guards beside it."""
    if guarded:
        raise InputError(f"{FLAG}: some experts are to stay or go whatever their score; leave one of the two out")
    if ":" in criterion:  # code, which a plan may name and nobody here has
        raise InputError(f"{FLAG}: {criterion}: goes with moekern's own criteria; `iterate` takes yours, then `refit`")
    if not needs_text(criterion):
        raise InputError(f"{FLAG}: {criterion} looks at weights alone, which pruned layers before them do not change")


def check_choice(choice: Choice, data: TokenData) -> None:
    """Raise InputError for domains that the text has not."""
    for name in choice.domains or ():
        if name not in data.tokens:
            raise InputError(f"{FLAG}: the plan was made by domain {name!r}, which the text (--data) has not")


class Chooser:
    """Measures a layer, with all of its experts, on the chunks that a variant is fitted to."""

    def __init__(
        self,
        layerwise: LayerwiseModel,
        fitted: TokenData,
        numbers: Sequence[int],
        owners: Sequence[int],
        choice: Choice,
        backend: str | None,
    ) -> None:
        """`numbers` of the units that the chunks belong to, and which rank has each of all units: what a unit has of a
        domain is a segment of it. `backend` of the kernels, None: the device's first."""
        self.layerwise, self.fitted, self.choice = layerwise, fitted, choice
        self.segments, self.owners = list[int](), dict[tuple[str, int], int]()
        units: dict[str, list[int]] = {}
        for chunk, number in zip(fitted.batches, numbers, strict=True):
            of = units.setdefault(chunk.domain, [])
            if number not in of:
                of.append(number)
            self.segments.append(of.index(number))
            self.owners[chunk.domain, of.index(number)] = owners[number]
        self.criterion, self.flight = criterion_named(choice.criterion), InFlight()
        self.backend = backends_of(layerwise.device.type, backend, self.criterion.tiers)
        self.source = Source.of(layerwise.checkpoint, layerwise.layout)
        words = -(-layerwise.vocab_size // 64)
        self.recorder = Recorder(self.source.score, self.criterion.tiers, backend, words, layerwise.team.size > 1)

    @contextmanager
    def watching(self, key: str, layer: nn.Module) -> Iterator[None]:
        """Let the experts of a layer add to its sums."""
        layers = self.layerwise.layout.layers.values()
        empty = any(tensor.trailing for each in layers for tensor in each.tensors)
        with watching(self.layerwise.model, {key: layer}, self.recorder, self.flight, empty_slots=empty):
            yield

    def batch(self, number: int) -> AbstractContextManager[None]:
        """Around the computation of a chunk."""
        batch = self.fitted.batches[number]
        ids = batch.input_ids.reshape(-1).to(self.layerwise.device)
        B, S = batch.input_ids.shape
        return self.flight.batch(BatchContext(batch.domain, (B, S), None, ids, None, self.segments[number]))

    def chosen(self, key: str, count: int, blamed: Callable[[], str | None]) -> LayerPlan:
        """So many experts, by what has been measured of a layer since: the same at all ranks."""
        team = self.layerwise.team
        if team.size > 1:
            gathered(self.recorder, key, team, self.owners, self.layerwise.device)
        return LayerPlan(team.broadcast(self._best(key, count, blamed) if team.first else ()))

    def _best(self, key: str, count: int, blamed: Callable[[], str | None]) -> tuple[int, ...]:
        layout, text = self.layerwise.layout, self.fitted
        sums = self.recorder.take(key, layout.router.top_k, blamed)
        of = replace(self.source, router=layout.router.of(layout.layers[key].num_experts))
        header = make_header(of, tokens=text.tokens, data=text.recipe, backend=self.backend, versions=versions())
        seed, domains = self.choice.seed, self.choice.domains
        plan = make_plan(Statistics(header, {key: sums}), self.criterion, count, seed=seed, domains=domains)
        return plan.layers[key].keep

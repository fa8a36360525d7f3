"""Several plans from one statistics file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from moekern.architectures import Layout, find_layout
from moekern.architectures.twins import router_numbers, same_routers
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.criteria import criterion_named
from moekern.errors import InputError
from moekern.estimation.footprint import Fit, Fitted, largest_count
from moekern.plan.budgets import Budget, bounds_of
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan, whole_router
from moekern.plan.guards import Guards
from moekern.plan.make import make_plan
from moekern.plan.served import served_as
from moekern.plan.targets import Served, Target, check_counts, runs
from moekern.router import Router
from moekern.statistics.file import Statistics


@dataclass(frozen=True)
class Planning:
    """The options of `plan`: one plan for each criterion and each keep."""

    criteria: tuple[str, ...]
    keeps: tuple[float | int, ...]
    domains: tuple[str, ...] | None = None
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    guards: Guards = field(default_factory=Guards)
    targets: tuple[Target, ...] = ()
    mtp: str | None = None
    model: Path | Checkpoint | None = None
    fit: Fit | None = None
    replaced: str | None = None  # what dropped experts become, where they are not gone
    width: int | None = None  # channels that experts are to have; None: all that they have

    def router(self, router: Router) -> Router:
        """A model's router, as far as counts of experts must suit it."""
        return router if self.replaced is None else whole_router(router)

    def served(self, layout: Layout, checkpoint: Checkpoint) -> Served:
        """The model as engines see it: with experts of that width, or constants in the place of some."""
        found = served_as(layout, checkpoint.config).narrowed(self.width)
        return replace(found, replaced=self.replaced is not None)


def check_planning(options: Planning) -> None:
    """Raise InputError for options that no statistics are needed to refuse."""
    if (options.fit is None) == (not options.keeps):
        raise InputError("--keep, --fit: give one of the two")
    if options.fit is not None and options.model is None:
        raise InputError("--fit: needs the checkpoint, whose sizes it looks up: add --model MODEL")
    for criterion in options.criteria:
        criterion_named(criterion)


def make_plans(statistics: Statistics, options: Planning) -> dict[str, Plan]:
    """Name -> plan. Nothing is written before all of them are made. Raises InputError."""
    check_planning(options)
    layout = served = None
    keeps, fit = options.keeps, None
    if options.model is not None:
        checkpoint, layout = _opened(options.model, statistics)
        served = options.served(layout, checkpoint)
        if options.fit is not None:
            fitted = fitted_count(checkpoint, layout, options, options.fit)
            keeps, fit = (fitted.count,), fitted.document(options.fit)
    plans: dict[str, Plan] = {}
    for criterion, keep in product(options.criteria, keeps):
        stem = re.sub(r"[^\w.,()*-]+", "_", criterion).strip("_")
        name = f"{stem}-{keep:g}" if isinstance(keep, float) else f"{stem}-{keep}"
        if name in plans:
            raise InputError(f"--criterion {criterion} --keep {keep}: given twice")
        plans[name] = make_plan(
            statistics, criterion, keep, seed=options.seed, domains=options.domains, budget=options.budget,
            guards=options.guards, targets=options.targets, mtp=options.mtp, fit=fit, served=served,
            replaced=options.replaced,
        )  # fmt: skip
        if layout is not None:
            check_plan(plans[name], layout, statistics.header["fingerprint"], replaced=True)
    return plans


def _opened(model: Path | Checkpoint, statistics: Statistics) -> tuple[Checkpoint, Layout]:
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    layout, measured = find_layout(checkpoint), statistics.header
    if checkpoint.fingerprint == measured["fingerprint"]:
        return checkpoint, layout
    known = measured.get("routers")
    if known and same_routers(known, router_numbers(checkpoint, layout)):
        return checkpoint, layout
    raise InputError(
        f"--model {checkpoint.name}: the statistics were measured on another model (fingerprint "
        f"{measured['fingerprint'][:12]}, this checkpoint has {checkpoint.fingerprint[:12]}), and no twin of it"
    )


def fitted_count(checkpoint: Checkpoint, layout: Layout, options: Planning, fit: Fit) -> Fitted:
    """The most experts a layer that fit, and that router and targets work with. Raises InputError."""
    bounds = bounds_of(options.router(layout.router), multiple_of=options.budget.multiple_of, where="--fit")
    served = options.served(layout, checkpoint)
    legal = [n for n in (bounds.lowest, *bounds.steps()) if runs(n, served, options.targets)]
    whole = "prune" if options.replaced is None else "keep"
    if not legal:
        check_counts("--fit", {"": bounds.lowest}, served, options.targets)
    return largest_count(checkpoint, layout, fit, legal, mtp=options.mtp or whole)

"""What --refit, --refine and --shape ask for, as `run` and `refit` do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moekern.architectures import Layout
from moekern.architectures.widths import narrow_problem, width_problem, widths_held
from moekern.checkpoint.folder import Checkpoint
from moekern.cli import console
from moekern.cli.refitting import DROPPED, REFITTED, Place, refitted
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.estimation.refit import refitted_bytes
from moekern.evaluation.held_out import held_back
from moekern.evaluation.losses import ORIGINAL, Evaluation
from moekern.model.compute import Compute
from moekern.model.journal import Resume
from moekern.model.transformers_api import open_loader
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.guards import Guards
from moekern.plan.served import served_as
from moekern.plan.several import Planning, make_plans
from moekern.plan.shapes import Shape, candidates, parse_shape
from moekern.plan.targets import Target, check_counts, check_width, widths_for
from moekern.refit import Refine, Ridge
from moekern.refit.choice import Choice, check_criterion
from moekern.refit.refine import check_alone
from moekern.refit.refit import Refitting, check_family, refit
from moekern.refit.shapes import best, trial_text, trials
from moekern.refit.stored import check_formats, format_of
from moekern.refit.variants import Variant, all_parts
from moekern.router import count_problem, kept_count, nearest_counts
from moekern.statistics.file import Statistics


@dataclass(frozen=True)
class Work:
    """What `run` has when it comes to refit: the text is fitted to, `judged` tells how good the result is."""

    checkpoint: Checkpoint
    layout: Layout
    statistics: Statistics
    planning: Planning
    data: TokenData
    judged: TokenData
    compute: Compute
    restart: bool

    def plan(self, keep: float | int) -> Plan:
        """The plan of a count."""
        return next(iter(make_plans(self.statistics, replace(self.planning, keeps=(keep,), fit=None)).values()))


@dataclass(frozen=True)
class Refitter:
    """How experts are refitted. `shape`: "auto", or experts x channels; None: whole experts. `computed`: as
    `plan.formats.computed_format` has it."""

    refine: bool = False
    shape: str | None = None
    computed: str = "source"
    re_estimate: bool = False  # experts are chosen anew on the way

    @property
    def named(self) -> Shape | None:
        """The shape that is asked for by name."""
        return None if self.shape is None else parse_shape(self.shape)

    def narrows(self, layout: Layout, width: int | None = None) -> bool:
        """Whether experts may lose channels, of which so many are to stay (None: all, or those of a shape)."""
        if self.shape is not None:
            width = 0 if self.named is None else self.named.width
        return width not in (None, layout.width)

    def check(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        compute: Compute,
        planning: Planning | None = None,
        width: int | None = None,
    ) -> list[str]:
        """Raise InputError for a family that is not refitted, for what several processes cannot do, for a shape that
        the model's experts cannot have, or that a target would not run, and where experts cannot be written as they are
        computed. No tensor but those of an expert of each layer is read. width: the channels that are to stay (None:
        all, or those of a shape). Returns a line for each target that a width costs something on."""
        check_family(layout, checkpoint)
        if self.refine:
            check_alone(compute.team)
        if self.re_estimate and planning is not None:
            for criterion in planning.criteria:
                check_criterion(criterion, guarded=planning.guards != Guards())
        lines = [] if planning is None else self._check_shape(checkpoint, layout, planning)
        format_of(self.computed, checkpoint, layout)
        if not all(layer.plain for layer in layout.layers.values()):
            code, names = compute.trust_remote_code, checkpoint.tensors
            loader = open_loader(checkpoint.folder, None, code, layout, len(names))
            narrow = self.narrows(layout, width)
            check_formats(
                checkpoint, layout, loader, layout.layers,
                lambda layer: all_parts(layer.step, refine=self.refine, narrow=narrow),
            )  # fmt: skip
        return lines

    def narrowed(self, planning: Planning, checkpoint: Checkpoint, layout: Layout) -> Planning:
        """With the width of the experts that there will be, as targets see it: the one that is named, or the widest
        that all of them run. Raises InputError where there is none."""
        if self.shape is None or layout.width is None:
            return planning
        if self.named is not None:
            return replace(planning, width=self.named.width)
        found = [_shapes(keep, checkpoint, layout, planning.targets) for keep in planning.keeps]
        if not all(found):
            engines = ", ".join(map(str, planning.targets))
            raise InputError(f"--shape auto: no shape of experts that hold the share runs on {engines}; name one")
        widest = [max(shape.width for shape in shapes) for shapes in found]
        return replace(planning, width=min(widest)) if widest else planning

    def variant(self, plan: Plan, width: int | None, folder: Path) -> Variant:
        """What is made of a plan."""
        refine, choice = Refine() if self.refine else None, Choice.of(plan) if self.re_estimate else None
        return Variant(REFITTED, plan, width, Ridge(), refine, folder, self.computed, choice)

    def foreseen(self, layout: Layout, count: int) -> tuple[Variant, Variant]:
        """As large as what is made of a plan that keeps so many experts, or those of a shape: the plan is not there."""
        shape = self.named
        experts, width = (count, None) if shape is None else (shape.experts, shape.width)
        plan = Plan(dict.fromkeys(layout.layers, LayerPlan(tuple(range(experts)))))
        return Variant(DROPPED, plan), replace(self, re_estimate=False).variant(plan, width, Path())

    def room(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        kept: Mapping[str, int],
        width: int | None,
        *,
        merges: bool = False,
    ) -> int:
        """Bytes of what is computed of so many experts of each layer, with so many channels (None: all); merges: others
        are merged into them before."""
        dtype = format_of(self.computed, checkpoint, layout).dtype
        narrow = self.narrows(layout, width)
        parts = all_parts(layout.step, refine=self.refine, narrow=narrow, merges=merges)
        return refitted_bytes(checkpoint, layout, kept, all_parts=parts, width=width, dtype=dtype)

    def _check_shape(self, checkpoint: Checkpoint, layout: Layout, planning: Planning) -> list[str]:
        if self.shape is None:
            return []
        what, chosen, targets = f"--shape {self.shape}", self.named, planning.targets
        if chosen is not None and (problem := count_problem(chosen.experts, layout.router)):
            raise InputError(f"{what}: {problem}; {nearest_counts(chosen.experts, layout.router)}")
        if chosen is not None and planning.budget.kind == "uniform":  # else counts are known with the plan
            check_counts(
                what, dict.fromkeys(layout.layers, chosen.experts), planning.served(layout, checkpoint), targets
            )
        return check_narrow(what, None if chosen is None else chosen.width, checkpoint, layout, targets)

    def made(self, work: Work, keep: float | int, place: Place) -> Refitting:
        """The refit of one --keep. The plan from before it is kept."""
        plain = work.plan(keep)
        plan, width = (plain, None) if self.shape is None else self._shaped(work, keep, plain, place)
        plan.save(place.before)
        variants = Variant(DROPPED, plain), self.variant(plan, width, place.folder)
        return refitted(work.checkpoint, work.data, work.judged, variants, work.compute, place, restart=work.restart)

    def _shaped(self, work: Work, keep: float | int, plain: Plan, place: Place) -> tuple[Plan, int | None]:
        """The plan of a shape, and how many channels its experts keep (None: all)."""
        width = work.layout.width
        assert width is not None, "check has looked"
        chosen = self.named
        table: Mapping[str, float] = {}
        if chosen is None:
            shapes = _shapes(keep, work.checkpoint, work.layout, work.planning.targets)
            chosen, table = self._tried(work, shapes, width, place)
        plan = plain if chosen.experts == len(next(iter(plain.layers.values())).keep) else work.plan(chosen.experts)
        said = {"chosen": str(chosen), "keep": keep, **({"tried": dict(table)} if table else {})}
        plan = replace(plan, provenance={**plan.provenance, "shape": said})
        return plan, None if chosen.width == width else chosen.width

    def _tried(self, work: Work, shapes: list[Shape], width: int, place: Place) -> tuple[Shape, Mapping[str, float]]:
        """The best of several shapes, and how far each is from the original, on text that is held back from them."""
        if len(shapes) < 2:
            return shapes[0], {}
        rest, judged = held_back(work.data)
        if not judged.batches:
            raise InputError("--shape auto: too little text to hold some back; give more, or name a shape", kind="data")
        with console.progress("trying shapes") as step:
            found = refit(
                work.checkpoint, trial_text(rest), trials(shapes, work.plan, width), work.compute,
                judged=judged, resume=Resume(place.side, work.restart, console.say), progress=step,
            )  # fmt: skip
        chosen, kl = best(shapes, found.losses)
        rows = [(name, f"{value:.4f}", "taken" if name == str(chosen) else "") for name, value in kl.items()]
        console.show("shapes of the same bytes", ("experts x channels", "KL to original", "choice"), rows)
        return chosen, kl


def _shapes(keep: float | int, checkpoint: Checkpoint, layout: Layout, targets: Sequence[Target]) -> list[Shape]:
    """Those of the bytes of a --keep that targets run."""
    assert layout.width is not None, "check has looked"
    share = keep if isinstance(keep, float) else kept_count(keep, layout.router) / layout.num_experts
    allowed = widths_for(served_as(layout, checkpoint.config), targets, share, widths_held(layout))
    return candidates(layout.router, layout.width, share, allowed)


def check_narrow(
    what: str, width: int | None, checkpoint: Checkpoint, layout: Layout, targets: Sequence[Target]
) -> list[str]:
    """Raise InputError, which begins with `what`, unless the model's experts can become so narrow (None: it is not
    known yet how much) and every target runs that. Returns a line for each target that it costs something on."""
    problem = narrow_problem(checkpoint, layout)
    if layout.width is None or problem:
        raise InputError(f"{what}: {problem or 'experts of several widths'}")
    if width is None:
        return []
    if width > layout.width:
        raise InputError(f"{what}: experts have {layout.width} channels")
    if problem := width_problem(layout, width):
        raise InputError(f"{what}: {problem}")
    return check_width(what, width, served_as(layout, checkpoint.config), targets)


def joined(made: Mapping[str, Refitting]) -> Evaluation | None:
    """Losses of the original and of each target's refit; None where no text was held back."""
    rows = {name: found.losses[REFITTED] for name, found in made.items()}
    first = next(iter(made.values())).losses[ORIGINAL]
    return {ORIGINAL: first, **rows} if first else None

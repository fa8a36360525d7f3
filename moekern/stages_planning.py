"""What the planning commands do: plans from statistics, checks of checkpoints, conversions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from moekern.architectures import Layout, find_layout
from moekern.budgets import Budget, bounds_of, limits_of
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.criteria import criterion_named
from moekern.errors import InputError
from moekern.estimation.footprint import Fit, Fitted, largest_count
from moekern.guards import Guards
from moekern.interchange import exported, read_plan
from moekern.plan import Plan, check_plan
from moekern.planning import make_plan, router_limits
from moekern.statistics.file import Statistics
from moekern.targets import ENGINES, Finding, Served, Target, findings, nearest, runs


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
    model: Path | None = None
    fit: Fit | None = None


@dataclass(frozen=True)
class Report:
    """Where a checkpoint runs: target -> the rules it breaks."""

    folder: str
    family: str
    counts: Mapping[str, int]  # layer key -> experts
    mtp: Mapping[str, int]
    found: Mapping[str, tuple[Finding, ...]]
    nearest: Mapping[str, str]  # of targets that do not run it: counts that would, as the end of a message

    @property
    def good(self) -> bool:
        return not any(finding.stops for row in self.found.values() for finding in row)

    def document(self) -> dict[str, Any]:
        targets = {
            name: {
                "runs": not any(finding.stops for finding in row),
                "findings": [{"stops": finding.stops, "text": finding.text} for finding in row],
            }
            for name, row in self.found.items()
        }
        uniform = len(set(self.counts.values())) == 1
        return {
            "folder": self.folder, "family": self.family, "uniform": uniform, "experts": dict(self.counts),
            "mtp": dict(self.mtp), "targets": targets,
        }  # fmt: skip


def make_plans(statistics: Statistics, options: Planning) -> dict[str, Plan]:
    """Name -> plan. Nothing is written before all of them are made. Raises InputError."""
    if (options.fit is None) == (not options.keeps):
        raise InputError("--keep, --fit: give one of the two")
    for criterion in options.criteria:
        criterion_named(criterion)
    layout = None
    keeps, fit = options.keeps, None
    if options.model is not None:
        checkpoint, layout = _opened(options.model, statistics)
        if options.fit is not None:
            fitted = _fitted(checkpoint, layout, statistics, options, options.fit)
            keeps, fit = (fitted.count,), fitted.document(options.fit)
    elif options.fit is not None:
        raise InputError("--fit: needs the checkpoint, whose sizes it looks up: add --model MODEL")
    plans: dict[str, Plan] = {}
    for criterion, keep in product(options.criteria, keeps):
        stem = re.sub(r"[^\w.,()*-]+", "_", criterion).strip("_")
        name = f"{stem}-{keep:g}" if isinstance(keep, float) else f"{stem}-{keep}"
        if name in plans:
            raise InputError(f"--criterion {criterion} --keep {keep}: given twice")
        plans[name] = make_plan(
            statistics, criterion, keep, seed=options.seed, domains=options.domains, budget=options.budget,
            guards=options.guards, targets=options.targets, mtp=options.mtp, fit=fit,
        )  # fmt: skip
        if layout is not None:
            check_plan(plans[name], layout, statistics.header["fingerprint"])
    return plans


def check_destination(out: Path, plans: int) -> None:
    """Raise InputError when `out` cannot take so many plans: known before anything is measured."""
    if "{}" not in out.name and plans > 1 and out.suffix == ".json":
        raise InputError(f"--out {out}: {plans} plans need a folder, or a name with {{}} in it such as plan-{{}}.json")
    if plans == 1 and out.is_file():
        raise InputError(f"--out {out}: exists already")


def destinations(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """Name -> the file to write. One plan goes to `out`; several, or one where `out` is a folder, to NAME.json in it,
    or, where its name has {} in it, to the files with NAME in that place. Raises InputError for a file that exists."""
    if "{}" in out.name:
        paths = {name: out.with_name(out.name.replace("{}", name)) for name in names}
    elif len(names) > 1 or out.is_dir():
        paths = {name: out / f"{name}.json" for name in names}
    else:
        paths = {names[0]: out}
    for path in paths.values():
        if path.exists() or (path.parent.exists() and not path.parent.is_dir()):
            raise InputError(f"--out {path if path.exists() else path.parent}: exists already")
    return paths


def save_plans(plans: Mapping[str, Plan], paths: Mapping[str, Path]) -> None:
    """Write every plan; a folder for several is made where its parent is there."""
    for name, plan in plans.items():
        folder = paths[name].parent
        if len(plans) > 1 and folder.parent.is_dir():
            folder.mkdir(exist_ok=True)
        plan.save(paths[name])


def check_folder(folder: Path, targets: Sequence[Target] = ()) -> Report:
    """Which targets (none: every engine) run a checkpoint, by its headers and config. Raises InputError."""
    layout = find_layout(open_checkpoint(folder))
    served = _served(layout)
    counts = {key: layer.num_experts for key, layer in layout.layers.items()}
    mtp = {key: layer.num_experts for key, layer in layout.mtp.items()}
    asked = tuple(targets) or tuple(Target(engine) for engine in ENGINES)
    found = {str(target): tuple(findings(target, counts, served, tuple(mtp.values()))) for target in asked}
    near = {
        str(target): nearest(layout.num_experts, served, [target])
        for target in asked
        if not runs(layout.num_experts, served, [target])
    }
    return Report(str(folder), layout.family.name, counts, mtp, found, near)


def convert(path: Path, tool: str, model: Path | None, *, allow_nonuniform: bool = False) -> str:
    """The text of a plan file in another tool's words, or in moekern's. Raises InputError."""
    checkpoint = None if model is None else open_checkpoint(model)
    layout = None if checkpoint is None else find_layout(checkpoint)
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable plan ({error})") from error
    plan = read_plan(text, str(path), layout, allow_nonuniform=allow_nonuniform)
    if checkpoint is None or layout is None:
        if tool != "moekern":
            raise InputError(f"--to {tool}: its names are those of the model's modules: add --model MODEL")
        return plan.to_json()
    check_plan(plan, layout, checkpoint.fingerprint, str(path))
    if tool != "moekern":
        return exported(plan, layout, tool)
    return Plan(plan.layers, {"fingerprint": checkpoint.fingerprint, **plan.provenance}).to_json()


def _opened(model: Path, statistics: Statistics) -> tuple[Checkpoint, Layout]:
    checkpoint = open_checkpoint(model)
    if checkpoint.fingerprint != statistics.header["fingerprint"]:
        raise InputError(
            f"--model {model}: the statistics were measured on another model (fingerprint "
            f"{statistics.header['fingerprint'][:12]}, this checkpoint has {checkpoint.fingerprint[:12]})"
        )
    return checkpoint, find_layout(checkpoint)


def _fitted(checkpoint: Checkpoint, layout: Layout, statistics: Statistics, options: Planning, fit: Fit) -> Fitted:
    bounds = bounds_of(layout, layout.num_experts, multiple_of=options.budget.multiple_of, where="--fit")
    served = Served(statistics.header["family"], statistics.header["score"], router_limits(statistics))
    legal = [n for n in (bounds.lowest, *bounds.steps()) if runs(n, served, options.targets)]
    return largest_count(checkpoint, layout, fit, legal, mtp=options.mtp or "prune")


def _served(layout: Layout) -> Served:
    limits = limits_of(layout, layout.num_experts)
    return Served(layout.family.name, layout.family.score, limits, layout.family.transformers)

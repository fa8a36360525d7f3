"""Dropped experts that become constants: the options of the commands, and what they say of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moekern.errors import InputError

if TYPE_CHECKING:
    from moekern.architectures import Layout
    from moekern.checkpoint.folder import Checkpoint
    from moekern.plan.constants import Measured
    from moekern.plan.document import Plan


def check_replace(kind: str | None) -> str | None:
    """Raise InputError for what no dropped expert becomes."""
    from moekern.plan.replacement import check_kind

    if kind is not None:
        check_kind(kind)
    return kind


def check_form(form: str | None) -> str | None:
    """Raise InputError for a form that is none."""
    from moekern.architectures import substitution

    if form is not None:
        substitution.check_form(form)
    return form


Replace = Annotated[
    str | None,
    typer.Option(
        "--replace",
        help="Dropped experts become constants, and the router stays whole: zero, mean (of their outputs) or "
        "least-squares. vLLM alone loads the result.",
        callback=check_replace,
    ),
]
FormOption = Annotated[
    str | None,
    typer.Option(
        "--form",
        help="With --replace: how config.json says it, compression-config (the default) or approximate-experts.",
        callback=check_form,
    ),
]
ConstantsOf = Annotated[
    Path | None,
    typer.Option("--statistics", help="The statistics file that the constants of replaced experts are made of."),
]


def check_given(replace: str | None, form: str | None, *, refit: bool) -> None:
    """Raise InputError for options of `run` that do not go together."""
    if replace is not None and refit:
        raise InputError("--replace, --refit: what stays is fitted for experts that are gone; give one of the two")
    if form is not None and replace is None:
        raise InputError("--form: goes with --replace")


def check_replaced(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raise InputError for a model whose experts cannot become constants."""
    from moekern.architectures.substitution import replace_problem

    if (problem := replace_problem(checkpoint, layout)) is not None:
        raise InputError(f"--replace: {problem}")


def replaced_plan(plan: Plan, kind: str | None, statistics: Path | None) -> Plan:
    """The plan with its dropped experts replaced, where --replace says by what. Raises InputError."""
    if kind is None:
        return plan
    if plan.replace is not None and plan.replace.constants != kind:
        raise InputError(f"--replace {kind}: the plan has {plan.replace.constants}; leave the flag out, or plan anew")
    if plan.replace is not None:
        return plan
    from moekern.plan.constants import replacing
    from moekern.statistics.file import Statistics

    needed = kind != "zero" and statistics is not None
    return replacing(plan, kind, Statistics.load(str(statistics)) if needed else None)


def vectors_of(plan: Plan, statistics: Path | None, checkpoint: Checkpoint, layout: Layout) -> Measured | None:
    """The constants of a plan; None where these are zeros, or no statistics are given. Raises InputError for
    statistics that nothing asks for, and for others than the plan's."""
    if statistics is None:
        return None
    if plan.replace is None:
        raise InputError("--statistics: the plan drops experts and replaces none; add --replace, or leave it out")
    if plan.replace.tier is None:
        return None
    from moekern.plan.constants import measured
    from moekern.statistics.file import Statistics

    return measured(Statistics.load(statistics), plan.replace, checkpoint, layout)


def replaced_line(count: int) -> str:
    """What has to be known of a checkpoint whose dropped experts are constants."""
    return (
        f"{count} experts are constants, and the router is whole: vLLM loads this (without expert or data parallelism, "
        "EPLB and MoE LoRA); transformers and other engines do not, and `moekern evaluate` measures it"
    )

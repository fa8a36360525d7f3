"""`evaluate --tasks`: scores at tasks of lm-evaluation-harness in the place of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli import console
from moekern.errors import InputError

if TYPE_CHECKING:
    from moekern.model.compute import Compute
    from moekern.plan.document import Plan
    from moekern.tasks import Asked, Score

TasksOption = Annotated[
    str | None,
    typer.Option("--tasks", help="Tasks of lm-evaluation-harness in the place of --data, separated by commas."),
]
TaskDir = Annotated[
    Path | None,
    typer.Option(help="Take tasks from the files in this folder alone, and ask no network. A task file may run code."),
]
Shots = Annotated[
    str | None,
    typer.Option(help="Examples before each question of --tasks, such as 0,1,5. Default: as many as each task has."),
]
Limit = Annotated[int | None, typer.Option(help="Questions of each of --tasks. Default: all.")]
MaxGenToks = Annotated[
    int | None, typer.Option(help="Tokens of an answer that is written, for --tasks. Default: as each task has it.")
]


def asked_of(
    *, tasks: str | None, task_dir: Path | None, shots: str | None, limit: int | None, max_gen_toks: int | None,
    seed: int, text: Sequence[str],
) -> Asked | None:  # fmt: skip
    """Which tasks the options ask for; None where they ask for none. `text`: the sources that they name beside.

    Raises InputError for options that do not go together, and where the harness is not installed.
    """
    more = {"--task-dir": task_dir, "--shots": shots, "--limit": limit, "--max-gen-toks": max_gen_toks}
    if tasks is None:
        for flag, value in more.items():
            if value is not None:
                raise InputError(f"{flag} {value}: goes with --tasks")
        return None
    if text:
        raise InputError("--tasks: goes without --data and --preset: tasks bring their own text")

    from moekern.tasks.settings import Asked, shots_of

    names = tuple(dict.fromkeys(word.strip() for word in tasks.split(",") if word.strip()))
    asked = Asked(names, task_dir, () if shots is None else shots_of(shots), limit, max_gen_toks, seed)
    asked.check()

    from moekern.tasks.harness import check_installed, manager_of

    check_installed()
    if task_dir is not None:  # what is not there is found before a model is downloaded
        manager_of(asked, lambda line: None)
    return asked


def scores_of(
    folder: Path, others: Sequence[Path], plans: Mapping[str, Plan], asked: Asked, compute: Compute, *, restart: bool
) -> tuple[Score, ...]:
    """Of a model, of plans of it, and of other folders. How it goes is said."""
    from moekern.architectures import find_layout
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.cli import pipeline
    from moekern.model.journal import Resume
    from moekern.plan.fits_model import check_plan
    from moekern.tasks import task_scores
    from moekern.tasks.scores import named

    found = list[Any]()
    checkpoints = [open_checkpoint(each) for each in (folder, *others)]
    place = pipeline.place_of_state(checkpoints[0], compute)
    for name, plan in plans.items():
        console.hint(check_plan(plan, find_layout(checkpoints[0]), checkpoints[0], name))
    for number, checkpoint in enumerate(checkpoints):
        own = pipeline.told_compute(compute, checkpoint, find_layout(checkpoint))
        applied = {} if number else plans
        with console.progress(f"asking {checkpoint.name}") as step:
            scores = task_scores(
                checkpoint, applied, asked, own,
                resume=Resume(place, restart, console.say), tell=console.say, progress=step,
            )  # fmt: skip
        found += named(scores, str(others[number - 1])) if number else scores
    return tuple(found)


def document_of(scores: Sequence[Score], asked: Asked) -> dict[str, Any]:
    """As JSON."""
    from moekern.version import versions

    given = {**asdict(asked), "folder": None if asked.folder is None else str(asked.folder)}
    return {
        "asked": given,
        "versions": versions() | {"lm_eval": version("lm_eval")},
        "scores": [asdict(score) for score in scores],
    }


def show_scores(scores: Sequence[Score]) -> None:
    """A row for each task, number of examples and metric; a column for each model."""
    from moekern.tasks.settings import rows

    columns, table = rows(scores)
    console.show("scores ± standard errors", columns, table)

"""Which tasks are asked, and what came of them. Needs no harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moekern.errors import InputError
from moekern.rows import with_error


@dataclass(frozen=True)
class Asked:
    """Tasks of lm-evaluation-harness by name: of those that it brings, or of the task files in `folder` alone, where
    nothing is asked of a network. shots: numbers of examples in front of each question, one after another (none: as
    many as each task has). limit: questions of a task. max_gen_toks: tokens of an answer that is written."""

    tasks: tuple[str, ...]
    folder: Path | None = None
    shots: tuple[int, ...] = ()
    limit: int | None = None
    max_gen_toks: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for what cannot be asked."""
        if not self.tasks:
            raise InputError("--tasks: name some, separated by commas")
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(f"--task-dir {self.folder}: no such folder")
        if any(number < 0 for number in self.shots):
            raise InputError(f"--shots {','.join(map(str, self.shots))}: expected numbers from 0 on, such as 0,1,5")
        for flag, number in {"--limit": self.limit, "--max-gen-toks": self.max_gen_toks}.items():
            if number is not None and number < 1:
                raise InputError(f"{flag} {number}: expected 1 or more")


def shots_of(text: str) -> tuple[int, ...]:
    """--shots as numbers, each once. Raises InputError."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isascii() and word.isdecimal() and len(word) < 7 for word in words):
        raise InputError(f"--shots {text}: expected numbers from 0 on, such as 0,1,5")
    return tuple(dict.fromkeys(map(int, words)))


@dataclass(frozen=True)
class Score:
    """A metric of a task or a group of them, of one model ("original", or a plan's name), over so many questions.

    stderr: None where the harness has none for the metric. filter: how answers were read, "none" where they are as they
    are."""

    model: str
    task: str
    shots: int | None
    metric: str
    filter: str
    value: float
    stderr: float | None
    questions: int | None
    higher_is_better: bool | None


def rows(scores: Sequence[Score]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a table: a row for each task, number of examples and metric; a column for each model."""
    models = tuple(dict.fromkeys(score.model for score in scores))
    table: dict[tuple[str, str, str], dict[str, str]] = {}
    tasks = list(dict.fromkeys(score.task for score in scores))
    for score in sorted(scores, key=lambda score: tasks.index(score.task)):
        metric = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
        shots = "" if score.shots is None else str(score.shots)
        table.setdefault((score.task, shots, metric), {})[score.model] = shown(score)
    return ("task", "shots", "metric", *models), [
        (*key, *(cells.get(model, "") for model in models)) for key, cells in table.items()
    ]


def shown(score: Score) -> str:
    """Value and standard error."""
    return with_error(score.value, score.stderr)

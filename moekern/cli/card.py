"""The command `card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekern.cli.console import say
from moekern.cli.given import check_statistics, result
from moekern.cli.options import Json
from moekern.errors import InputError

Folder = Annotated[Path, typer.Argument(help="A checkpoint that moekern has pruned.")]
EvaluationFile = Annotated[
    Path | None, typer.Option(help="What `evaluate --out` has written: losses, scores or continuations.")
]
RowOption = Annotated[
    str | None, typer.Option(help="With --evaluation: the row that is this model's, where the file does not tell.")
]
NameOption = Annotated[
    str | None, typer.Option(help="With --evaluation: a name under which it stands beside others in the card.")
]
StatisticsFile = Annotated[
    Path | None, typer.Option(help="The statistics that the plan was made of: where the text came from.")
]
BaseModel = Annotated[str | None, typer.Option(help="The id on the hub of the model that was pruned, OWNER/NAME.")]


def card(
    folder: Folder,
    evaluation: EvaluationFile = None,
    row: RowOption = None,
    name: NameOption = None,
    statistics: StatisticsFile = None,
    base_model: BaseModel = None,
    as_json: Json = False,
) -> None:
    """Write an evaluation, the text's sources, or the base model into a pruned checkpoint's README.md; all that stands
    there beside this stays as it is."""
    from moekern.checkpoint.contents import MODEL_CARD
    from moekern.checkpoint.strict_json import read_json
    from moekern.publishing.rewritten import rewrite_card

    for flag, given in (("--row", row), ("--name", name)):
        if given is not None and evaluation is None:
            raise InputError(f"{flag} {given}: goes with --evaluation")
    if evaluation is None and statistics is None and base_model is None:
        raise InputError("--evaluation, --statistics, --base-model: give one or more of them")
    header = digest = None
    if statistics is not None:
        check_statistics(statistics)
        from moekern.statistics.file import Statistics

        loaded = Statistics.load(statistics)
        header, digest = loaded.header, loaded.sha256
    document = None if evaluation is None else read_json(evaluation)
    written = rewrite_card(
        folder, base=base_model, evaluation=document, row=row, name=name, source=str(evaluation),
        header=header, statistics=digest, tell=say,
    )  # fmt: skip
    path = folder / MODEL_CARD
    result({"card": str(path), "written": written}, lambda: say(f"{path}: {', '.join(written)} written"))

"""The command `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekern.cli.console import say, show
from moekern.cli.given import result
from moekern.cli.options import Json
from moekern.files import sized


def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that moekern has pruned.")],
    name: Annotated[
        str, typer.Argument(help="The repository on the hub, OWNER/NAME; it is made where it is not there.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may see it. Default: a private repository.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check folder and card and list the files; ask nothing of the hub.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a pruned checkpoint to the hub, once its files and its card are what they should be."""
    from moekern.publishing.push import checked, upload

    asked = checked(folder, name)
    for note in asked.notes:
        say(note)
    commit = None if dry_run else upload(asked, public=public, tell=say)
    document = {"repository": name, "private": not public, "files": asked.files, "bytes": asked.nbytes}

    def table() -> None:
        rows = [(file, sized(size)) for file, size in asked.files.items()]
        show(f"{name}, {'public' if public else 'private'}", ("file", "size"), [*rows, ("all", sized(asked.nbytes))])
        say(f"nothing was uploaded (--dry-run): {len(rows)} files" if commit is None else f"uploaded: {commit}")

    result({**document, "commit": commit}, table)

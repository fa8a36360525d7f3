"""Commands of which torchrun has started several processes: rank 0 is the command, the others help it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moekern.cli import given
from moekern.team import Member, Team, current

if TYPE_CHECKING:
    from moekern.model.compute import Compute

TOGETHER = (
    "calibrate",
    "evaluate",
    "iterate",
    "lottery",
    "recover",
    "refit",
    "run",
)  # commands whose layers several processes compute
APART = ("prune",)  # that share their work without a word between them


def helping() -> Member | None:
    """This process where another one is the command: it says nothing. Raises InputError for a rank that cannot be."""
    member = Member.of_torchrun()
    return member if member is not None and member.rank > 0 and _command() not in APART else None


def is_needed() -> bool:
    """Whether a helping process has anything to do."""
    return _command() in TOGETHER


def _command() -> str:
    return next((word for word in sys.argv[1:] if not word.startswith("-")), "")


def together(compute: Compute) -> Compute:
    """The same with all processes that torchrun has started. On other ranks than 0 the command ends here, when rank 0
    has nothing more to ask for. Raises InputError where the processes do not find each other."""
    from moekern.team.team import join

    team = join()
    if not team.first:
        team.serve()
        raise typer.Exit
    return replace(compute, team=team)


def folder_of(model: str, revision: str | None, team: Team) -> Path:
    """The folder of a model; a hub id is downloaded once a node."""
    folder = given.folder_of(model, revision)
    team.together(on_other_nodes, model, revision)
    team.meet()
    return folder


def on_other_nodes(model: str, revision: str | None) -> None:
    """The same where rank 0 of a team is not: one process of each node looks for the model."""
    if current().local_rank == 0:
        given.folder_of(model, revision)
    current().meet()

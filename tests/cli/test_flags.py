"""The flags of every command and their defaults, as flags.txt has them: what scripts rely on changes in a diff."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import typer

import moekern as package
from moekern import kernels
from moekern.cli.app import app
from moekern.cli.options import BACKENDS
from moekern.version import __version__
from tests.helpers.commands import moekern

FLAGS = Path(__file__).with_name("flags.txt").read_text()
SPOKEN = ("--quiet", "--verbose", "--log-file")  # of every command, behind its own


def listed() -> str:
    """A line a command, and one for each of its parameters: names, * where it can be repeated, default."""
    lines = []
    command: Any = typer.main.get_command(app)
    for name, each in {"moekern": command, **command.commands}.items():
        lines.append(name)
        assert [p.opts[-1] for p in each.params if p.opts[-1] in SPOKEN] == list(SPOKEN if each is not command else ())
        for parameter in each.params:
            if parameter.opts[-1] in SPOKEN:
                continue
            many = "*" if parameter.multiple or parameter.nargs == -1 else ""
            if parameter.required:
                default = "required"
            else:
                value = parameter.default() if callable(parameter.default) else parameter.default
                default = f"= {value.value if isinstance(value, Enum) else value}"
            names = "/".join((*parameter.opts, *parameter.secondary_opts))
            shown = names if parameter.param_type_name == "option" else names.upper()
            lines.append(f"  {shown}{many} {default}")
    return "\n".join(lines) + "\n"


def test_the_version() -> None:
    done = moekern("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"moekern {__version__}\n", "")
    assert package.__version__ == __version__


def test_the_help_of_backend_names_the_kernels_own() -> None:
    assert kernels.BACKENDS == BACKENDS
    for command in ("calibrate", "iterate"):
        shown = moekern(command, "--help").stdout
        assert all(name in shown for name in BACKENDS)


def test_the_flags_of_every_command() -> None:
    assert listed() == FLAGS

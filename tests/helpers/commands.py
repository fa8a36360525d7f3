"""The command line as a user types it, in this process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from moekern.cli.app import main
from tests.helpers import families


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def moekern(*arguments: object) -> Done:
    """Run the command line in this process."""
    out, err, code = StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["moekern", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def document(*arguments: object) -> dict[str, object]:
    done = moekern(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


_SLOW = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from moekern.cli.app import main
import moekern._C as _C
def slow(*arguments):
    print("writing", flush=True)
    time.sleep(600)
_C.write_file = slow
main()
"""


def signalled(number: signal.Signals, folder: Path, *arguments: object) -> Done:
    """Run `prune`, with relative paths in `folder`, in a process that gets a signal while it writes its first file."""
    command = [sys.executable, "-c", _SLOW, *map(str, arguments)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None
        assert done.stdout.readline() == "writing\n"
        done.send_signal(number)
        out, errors = done.communicate(timeout=60)
    return Done(done.returncode, out, errors)


def model_and_ids(folder: Path, tokens: int = 400, family: str = "qwen3_moe") -> Path:
    """The folder, with a tiny model ("model") and so many token ids ("ids.npy") in it."""
    families.save(family, folder / "model")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(16, 96, tokens))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

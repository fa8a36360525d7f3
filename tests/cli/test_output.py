"""Standard output and error that take nothing."""

from __future__ import annotations

import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO

import pytest

from moekern.cli.app import main


def test_a_full_standard_output() -> None:
    told = StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stderr(told),
        suppress(OSError),
        open("/dev/full", "w") as full,
    ):
        patch.setattr("sys.argv", ["moekern", "criteria"])
        with redirect_stdout(full), pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
    assert told.getvalue() == "moekern: standard output: not finished: No space left on device\n"


@pytest.mark.parametrize(("arguments", "code"), [(("criteria",), 0), (("criteria", "--json"), 0), (("score", "no"), 2)])
@pytest.mark.parametrize("redirected", [">&- 2>&- <&-", "2>/dev/full >/dev/null"], ids=["closed", "full"])
def test_nowhere_to_write(arguments: tuple[str, ...], code: int, redirected: str) -> None:
    command = f"exec {sys.executable} -m moekern {' '.join(arguments)} {redirected}"
    assert subprocess.run(["/bin/sh", "-c", command], check=False).returncode == code

"""Options of `evaluate --tasks`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moekern.demo import MODEL
from tests.helpers.commands import moekern

TASKS = ("--tasks", "little")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TASKS, "--tasks: needs lm-evaluation-harness: pip install 'moekern[eval]'"),
        ((*TASKS, "--shots", "0,many"), "--shots 0,many: expected numbers from 0 on, such as 0,1,5"),
        ((*TASKS, "--limit", 0), "--limit 0: expected 1 or more"),
        ((*TASKS, "--task-dir", "nowhere"), "--task-dir nowhere: no such folder"),
        ((*TASKS, "--preset", "code"), "--tasks: goes without --data and --preset: tasks bring their own text"),
        (("--tasks", ","), "--tasks: name some, separated by commas"),
        (("--shots", 1), "--shots 1: goes with --tasks"),
        ((MODEL,), f"{MODEL}: a folder, and no plan; give --tasks to score other models beside"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    options: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    done = moekern("evaluate", MODEL, *options, "--out", tmp_path / "out.json")
    assert (done.returncode, done.stderr) == (2, f"moekern: {message}\n")
    assert not (tmp_path / "out.json").exists()

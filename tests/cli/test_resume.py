"""Commands that are killed while text streams through a model: the same command goes on, and ends with the same bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import killed
from tests.helpers.commands import contents, model_and_ids

Command = Callable[[Path], tuple[object, ...]]
TIERS = ("outliers", "coalitions", "vocabulary", "gradient", "weights", "replay")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, token ids, and a plan."""
    return model_and_ids(tmp_path_factory.mktemp("resume"))


def text(work: Path, tokens: int = 200) -> tuple[object, ...]:
    return ("--data", f"a={work / 'ids.npy'}", "--data", f"b={work / 'ids.npy'}:2", "--sequence-length", 40,
            "--tokens", tokens, "--dtype", "fp32")  # fmt: skip


def commands(work: Path) -> dict[str, Command]:
    model = work / "model"
    tiers = [each for tier in TIERS for each in ("--tier", tier)]
    options = ("--keep", 2, "--rounds", 3, "--criterion", "reap")
    return {
        "calibrate": lambda out: ("calibrate", model, *text(work), "--out", out),
        "tiers": lambda out: ("calibrate", model, *text(work), *tiers, "--replay-tokens", 20, "--out", out),
        "iterate": lambda out: ("iterate", model, *text(work), *options, "--out", out),
        "evaluate": lambda out: ("evaluate", model, work / "plan.json", *text(work), "--json", "--spill", out.parent),
        "run": lambda out: ("run", model, *text(work, 400), "--keep", 4, "--no-forward", "--out", out),
    }


def made(folder: Path, done: killed.Done) -> dict[str, object]:
    """All that a command has left, and what it printed where that is the result."""
    assert done.returncode == 0, done.stderr
    return {**contents(folder), "printed": done.stdout if done.stdout.startswith("{") else ""}

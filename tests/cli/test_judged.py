"""What `evaluate` says of plans: how sure losses are, and which of them the text tells apart."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.evaluation.losses import ORIGINAL
from moekern.plan.document import LayerPlan, Plan
from tests.helpers import families
from tests.helpers.commands import moekern

PLANS = {"half": (0, 2, 5, 7), "same": (0, 2, 5, 7), "less": (0, 1)}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Any]:
    """A folder with what `evaluate` wrote of three plans, two of which are the same; what it showed; its JSON."""
    folder = tmp_path_factory.mktemp("judged")
    families.save("qwen3_moe", folder / "model")
    layers = find_layout(open_checkpoint(folder / "model")).layers
    for name, keep in PLANS.items():
        Plan({layer: LayerPlan(keep) for layer in layers}).save(folder / f"{name}.json")
    for seed, name in enumerate("ab"):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).integers(0, 96, 240))
    data = [word for name in "ab" for word in ("--data", f"{name}={folder / name}.npy")]
    command = ("evaluate", folder / "model", *(folder / f"{n}.json" for n in PLANS), *data, "--sequence-length", 24)
    shown = moekern(*command, "--layers", "--out", folder / "losses.csv")
    assert shown.returncode == 0, shown.stderr
    found = moekern(*command, "--layers", "--out", folder / "losses.json", "--json")
    return folder, shown.stdout + shown.stderr, json.loads(found.stdout)


def test_losses_have_errors_and_differences_are_paired(judged: tuple[Path, str, Any]) -> None:
    folder, _, document = judged
    assert json.loads((folder / "losses.json").read_text()) == document
    half = document["losses"][str(folder / "half.json")]["a"]
    assert half["sequences"] == 10
    assert half["kl_error"] > 0
    pairs = {(Path(d["plan"]).stem, Path(d["than"]).stem, d["metric"]): d for d in document["differences"]}
    assert len(pairs) == 6
    same = pairs.get(("half", "same", "kl")) or pairs["same", "half", "kl"]
    assert (same["mean"], same["low"], same["high"], same["clear"]) == (0, 0, 0, False)
    worse = pairs["less", "half", "kl"]
    assert 0 < worse["low"] < worse["mean"] < worse["high"]


def test_the_same_as_rows(judged: tuple[Path, str, Any]) -> None:
    folder, _, document = judged
    rows = list(csv.DictReader((folder / "losses.csv").read_text().splitlines()))
    assert [(row["plan"], row["domain"]) for row in rows][:2] == [(ORIGINAL, "a"), (ORIGINAL, "b")]
    for row in rows:
        if row["axis"] == "text":
            assert float(row["nll"]) == document["losses"][row["plan"]][row["domain"]]["nll"]
        elif row["axis"] == "layer":
            of = document["layers"][row["plan"]][row["domain"]][row["from"]]
            assert [row[name] for name in of] == ["" if value is None else str(value) for value in of.values()]
    assert {row["axis"] for row in rows} == {"text", "position", "entropy", "layer"}
    half = str(folder / "half.json")
    buckets = [row for row in rows if (row["plan"], row["domain"], row["axis"]) == (half, "a", "position")]
    assert [(row["from"], row["to"]) for row in buckets] == [
        ("1", "1"),
        ("2", "3"),
        ("4", "7"),
        ("8", "15"),
        ("16", "31"),
    ]
    assert [float(row["kl"]) for row in buckets] == [each["kl"] for each in document["by_position"][half]["a"]]
    assert sum(int(row["tokens"]) for row in buckets) == document["losses"][half]["a"]["tokens"]
    assert sum(each["tokens"] for each in document["by_entropy"][half]["a"]) == 230


def test_what_is_shown(judged: tuple[Path, str, Any]) -> None:
    _, shown, _ = judged
    assert " ± " in shown
    assert shown.index("which is nearest to the original") < shown.index("chosen")
    assert "20 sequences are too few to tell" in shown
    assert "layers whose output is farthest from the original's" in shown
    assert "bits a byte: not told, since no tokenizer.json" in shown  # the model has none


def test_no_file_of_another_kind_and_none_that_is_there(judged: tuple[Path, str, Any], tmp_path: Path) -> None:
    folder, _, _ = judged
    command = ("evaluate", folder / "model", "--data", f"a={folder / 'a.npy'}", "--out")
    assert "losses are written as .json or .csv" in moekern(*command, tmp_path / "losses.txt").stderr
    assert moekern(*command, folder / "losses.csv").returncode == 2

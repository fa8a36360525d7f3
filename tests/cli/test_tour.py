"""The tour on the model that ships with moekern: verified, and sum-based criteria ahead of random dropping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moekern.cli import console, tour
from moekern.cli.app import app
from moekern.cli.tour import EVALUATION_TOKENS, SHOWN
from moekern.demo import MODEL, TEXT

SHARES = (0.75, 0.5, 0.25)


@pytest.mark.parametrize(
    ("tokens", "seeds"),
    [(768, 2), pytest.param(EVALUATION_TOKENS, 3, marks=pytest.mark.whole)],
    ids=["short", "as is"],
)
def test_the_tour(tokens: int, seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default with an eighth of the text that criteria are compared on."""
    monkeypatch.setattr(tour, "EVALUATION_TOKENS", tokens)
    monkeypatch.setattr(tour, "REFIT_TOKENS", 8 * tokens)
    with console.output(False):
        result = CliRunner().invoke(app, ["demo", "--json", "--seeds", str(seeds), "--out", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stderr.splitlines()]
    stages = dict.fromkeys(line["stage"].split()[0] for line in told if "stage" in line)
    first = ["calibrating", "evaluating", "pruning", "verifying", "comparing", "refitting"]
    assert list(stages) == [*first, "the", "looking", "training"]  # the original's predictions
    assert any(line.get("note", "").startswith("generated: ") for line in told)
    document = json.loads(result.stdout)
    assert document["verified"]["good"]
    assert all(document["generated"].values())
    rows = {(row["criterion"], row["kept"]): row for row in document["rows"]}
    assert set(rows) == {("original", 1.0), *((name, share) for name in SHOWN for share in SHARES)}
    original = rows["original", 1.0]
    fitted = {name: sum(x["nll"] for x in row.values()) / len(row) for name, row in document["refit"].items()}
    assert fitted["original"] < fitted["refitted"] < fitted["dropped"]
    before, after = (sum(x["kl"] for x in document["recover"][when].values()) for when in ("before", "after"))
    assert 0 < after < before
    assert set(original["loss"]) == {path.name for path in TEXT.iterdir() if path.is_dir()}
    for share in SHARES:
        random = rows["random", share]
        assert random["best"] < random["mean"] < random["worst"]
        for name in ("gate_mass", "ean", "gated_norm"):
            assert original["mean"] < rows[name, share]["mean"] < random["best"] - 0.2
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"statistics.safetensors", "plan.json", "pruned"}


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--out", str(MODEL)]])
def test_wrong_options_write_nothing(arguments: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in MODEL.iterdir()}
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code != 0
    assert {path: path.stat().st_mtime_ns for path in MODEL.iterdir()} == before


def test_what_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.parent.rglob("*") if path.is_file()) < 12_000_000

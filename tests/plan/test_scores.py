"""The scores of all layers, for programs and notebooks."""

import csv
from pathlib import Path

import pytest

import moekern
from moekern.criteria import criterion_named, score_layer
from tests.helpers.measured import model_statistics


def test_scores_are_those_of_each_layer(tmp_path: Path) -> None:
    statistics = model_statistics()
    scores = moekern.score(statistics, "hope", ["code"])
    for key in statistics.layers:
        sums = statistics.layer(key, ["code"])
        assert scores.layers[key] == score_layer(criterion_named("hope"), sums, key).tolist()
    rows = scores.to_rows()
    for key, values in scores.layers.items():
        mine = [row for row in rows if row["layer"] == key]
        assert [row["score"] for row in mine] == values
        best = min(mine, key=lambda row: row["rank"])
        assert best["score"] == max(values)
        assert sorted(row["rank"] for row in mine) == list(range(len(values)))
    scores.to_csv(tmp_path / "s.csv")
    read = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert [float(row["score"]) for row in read] == [row["score"] for row in rows]
    assert repr(scores) == f"Scores(hope, {len(statistics.layers)} layers)"
    assert "<table>" in scores._repr_html_()


def test_what_cannot_be_scored() -> None:
    with pytest.raises(moekern.InputError, match="nothing"):
        moekern.score(model_statistics(), "nothing")
    with pytest.raises(TypeError, match="statistics: expected Statistics, got str"):
        moekern.score("s.safetensors")  # type: ignore[arg-type]

"""Statistics and plans in a notebook: short words, rows, CSV, and HTML in which names are escaped."""

from __future__ import annotations

import csv
from pathlib import Path

from moekern.plan.document import LayerPlan, Plan
from moekern.plan.make import make_plan
from moekern.rows import SHOWN, csv_text, html_table
from tests.helpers.measured import model_statistics


def test_statistics_as_rows(tmp_path: Path) -> None:
    s = model_statistics()
    rows = s.to_rows()
    domains = {key: list(parts) for key, parts in s.layers.items()}
    assert len(rows) == sum(s.num_experts(key) * len(names) for key, names in domains.items())
    for key in s.layers:
        counts = [row["tokens"] for row in rows if row["layer"] == key]
        assert sum(counts) == int(s.layer(key).count.sum())  # type: ignore[arg-type]
    s.to_csv(tmp_path / "new" / "s.csv")
    with (tmp_path / "new" / "s.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["norm_sum"]) for row in read] == [row["norm_sum"] for row in rows]
    assert len(repr(s)) < 300
    assert "qwen3" in repr(s) or s.header["family"] in repr(s)


def test_a_plan_as_rows(tmp_path: Path) -> None:
    plan = make_plan(model_statistics(), "gated_norm", 3)
    rows = plan.to_rows()
    for key, layer in plan.layers.items():
        assert [row["expert"] for row in rows if row["layer"] == key and row["kept"]] == list(layer.keep)
        assert tuple(row["score"] for row in rows if row["layer"] == key) == layer.scores
    plan.to_csv(tmp_path / "plan.csv")
    assert (tmp_path / "plan.csv").read_text() == csv_text(rows)
    assert repr(plan).startswith("Plan(3 of 6 experts")
    assert "gated_norm" in repr(plan)


def test_a_plan_of_ones_own() -> None:
    plan = Plan({"0": LayerPlan((1, 3)), "1": LayerPlan((0, 1, 2))})
    assert plan.to_rows()[0] == {"layer": "0", "expert": 1, "kept": True, "score": None}
    assert repr(plan).startswith("Plan(2 to 3 experts in each of 2 layers")
    assert csv_text([]) == ""


def test_html_escapes_and_ends() -> None:
    shown = html_table("<b>", [{"a<": "<script>"}] * (SHOWN + 2))
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert shown.count("<tr>") == SHOWN + 1
    assert "2 rows more" in shown
    assert "<table>" in make_plan(model_statistics(), "gated_norm", 3)._repr_html_()
    assert "<table>" in model_statistics()._repr_html_()

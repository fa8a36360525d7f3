"""The benches of merging and of factoring: the tables of the page are those of the records, and what is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import factoring
from bench.criteria import read
from bench.merging import markdown
from tests.helpers import ROOT


def test_the_table_of_the_page_is_the_records() -> None:
    lines = read(ROOT / "bench/records/vm3-merging.jsonl")
    assert markdown(lines) in (ROOT / "docs/merging.md").read_text()
    assert {line["seed"] for line in lines} == {0, 1, 2}


def test_the_table_of_factors_is_the_records() -> None:
    lines = read(ROOT / "bench/records/vm3-factoring.jsonl")
    assert factoring.markdown(lines) in (ROOT / "docs/merging.md").read_text()
    assert {line["seed"] for line in lines} == {0, 1, 2}


@pytest.mark.whole
def test_what_is_factored_is_measured_beside_what_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.jsonl"
    given = ("--seeds", 0, "--tokens", 3072, "--held-out-tokens", 768, "--out", out, "--work", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.factoring", *map(str, given)])
    factoring.main()
    before, lines = out.read_text(), {(line["base"], line["what"]): line for line in read(out)}
    assert len(lines) == 9
    whole, made = (lines["gated_square, dropped", what] for what in (factoring.AS_IT_IS, factoring.FACTORED))
    assert (whole["bytes"], whole["mean"] < made["mean"]) == (0.5, True)
    assert 0.15 < made["bytes"] < 0.2
    factoring.main()  # nothing is left to measure
    assert out.read_text() == before

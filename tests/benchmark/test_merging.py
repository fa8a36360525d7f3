"""The bench of merging: the table of the page is that of the record."""

from __future__ import annotations

from bench.criteria import read
from bench.merging import markdown
from tests.helpers import ROOT


def test_the_table_of_the_page_is_the_records() -> None:
    lines = read(ROOT / "bench/records/vm3-merging.jsonl")
    assert markdown(lines) in (ROOT / "docs/merging.md").read_text()
    assert {line["seed"] for line in lines} == {0, 1, 2}

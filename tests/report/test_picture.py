"""The picture: a PNG of any report, whatever names files give."""

from __future__ import annotations

import pytest

from moekern.plan.make import make_plan
from moekern.report.collect import report_of
from moekern.report.picture import picture_of
from tests.helpers.measured import model_statistics

pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'moekern[report]'")
ODD = "_$\\frac{x" + "\u65e5\u672c" * 40


def test_a_picture_with_and_without_plans_whatever_they_are_called() -> None:
    statistics = model_statistics(layers=("$^{", "_1"), domains=("a", "b"))
    pictures = [picture_of(report_of(statistics, plans)) for plans in ({}, {ODD: make_plan(statistics, "usage", 4)})]
    for picture in pictures:
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")) == (1500, 600)
    assert pictures[0] != pictures[1]

"""The page in a browser: nothing goes wrong, and pointing, keys and choices do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moekern.plan.make import make_plan
from moekern.report.collect import report_of
from moekern.report.page import page_of
from tests.helpers.browser import CHROMIUM, probed
from tests.helpers.measured import model_statistics

MARK = "<img src=x onerror=\"document.title='x'\">"
pytestmark = [pytest.mark.whole, pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")]


def evaluated(plans: list[str]) -> dict[str, Any]:
    """What `evaluate` writes, of two domains."""
    loss = {"nll": 1.0, "kl": 0.5, "top1": 0.5, "tokens": 9, "sequences": 2, "kl_error": 0.25, "one_minus_tv": 0.75}
    rows = [{**loss, "from": 1, "to": 1}, {**loss, "from": 2, "to": 3}]
    layer = {"error": 0.5, "orphans": 0.25}

    def of_each(what: Any) -> dict[str, Any]:
        return {name: {MARK: what} for name in plans}

    return {
        "losses": {"original": {MARK: loss}, **of_each(loss)},
        **{f"by_{axis}": of_each(rows) for axis in ("position", "entropy")},
        "layers": of_each({"0": layer, "2": layer}),
    }  # fmt: skip


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_works_in_a_browser(width: int, dark: bool, tmp_path: Path) -> None:
    statistics = model_statistics(domains=(MARK, "code"))
    plans = {f"{name}{MARK}": make_plan(statistics, name, 4) for name in ("reap", "usage")}
    page = tmp_path / "report.html"
    page.write_text(page_of(report_of(statistics, plans, evaluated(list(plans)), names={name: name for name in plans})))
    seen, console = probed(page, width=width, dark=dark)
    assert console == []
    assert seen["wrong"] == []
    assert seen["width"] == width
    assert seen["wide"] <= width, "only what scrolls by itself may be wider"
    count = statistics.layer("0").count.tolist()
    assert seen["cell"].startswith(f"layer 0, expert 0\ntokens: {count[0]}\n")
    assert MARK in seen["cell"]
    assert seen["key"].startswith(f"layer 0, expert 1\ntokens: {count[1]}\n")
    assert "of the experts removed" in seen["curve"]
    assert seen["bucket"].startswith("position 1\n")
    assert f"usage{MARK}: KL 0.5 ± 0.25" in seen["bucket"]
    assert "evaluated: orphans: 25.0 %" in seen["strip"]
    assert seen["strip"].startswith("layer 0\nsaliency at the cut")
    assert seen["pairs"] == "expert 0"
    assert seen["alike"].startswith("layer 0, experts 0 and 1\ncosine ")
    assert MARK in seen["domains"]
    assert seen["layer"] == "layer 2"
    assert seen["before"] != seen["after"]
    assert "tokens:" not in seen["other"]
    assert (seen["dark"] == "rgb(20, 23, 28)") == dark


def test_a_page_without_plans_and_with_one_domain(tmp_path: Path) -> None:
    statistics = model_statistics(domains=("code",))
    page = tmp_path / "report.html"
    page.write_text(page_of(report_of(statistics, {})))
    seen, console = probed(page, width=390)
    assert (console, seen["wrong"]) == ([], [])
    assert "share of slots" not in seen["domains"]
    assert seen["cell"].startswith("layer 0, expert 0")
    assert seen["layer"] == "layer 2"

"""The comparison of constants: the table of its record, which docs/substitution.md has."""

from __future__ import annotations

import sys

import pytest

from bench import substitution
from tests.helpers import ROOT


def test_the_page_has_the_table_of_the_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = ROOT / "bench" / "records" / "vm3-substitution.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench.substitution", "--show", str(record)])
    substitution.main()
    shown = capsys.readouterr().out
    assert "| 50% | least-squares |" in shown
    assert shown in (ROOT / "docs" / "substitution.md").read_text()

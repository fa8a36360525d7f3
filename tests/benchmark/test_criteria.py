"""The comparison of criteria: its lines, its tables, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import criteria


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.criteria", *map(str, arguments)])
    criteria.main()


def test_lines_tables_and_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.jsonl"
    arguments = (
        "--criteria", "reap", "random", "--iterated", "reap", "--shares", 0.5, "--rounds", 2, "--tokens", 768,
        "--held-out-tokens", 768, "--batch-size", 8, "--out", out,
    )  # fmt: skip
    run(monkeypatch, *arguments, "--seeds", 1)
    before = out.read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    methods = {"one-shot", "c alone", "re-estimated", "2 rounds", "2 rounds, re-estimated"}
    assert {(line["criterion"], line["method"]) for line in lines} == {
        ("original", ""), ("random", "one-shot"), *(("reap", method) for method in methods),
    }  # fmt: skip
    for line in lines:
        assert line["mean"] == pytest.approx(sum(line["loss"].values()) / 6, abs=1e-6)
        assert (line["mean_kl"] > 0.01) == (line["criterion"] != "original")
        assert 0 <= line["mean_top1"] <= 1
    run(monkeypatch, *arguments, "--seeds", 1)  # nothing is left to measure
    assert out.read_text() == before
    second = "".join(json.dumps({**line, "seed": 1, "mean": line["mean"] + 0.2}) + "\n" for line in lines)
    out.write_text(before + second)
    capsys.readouterr()
    run(monkeypatch, "--show", out)
    shown = capsys.readouterr().out
    assert "| criterion | loss, 50% | KL, 50% | top-1, 50% |" in shown
    assert "| reap | 50% | 2 rounds, re-estimated |" in shown
    assert "other end" not in shown
    assert "±" in shown


def test_both_ends_stand_side_by_side() -> None:
    def line(criterion: str, seed: int, mean: float) -> dict[str, object]:
        return {"criterion": criterion, "share": 0.5, "method": "one-shot", "seed": seed, "mean": mean}

    lines = [line("ego", 0, 4.0), line("ego", 1, 4.2), line("inverse(ego)", 0, 3.0), line("inverse(ego)", 1, 3.2),
             line("reap", 0, 3.5)]  # fmt: skip
    header, rows = criteria.by_end(lines)
    assert header == ["criterion", "drop first", "kept", "loss", "loss, the other end first"]
    assert rows == [["ego", "min (inferred)", "50%", "4.100 ± 0.100", "3.100 ± 0.100"]]

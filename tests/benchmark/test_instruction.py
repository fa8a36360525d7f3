"""The study of instruction following at toy size: its lines, its table, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import instruction

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


@pytest.mark.whole
def test_all_models_get_the_same_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "i.jsonl"
    arguments = ["--shares", "0.25", "--questions", "1", "--steps", "2", "--shots", "0,1", "--out", out]
    arguments += ["--tokens", "2048", "--train", "router", "--work", tmp_path]

    def run(*more: object) -> list[dict[str, object]]:
        monkeypatch.setattr(sys, "argv", ["bench.instruction", *map(str, (*arguments, *more))])
        instruction.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    lines = run()
    helps = {(line["kept"], line["task"], line["help"]) for line in lines}
    tasks, ways = ("continuation", "language"), ("0-shot", "1-shot", "tuned")
    assert helps == {(kept, task, way) for kept in ("original", "25%") for task in tasks for way in ways}
    assert len(lines) == len(helps)
    assert {line["questions"] for line in lines} == {6}
    assert {line["lessons"] for line in lines} == {48}
    table = capsys.readouterr().out
    assert "| task | metric | kept | 0-shot | 1-shot | tuned |" in table
    assert run() == lines  # nothing is left to measure

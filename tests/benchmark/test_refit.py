"""The comparison of refits: its lines, its tables, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import refit
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.refit import Refine, Ridge


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.refit", *map(str, arguments)])
    refit.main()


@pytest.mark.whole  # as test_criteria.py, whose bench has the same form
def test_lines_tables_and_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, short = tmp_path / "r.jsonl", {"ridge": (Ridge(), None), "ridge, refine": (Ridge(), Refine(epochs=1))}
    monkeypatch.setattr(refit, "FITS", short)
    arguments = "--shares", 0.5, "--tokens", 3072, "--held-out-tokens", 768, "--out", out
    run(monkeypatch, *arguments, "--seeds", 0)
    before = out.read_text()
    lines = {line["method"]: line for line in map(json.loads, before.splitlines())}
    assert tuple(lines) == ("original", "dropped", "re-estimated", "ridge", "shape, ridge", "ridge, refine",
                            "shape, ridge, refine")  # fmt: skip
    assert lines["original"]["mean"] < lines["ridge"]["mean"] < lines["dropped"]["mean"]
    assert lines["shape, ridge"]["shape"] in lines["shape, ridge"]["tried"]
    assert all(line["cpu_seconds"] >= 0 for name, line in lines.items() if name != "original")
    run(monkeypatch, *arguments, "--seeds", 0)  # nothing is left to measure
    assert out.read_text() == before
    second = "".join(json.dumps({**line, "seed": 1, "mean": line["mean"] + 0.2}) + "\n" for line in lines.values())
    out.write_text(before + second)
    capsys.readouterr()
    run(monkeypatch, "--show", out)
    shown = capsys.readouterr().out
    assert "| kept | method | loss | gain over dropping |" in shown
    assert f"| 50% | dropped | {lines['dropped']['mean'] + 0.1:.3f} ± 0.100 |  |" in shown
    assert "| 50% | ridge |" in shown


def test_shapes_of_experts_that_cannot_be_narrower_are_refused_before_anything_is_computed(
    family_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "timed", lambda made: 1 / 0)
    checkpoint, none = open_checkpoint(family_checkpoint("deepseek_v4")), TokenData((), {})
    draw = refit.Draw(checkpoint, none, none, "gated_norm", SimpleNamespace(), 0.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no shapes to try: .* its shared expert has the width of the others"):
        draw.shape(0.5)

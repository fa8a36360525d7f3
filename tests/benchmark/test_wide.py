"""The bench of text larger than memory, at small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import wide


@pytest.mark.whole  # three processes that load the libraries
def test_every_command_holds_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["wide", "--tokens", "4k", "--gigabytes", "2", "--folder", str(tmp_path)])
    wide.main()
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["command"] for line in lines] == ["estimate", "calibrate", "evaluate"]
    assert all(0 < line["peak"] < 2e9 and line["notes"] for line in lines)
    assert lines[0]["calibrate"]["memory"]["hidden states"] == 4000 * (2 * 7168 + 8)
    assert not list(tmp_path.iterdir())

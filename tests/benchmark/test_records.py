"""A record of times grows line by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moekern.benchmark.records import append
from moekern.errors import InputError


def test_lines_are_appended(tmp_path: Path) -> None:
    append(None, [{"a": 1}])
    append(tmp_path / "new" / "r", [{"a": 1}, {"a": 2}])
    append(tmp_path / "new" / "r", [{"a": 3}])
    assert [json.loads(line)["a"] for line in (tmp_path / "new" / "r").read_text().splitlines()] == [1, 2, 3]


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^/dev/full: not finished: No space left on device$"):
        append(Path("/dev/full"), [{"a": 1}])
    (tmp_path / "f").touch()
    with pytest.raises(InputError, match="f/r: not finished: .*/f: (Not a directory|File exists)$"):
        append(tmp_path / "f" / "r", [])

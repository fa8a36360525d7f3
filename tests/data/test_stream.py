"""Text is tokenised by several processes, and what becomes of it does not depend on how many."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moekern.data import process
from moekern.data.read import read_data
from moekern.errors import InputError
from tests.helpers.text import CALLS, folder_of


def rows(count: int) -> list[str]:
    """Conversations, of which some are of no use, and some make the template say something."""
    lines = []
    for n in range(count):
        said: dict[str, Any] = {"role": "user", "content": f"{n} " * (n % 40 + 1)}
        if n % 7 == 3:
            said["content"] = [{"type": "text", "text": str(n)}, {"type": "image"}]
        row: dict[str, Any] = {"messages": [said]}
        if n % 90 == 80:
            row["messages"].append({"role": "assistant", "content": "x", "reasoning_content": "because"})
        lines.append("{" if n % 11 == 5 else json.dumps(row))
    return lines


def write(folder: Path, kind: str) -> Path:
    path = folder / f"d.{kind}"
    if kind == "txt":
        path.write_text("".join(f"line {n}\n" for n in range(300_000)))
    else:
        path.write_text("\n".join(rows(20_000)))
    return path


KINDS = [("jsonl", True), ("jsonl", False), ("txt", True)]


@pytest.mark.parametrize(
    ("kind", "pack", "tokens"),
    [
        *(pytest.param(kind, pack, 300, marks=pytest.mark.whole) for kind, pack in KINDS),
        ("jsonl", True, 40_000),
        *(pytest.param(kind, pack, 40_000, marks=pytest.mark.whole) for kind, pack in KINDS[1:]),
        *((kind, pack, None) for kind, pack in KINDS),
    ],
)
def test_the_number_of_processes_changes_nothing(
    kind: str, pack: bool, tokens: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = folder_of(tmp_path / "model", CALLS), write(tmp_path, kind)
    if tokens is None:
        path.write_bytes(path.read_bytes()[:200_000])
    found = []
    for count in (1, 2, 5):
        monkeypatch.setattr("moekern.data.tokenizer.os.sched_getaffinity", lambda pid, count=count: range(count))
        told: list[str] = []
        data = read_data([str(path)], folder, tokens=tokens, sequence_length=64, pack=pack, tell=told.append)
        found.append((data.recipe, told, [batch.input_ids.tolist() for batch in data.batches]))
    assert found[0] == found[1] == found[2]
    assert bool(found[0][0]["sources"]["text"]["left_out"]) == (kind == "jsonl" and tokens != 300)


def test_an_error_beyond_what_is_needed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[Any]):
        def shuffle(self, seed: int, buffer_size: int) -> Rows:
            return self

        def __iter__(self) -> Iterator[Any]:
            yield {"text": "x"}
            yield {"text": "y" * 1000}
            raise OSError("gone")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: Rows()))
    folder = folder_of(tmp_path / "model")
    # The first row has fewer characters than tokens are wanted, and so has all that there is in the second case.
    assert sum(read_data(["org/set:1k"], folder, sequence_length=64, tell=print).tokens.values()) == 1000
    with pytest.raises(InputError, match="not to be had from the hub: gone"):
        read_data(["org/set:2k"], folder, sequence_length=64, tell=print)


def test_conversations_that_fail_slowly_end_the_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for i in range(99999) %}{% endfor %}{{ raise_exception('no') }}"
    folder, path = folder_of(tmp_path / "model", loop), tmp_path / "d.jsonl"
    path.write_text("\n".join([json.dumps({"messages": [{"role": "user", "content": "x"}]})] * 50))
    monkeypatch.setattr(process, "AT_FIRST", 0.05)
    monkeypatch.setattr(process, "EACH_TEXT", 0.0)
    with pytest.raises(InputError, match="the chat template is too slow: [0-9]+ s of computing for [0-9]+ texts"):
        read_data([str(path)], folder, tell=print)

"""Data sets of the hub, through the library that streams them; without a network, so of a folder, or made up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moekern.data.read import read_data
from moekern.errors import InputError
from tests.helpers import ROOT
from tests.helpers.text import folder_of, lines, read


class _Rows:
    """What load_dataset gives with streaming=True, as far as it is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.read = rows, 0

    def shuffle(self, seed: int, buffer_size: int) -> _Rows:
        assert buffer_size == 1000
        self.rows = [self.rows[n] for n in np.random.default_rng(seed).permutation(len(self.rows))]
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            self.read += 1
            yield row


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What load_dataset was called with, and what it gave."""
    calls: list[Any] = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> _Rows:
        if path == "org/none":
            raise FileNotFoundError("no such data set\nand more")
        rows = _Rows([{"instruction": f"{n:04d}?", "output": "Yes. " * 20} for n in range(5000)])
        calls.append((path, name, split, streaming, rows))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_rows_are_streamed_as_far_as_a_budget_needs(tmp_path: Path, asked: list[Any]) -> None:
    folder = folder_of(tmp_path / "model")
    text, said = read(folder, "org/set[sub](part):2k", sequence_length=64)
    path, name, split, streaming, rows = asked[0]
    assert (path, name, split, streaming) == ("org/set", "sub", "part", True)
    assert rows.read < 30
    assert "<user>0000?" not in text
    assert said == [
        "set-sub-part: 2,000 tokens, drawn from the stream of its rows, out of 1,000 at a time (its own amount)"
    ]
    assert read(folder, "org/set[sub](part):2k", sequence_length=64)[0] == text
    assert read(folder, "org/set[sub](part):2k", sequence_length=64, seed=1)[0] != text


def test_a_mix_has_a_domain_for_each_data_set(tmp_path: Path, asked: list[Any]) -> None:
    data = read_data(["org/a[x]:4,org/a[y]:2,org/b"], folder_of(tmp_path), tokens=640, sequence_length=32, tell=print)
    assert data.tokens == {"a-x": 128, "a-y": 64, "b": 640}
    assert [call[:3] for call in asked] == [("org/a", "x", "train"), ("org/a", "y", "train"), ("org/b", None, "train")]
    assert data.recipe["sources"]["a-x"]["path"] == "org/a[x]"


def test_what_the_hub_does_not_have_is_one_line(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match="--data org/none: no such file or folder, and not to be had .*: no such data set$"
    ):
        read_data(["org/none"], folder_of(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"--data org/a: .* needs the library datasets: pip install 'moekern\[data\]'"):
        read_data(["org/a"], folder_of(tmp_path))


def test_a_folder_is_streamed_by_the_library_itself(tmp_path: Path) -> None:
    """In a process of its own: the library imports others that no test of moekern needs."""
    pytest.importorskip("pyarrow")
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        lines(tmp_path / "set" / f"{split}.jsonl", ({"text": f"{split} {n:04d} " * 9} for n in range(900)))
    program = (
        "import sys; from moekern.data.read import read_data\n"
        "for spec in sys.argv[2:]:\n"
        "    data = read_data([spec], sys.argv[1], sequence_length=64, tell=lambda line: None)\n"
        "    print(*data.tokens.items(), data.recipe['sources'])"
    )
    specs = [f"{tmp_path / 'set'}(test)", f"x={tmp_path / 'set'}(train):1k", f"x={tmp_path / 'set'}(train):1k"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder_of(tmp_path / "model")), *specs],
        capture_output=True, text=True, cwd=ROOT, env=_offline(tmp_path),
    )  # fmt: skip
    if "No module named 'datasets'" in done.stderr or "needs the library datasets" in done.stderr:
        pytest.skip("the library datasets is not installed")
    assert done.returncode == 0, done.stderr
    whole, first, second = done.stdout.splitlines()
    assert whole.startswith(f"('set-test', {900 * (9 * len('test 0000 ') + 2)})")
    assert first.startswith("('x', 1000)")
    assert first == second


def _offline(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}

"""Text in: every kind of source, budgets, seeds, and one clear line for what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekern.data.batches import TokenData
from moekern.data.read import read_data
from moekern.demo import MODEL
from moekern.errors import InputError

WORDS = "Experts that no token needs can go. " * 40


def _rows(data: TokenData, domain: str | None = None) -> list[list[int]]:
    return [row.tolist() for b in data.batches if domain in (None, b.domain) for row in b.input_ids]


def test_text_jsonl_and_a_folder_of_both_give_the_same_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": WORDS}) + "\n\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text(WORDS)
    (folder / "ignored.bin").write_bytes(b"\xff\xfe")
    rows = [_rows(read_data([f"d={tmp_path / x}"], MODEL, sequence_length=32)) for x in ("a.txt", "b.jsonl", "folder")]
    assert rows[0] == rows[1] == rows[2]
    assert sum(map(len, rows[0])) > 200


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.int32).reshape(4, 25))
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": list(range(100))}))
    for name in ("ids.npy", "ids.jsonl"):
        data = read_data([str(tmp_path / name)], tmp_path, sequence_length=10, batch_size=3)
        assert sorted(i for row in _rows(data) for i in row) == list(range(100))
        assert [tuple(b.input_ids.shape) for b in data.batches] == [(3, 10), (3, 10), (3, 10), (1, 10)]


@given(
    sizes=st.lists(st.integers(2, 300), min_size=1, max_size=3),
    tokens=st.none() | st.integers(6, 400),
    length=st.integers(2, 40),
    batch=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_budgets_are_met_and_no_token_is_used_twice(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], tokens: int | None, length: int, batch: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    specs = []
    for n, size in enumerate(sizes):
        np.save(folder / f"{n}.npy", np.arange(size) + 1000 * n)
        specs.append(f"d{n}={folder / f'{n}.npy'}")
    data = read_data(specs, folder, tokens=tokens, sequence_length=length, batch_size=batch, seed=seed)
    again = read_data(specs, folder, tokens=tokens, sequence_length=length, batch_size=batch, seed=seed)
    assert _rows(data) == _rows(again)
    for n, size in enumerate(sizes):
        rows = _rows(data, f"d{n}")
        used = [i for row in rows for i in row]
        assert len(set(used)) == len(used)
        assert set(used) <= set(range(1000 * n, 1000 * n + size))
        assert all(len(row) == length for row in rows[:-1])
        budget = size if tokens is None else min(size, tokens // len(sizes) + (n < tokens % len(sizes)))
        # Pieces of one token predict nothing and are left out.
        assert budget - 1 <= len(used) + (size % length == 1) <= max(budget, 1) + 1
    assert all(b.input_ids.shape[0] <= batch for b in data.batches)


def test_without_packing_each_document_is_a_row(tmp_path: Path) -> None:
    lines = [list(range(start, start + size)) for start, size in ((0, 7), (10, 3), (20, 40), (60, 1), (70, 3), (80, 7))]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": line}) + "\n" for line in lines))
    np.save(tmp_path / "ids.npy", np.arange(100, 112).reshape(3, 4))
    data = read_data([f"d={tmp_path}"], tmp_path, sequence_length=8, batch_size=2, pack=False)
    want = [line[:8] for line in lines if len(line) > 1] + [list(range(n, n + 4)) for n in (100, 104, 108)]
    assert sorted(_rows(data)) == sorted(want)
    assert [tuple(b.input_ids.shape) for b in data.batches] == [(1, 8), (2, 7), (2, 4), (1, 4), (2, 3)]
    assert data.recipe["pack"] is False
    assert data.chunk == data.recipe["chunk"] == 2048 // 8
    assert "pack" not in read_data([f"d={tmp_path}"], tmp_path, sequence_length=8).recipe
    some = [read_data([f"d={tmp_path}"], tmp_path, tokens=13, sequence_length=8, pack=False, seed=s) for s in (0, 0, 1)]
    assert _rows(some[0]) == _rows(some[1]) != _rows(some[2])
    for few in some:
        assert 12 <= sum(few.tokens.values()) <= 13
        assert all(any(row == line[: len(row)] for line in want) for row in _rows(few))


def test_a_row_of_its_own_has_no_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Experts can go."}) + "\n" + json.dumps({"text": "Or stay."}))
    packed, rows = (_rows(read_data([str(tmp_path / "a.jsonl")], MODEL, pack=pack)) for pack in (True, False))
    assert sum(map(len, packed)) == sum(map(len, rows)) + 2
    ends = set(packed[0]) - {i for row in rows for i in row}
    assert len(ends) == 1
    (tmp_path / "short.jsonl").write_text(json.dumps({"input_ids": [1]}) + "\n" + json.dumps({"input_ids": [2]}))
    assert _rows(read_data([str(tmp_path / "short.jsonl")], MODEL)) == [[1, 2]]
    with pytest.raises(InputError, match="holds no text"):
        read_data([str(tmp_path / "short.jsonl")], MODEL, pack=False)


def test_the_recipe_names_the_tokens_that_the_text_became(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    shutil.copytree(MODEL, tmp_path / "model")
    spec = [f"d={tmp_path / 'a.txt'}"]
    recipe = read_data(spec, tmp_path / "model", sequence_length=32, batch_size=2).recipe
    assert read_data(spec, tmp_path / "model", sequence_length=32, batch_size=3).recipe == recipe
    path = tmp_path / "model/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["."], vocabulary["!"] = vocabulary["!"], vocabulary["."]
    path.write_text(json.dumps(tokenizer))
    other = read_data(spec, tmp_path / "model", sequence_length=32, batch_size=2).recipe
    assert other.pop("sha256") != recipe.pop("sha256")
    assert other == recipe


def test_another_seed_draws_other_sequences(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(1000))
    first, second = (
        _rows(read_data([str(tmp_path / "ids.npy")], tmp_path, tokens=100, sequence_length=10, seed=s)) for s in (0, 1)
    )
    assert first != second


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("bad.jsonl", b'{"text": 1}\n', "bad.jsonl:1: expected text"),
        ("broken.jsonl", b'{"input_ids": [1, 2]}\n{"te', "broken.jsonl:2: not JSON"),
        ("list.jsonl", b"[1]\n", "list.jsonl:1: expected an object"),
        ("floats.jsonl", b'{"input_ids": [1.5]}\n', "floats.jsonl:1: expected text"),
        ("broken.npy", b"not numpy", "not a readable .npy"),
        ("high.jsonl", b'{"input_ids": [1, 5000]}\n', "do not fit the model's vocabulary of 100"),
        ("low.jsonl", b'{"input_ids": [-1, 5]}\n', "do not fit the model's vocabulary of 100"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_data([str(tmp_path / name)], MODEL, vocab_size=100)


def test_a_pickled_array_is_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not a readable .npy"):
        read_data([str(tmp_path / "objects.npy")], MODEL)


def test_a_budget_too_small_for_its_domains_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100))
    specs = [f"{name}={tmp_path / 'ids.npy'}" for name in "abc"]
    assert sum(read_data(specs, tmp_path, tokens=6).tokens.values()) == 6
    with pytest.raises(InputError, match="at least 2 for each of 3 domains"):
        read_data(specs, tmp_path, tokens=5)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "at least one"),
        (["a=/nowhere/at/all"], "no such file or folder"),
        (["=x"], "plain name"),
        (["a=.", "a=."], "named twice"),
    ],
)
def test_wrong_sources_are_refused(specs: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_data(specs, MODEL)


def test_a_checkpoint_without_tokenizer_says_what_to_give_instead(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    with pytest.raises(InputError, match="give token ids instead"):
        read_data([str(tmp_path / "a.txt")], tmp_path)

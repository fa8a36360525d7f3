"""Text in: every kind of source, budgets, seeds, and one clear line for what is wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekern.data.batches import TokenData
from moekern.data.read import read_data
from moekern.demo import MODEL
from moekern.errors import InputError
from tests.helpers.text import folder_of, lines, read, shown

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
    assert other["sources"]["d"].pop("ids_sha256") != recipe["sources"]["d"].pop("ids_sha256")
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
        ("latin.txt", b"caf\xe9", "holds no text: left out: 1 of 1 files: first: latin.txt: not UTF-8"),
        ("bad.jsonl", b'{"text": 1}\n', "left out: 1 of 1 rows of bad.jsonl: first: line 1: expected text"),
        ("list.jsonl", b"[1]\n", "line 1: expected an object"),
        ("floats.jsonl", b'{"input_ids": [1.5]}\n', "line 1: expected text"),
        ("broken.npy", b"not numpy", "not a readable .npy"),
        ("high.jsonl", b'{"input_ids": [1, 5000]}\n', "do not fit the model's vocabulary of 100"),
        ("low.jsonl", b'{"input_ids": [-1, 5]}\n', "do not fit the model's vocabulary of 100"),
    ],
)
def test_where_nothing_can_be_read_the_reason_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_data([str(tmp_path / name)], MODEL, vocab_size=100)


def test_what_cannot_be_read_is_counted_and_told_or_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.c").write_text(WORDS)
    (folder / "old.c").write_bytes("int é;\n".encode("latin-1") * 20)
    (folder / "package.json").write_text('{"name": {}}')
    for name in ("a.png", "b.png", "Makefile"):
        (folder / name).write_bytes(b"\xff")
    lines(folder / "rows.jsonl", ['{"input_ids": [1, 2]}', '{"te', '{"body": 3}', '{"input_ids": [3]}'])
    said: list[str] = []
    data = read_data([f"code={folder}"], MODEL, tell=said.append)
    assert said == [
        "code: left out: 3 files of other kinds (.png 2, without suffix 1)",
        "code: left out: 2 of 7 files: first: old.c: not UTF-8 text (byte 4)",
        "code: left out: 2 of 4 rows of rows.jsonl: first: line 2: not JSON (Unterminated string)",
    ]
    assert data.notes == tuple(said)
    assert data.recipe["sources"]["code"]["left_out"] == {"files": 2, "rows": 2}
    with pytest.warns(UserWarning, match="left out: 2 of") as warned:
        read_data([f"code={folder}"], MODEL)
    assert len(warned) == 2
    with pytest.raises(InputError, match=r"old.c: not UTF-8 text \(byte 4\) \(--strict\)"):
        read_data([f"code={folder}"], MODEL, strict=True)
    (folder / "old.c").unlink()
    with pytest.raises(InputError, match="package.json: an object that holds neither"):
        read_data([f"code={folder}"], MODEL, strict=True)
    with pytest.raises(InputError, match="rows.jsonl: line 2: not JSON"):
        read_data([str(folder / "rows.jsonl")], MODEL, strict=True)


def _numbered(folder: Path, kind: str, rows: int = 40_000) -> Path:
    """About 2 MB of numbered rows, as a file or a folder of this kind."""
    texts = [f"{n:05d} " + "no expert is needed by this row. " * (1 + n % 2) for n in range(rows)]
    if kind == "folder":
        (folder / "d").mkdir()
        for start in range(0, rows, 40):
            (folder / "d" / f"{start}.txt").write_text("\n".join(texts[start : start + 40]))
        return folder / "d"
    path = folder / f"a.{kind}"
    if kind == "txt":
        path.write_text("\n".join(texts))
    elif kind == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": texts}), path, row_group_size=2000)
    else:
        lines(path, ({"text": text} for text in texts))
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "folder", "parquet"])
def test_of_a_large_text_so_much_is_drawn_as_is_needed_from_all_of_it(kind: str, tmp_path: Path) -> None:
    path, model = _numbered(tmp_path, kind), folder_of(tmp_path / "model")
    seen: list[list[int]] = []
    recipes = []
    for seed, batch in ((0, 8), (0, 3), (1, 8)):
        options = {"tokens": 60_000, "sequence_length": 64, "batch_size": batch, "seed": seed, "tell": print}
        data = read_data([f"d={path}"], model, **options)
        assert data.tokens == {"d": 60_000}
        seen.append(_numbers(data, model))
        recipes.append(data.recipe["sources"]["d"])
    assert seen[0] == seen[1]
    assert recipes[0] == recipes[1] != recipes[2]
    assert recipes[0]["ids_sha256"] != recipes[2]["ids_sha256"]
    for numbers in seen:
        assert len(set(numbers)) == len(numbers) > 100
        assert min(numbers) < 10_000
        assert max(numbers) > 30_000
    assert len(set(seen[0]) & set(seen[2])) < len(seen[0]) // 2


def _numbers(data: TokenData, model: Path) -> list[int]:
    return [int(n) for text in shown(data, model) for n in re.findall(r"\b\d{5}\b", text)]


def test_what_can_only_be_read_from_its_start_is_drawn_from_there_and_it_is_said(tmp_path: Path) -> None:
    path, model = _numbered(tmp_path, "jsonl"), folder_of(tmp_path / "model")
    said: list[str] = []
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    data = read_data([f"d={tmp_path / 'a.jsonl.gz'}"], model, tokens=9000, sequence_length=64, tell=said.append)
    numbers = _numbers(data, model)
    assert numbers != sorted(numbers)
    assert max(numbers) > 9000
    assert said[0].startswith(
        "d: compressed files, JSON, CSV and row groups of parquet are drawn from their starts: up"
    )


def test_the_recipe_names_the_tokens_that_are_used_and_not_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.arange(100))
    np.save(tmp_path / "two.npy", np.arange(100, dtype=np.int32))
    lines(tmp_path / "three.jsonl", [{"input_ids": list(range(60))}, {"input_ids": list(range(60, 100))}])
    found = [
        read_data([f"d={tmp_path / name}"], tmp_path, tokens=50, sequence_length=10).recipe["sources"]["d"]
        for name in ("one.npy", "two.npy", "three.jsonl")
    ]
    assert len({each["ids_sha256"] for each in found}) == 1
    data = read_data([f"d={tmp_path / 'one.npy'}"], tmp_path, tokens=50, sequence_length=10, batch_size=2)
    ids = np.concatenate([batch.input_ids.numpy().reshape(-1) for batch in data.batches])
    assert found[0]["ids_sha256"] == hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    assert found[0] == {"path": "one.npy", "tokens": 50, "ids_sha256": found[0]["ids_sha256"], "left_out": {}}


def test_domains_have_amounts_of_their_own(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(10_000))
    specs = [
        f"{name}={tmp_path / 'ids.npy'}{amount}" for name, amount in zip("abcd", (":7", ":1k", ":25%", ""), strict=True)
    ]
    data = read_data(specs, tmp_path, tokens=2000, sequence_length=50)
    assert data.tokens == {"a": 350, "b": 1000, "c": 500, "d": 1500}
    data = read_data([f"a={tmp_path / 'ids.npy'}:20k"], tmp_path)
    assert data.notes == ("a: 10,000 tokens, fewer than the 20,000 that it was asked for",)
    lines(tmp_path / "rows.jsonl", ({"input_ids": [n, n + 1]} for n in range(40)))
    data = read_data([f"a={tmp_path / 'rows.jsonl'}:7"], tmp_path, sequence_length=50, pack=False)
    assert data.tokens == {"a": 14}


def test_sequences_longer_than_the_model_was_made_for_are_told(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100))
    said: list[str] = []
    for length in (32, 33):
        read_data([str(tmp_path / "ids.npy")], tmp_path, sequence_length=length, max_positions=32, tell=said.append)
    assert [line for line in said if "max_position_embeddings" in line] == said
    assert len(said) == 1


def test_a_column_of_no_rows_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100))
    lines(tmp_path / "rows.jsonl", [{"body": [1, 2, 3]}])
    specs, said = [f"a={tmp_path / 'ids.npy'}", f"b={tmp_path / 'rows.jsonl'}"], list[str]()
    read_data(specs, tmp_path, columns=["a=text", "b=body", "body"], tell=said.append)
    read_data(specs[:1], tmp_path, columns=["text"], tell=said.append)
    assert said == [
        "--column a=text: changes nothing, since it has no rows",
        "--column text: changes nothing, since no domain has rows",
    ]


@pytest.mark.parametrize(("positions", "length"), [(None, 2048), (32, 32), (4096, 2048)])
def test_a_model_with_few_positions_gets_sequences_that_it_was_made_for(
    positions: int | None, length: int, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100).repeat(50))
    data = read_data([str(tmp_path / "ids.npy")], tmp_path, max_positions=positions)
    assert data.recipe["sequence_length"] == length
    expected = ["sequences of 32 tokens: as many positions as the model was made for"] if length == 32 else []
    assert [note for note in data.notes if note.startswith("sequences")] == expected


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is Linux's to tell")
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "txt", "npy"])
def test_a_budget_of_a_huge_file_costs_no_more_memory_than_it_needs(kind: str, tmp_path: Path) -> None:
    """100 MB, 2 GB where it lies in few blocks of the disk; the peak is that of this process."""
    model, path = folder_of(tmp_path / "model"), tmp_path / f"a.{kind}"
    part = "".join(json.dumps({"text": f"{n} " + WORDS}) + "\n" for n in range(700)).encode()  # about 1 MB
    with path.open("wb") as file:
        if kind == "npy":
            np.lib.format.write_array_header_2_0(file, {"descr": "<i8", "fortran_order": False, "shape": (1 << 28,)})
            file.truncate(file.tell() + (1 << 31))
        elif kind == "json":
            file.write(b"[")
            file.writelines([part.replace(b"\n", b",")] * 100)
        else:
            file.writelines([gzip.compress(part, 1)] * 2000 if kind == "jsonl.gz" else [part] * 100)
    options = {"tokens": 2000, "sequence_length": 64, "tell": print}
    read_data([f"d={lines(tmp_path / 'small.jsonl', [{'text': WORDS}])}"], model, **options)
    before = _memory("RSS")
    Path("/proc/self/clear_refs").write_text("5")
    assert read_data([f"d={path}"], model, **options).tokens == {"d": 2000}
    assert _memory("HWM") - before < 40
    path.unlink()


def _memory(what: str) -> float:
    """MiB of this process: RSS, or HWM, their most since it was last cleared."""
    found = re.search(rf"Vm{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def test_what_describes_a_folder_of_rows_is_left_out_and_told(tmp_path: Path) -> None:
    folder, chats, code = folder_of(tmp_path / "model"), tmp_path / "chats", tmp_path / "code"
    for name, text in {
        "README.md": "about",
        "part/a.jsonl": '{"text": "row"}',
        "LICENSE.txt": "law",
        "b.md": "b",
    }.items():
        for each in (chats, *([code] if name.endswith("md") else ())):
            (each / name).parent.mkdir(parents=True, exist_ok=True)
            (each / name).write_text(text)
    text, said = read(folder, chats)
    assert text == "<s>b</s><s>row</s>"
    assert said == [
        "text: left out: LICENSE.txt, README.md: beside files of rows; to read such a file, name it by itself"
    ]
    assert read(folder, code) == ("<s>about</s><s>b</s>", [])
    assert read(folder, chats / "README.md") == ("<s>about</s>", [])


def test_long_reading_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows, told = folder_of(tmp_path / "model"), tmp_path / "d.jsonl", list[str]()
    rows.write_text("\n".join([json.dumps({"text": "x" * 98})] * 3))
    monkeypatch.setattr("moekern.data.read.TELL_EVERY", 0.0)
    data = read_data([f"a={rows}"], folder, tokens=150, sequence_length=50, tell=told.append)
    said = ["a: reading text: 100 tokens"]
    said += [f"a: reading text: {n} tokens, of which 150 are used" for n in (200, 300)]
    assert told == [*said, "a: 150 tokens of 300 (--tokens)"]
    assert data.notes == ("a: 150 tokens of 300 (--tokens)",)


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


def test_a_checkpoint_without_tokenizer_says_what_to_give_instead(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    with pytest.raises(InputError, match="give token ids instead"):
        read_data([str(tmp_path / "a.txt")], tmp_path)


def test_the_names_of_the_package_are_there_and_specs_need_no_torch() -> None:
    code = (
        "import sys; import moekern.data.mixes; assert 'torch' not in sys.modules; "
        "from moekern.data import DEFAULT_DOMAIN, Batch, Text, TokenData, read_data; import moekern.data as data; "
        "assert all(hasattr(data, name) for name in data.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Every format is read piece by piece, and what is broken says how."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moekern.data.json_rows import json_rows
from moekern.data.left_out import Unreadable
from moekern.data.readers import file_of, read_all, read_block
from moekern.errors import InputError
from tests.helpers.text import folder_of, lines, read

ROWS = [{"text": f"row {n} \u00e9 \u2028"} for n in range(3)]
TEXT = "<s>row 0 é \u2028</s><s>row 1 é \u2028</s><s>row 2 é \u2028</s>"


def _written(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data[:9]) + gzip.compress(data[9:]))
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.compress(data[:9]) + zstandard.compress(data[9:]))
    else:
        path.write_bytes(data)
    return path


AS_LINES = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", AS_LINES),
        ("a.jsonl.gz", AS_LINES),
        ("a.ndjson.zst", AS_LINES),
        ("a.json", AS_LINES),
        ("a.json", json.dumps({"pad": "x" * 70_000, **ROWS[0]}) + "\n" + "".join(map(json.dumps, ROWS[1:]))),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps({"version": 2, "tools": [], "data": ROWS, "end": {}}, indent=1)),
        ("a.json.gz", json.dumps(ROWS)),
        ("a.json", json.dumps([row["text"] for row in ROWS])),
        ("A.CSV", "n,text\n" + "".join(f'{n},"{row["text"]}"\n' for n, row in enumerate(ROWS))),
        ("a.tsv", "n\ttext\n" + "".join(f"{n}\t{row['text']}\n" for n, row in enumerate(ROWS))),
        ("conversations", AS_LINES),
        ("data.cfg", json.dumps(ROWS, indent=2)),
        ("rows.gz", json.dumps(ROWS)),
    ],
)
def test_rows_are_the_same_in_every_format(name: str, content: str, tmp_path: Path) -> None:
    assert read(folder_of(tmp_path / "model"), _written(tmp_path / name, content)) == (TEXT, [])


def test_parquet_rows_are_read_with_their_structures(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    talk = [{"role": "user", "content": "x"}]
    parquet.write_table(arrow.Table.from_pylist([{"messages": talk}] * 3), tmp_path / "a.parquet")
    assert read(folder_of(tmp_path / "model"), tmp_path / "a.parquet") == ("<user>x<|im_end|>\n" * 3, [])
    parquet.write_table(arrow.Table.from_pylist([{"body": "x", "other": "y"}]), tmp_path / "b.parquet")
    assert read(folder_of(tmp_path / "model"), tmp_path / "b.parquet", columns=["text=body"]) == ("<s>x</s>", [])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="c.parquet: not a readable .parquet file"):
        read(folder_of(tmp_path / "model"), tmp_path / "c.parquet")


def test_json_of_an_unknown_suffix_is_never_taken_for_text(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    _written(tmp_path / "settings.conf", json.dumps({"a": {"b": 1}}))
    with pytest.raises(InputError, match="an object that holds neither a list of rows nor text"):
        read(folder, tmp_path / "settings.conf")
    for text in ("[section]\nkey = 1", "{% if x %}y{% endif %}", "[1] A note.", '{"broken": '):
        assert read(folder, _written(tmp_path / "notes", text))[0] == f"<s>{text}</s>"
    long = json.dumps([{"text": "x" * 200_000}], indent=1)
    assert read(folder, _written(tmp_path / "long", long))[0] == f"<s>{'x' * 200_000}</s>"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", '[{"text": "x"}, {"te', r"not JSON \(Unterminated"),
        ("a.json", '{"a": [], "b": []}', "an object with several lists"),
        ("a.json", '[{"text": "x"}] more', "more behind its end"),
        ("a.json", "words", "expected a JSON list of rows"),
        ("a.json", '[{"text": "x"} {"text": "y"}]', "expected one of ,"),
        ("a.json", b'[{"text": "caf\xe9"}]', "not UTF-8"),
        ("a.txt", b"x" * 200_000 + b"\xe9 ", r"not UTF-8 text \(byte 200000\)"),
        ("a.txt", b"ab\0c", "holds NUL bytes"),
        ("a.txt", "x".encode("utf-16"), "not UTF-8 text"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: not UTF-8"),
        ("a.csv", "text\nx,y\n", "row 1: more cells than columns"),
        ("a.csv", "," * (1 << 14) + "\nx\n", "more than 16,384 columns"),
        ("a.npy.gz", b"x", "a compressed .npy file"),
    ],
)
def test_what_is_broken_says_how(name: str, content: str | bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name}: .*{reason}"):
        read(folder_of(tmp_path / "model"), _written(tmp_path / name, content), strict=True)


def test_a_damaged_compressed_file_is_left_out(tmp_path: Path) -> None:
    whole = gzip.compress(AS_LINES.encode() * 5000)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d" / "b.jsonl.gz").write_bytes(b"not gzip")
    lines(tmp_path / "d" / "c.jsonl", ROWS)
    text, said = read(folder_of(tmp_path / "model"), tmp_path / "d")
    assert text.endswith(TEXT)
    assert len(said) == 1
    assert said[0].startswith("text: left out: 2 of 3 files: first: a.jsonl.gz: cannot be read: Compressed file ended")


def test_without_the_library_a_format_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"a.txt.zst: a .zst file needs the library zstandard: pip install 'moekern\[data\]'"
    ):
        read(folder_of(tmp_path / "model"), tmp_path / "a.txt.zst")


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=9), value, max_size=3),
    max_leaves=6,
)


@given(value=VALUES, step=st.integers(1, 9))
def test_rows_of_json_are_those_of_the_whole_document(value: Any, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moekern.data.json_rows.STEP", step)
        for indent in (None, 1):
            found = json_rows(io.StringIO(json.dumps([value, value], indent=indent)), 1 << 20)
            assert [row for row, _ in found] == [value, value]


def test_a_value_that_is_too_long_is_not_held() -> None:
    with pytest.raises(Unreadable, match="a value of more than"):
        list(json_rows(io.StringIO('["' + "x" * 1_000_000), 1 << 10))


def test_a_row_that_is_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekern.data.readers.ROW_LIMIT", 1000)
    path = lines(tmp_path / "a.jsonl", [{"text": "x" * 5000}, *ROWS])
    text, said = read(folder_of(tmp_path / "model"), path)
    assert text == TEXT
    assert said[0].startswith("text: left out: 1 of 4 rows of a.jsonl: first: line 1: a row of more than")


NO_END = b"x" * (1 << 20)
BLANK = b"\n" * ((1 << 20) + 100)  # of which no parts are drawn yet


@pytest.mark.parametrize("tokens", [None, 1000])
@pytest.mark.parametrize(
    ("name", "start", "rest", "reason"),
    [
        ("a.csv", b"text\nx\n", NO_END, "a row of more than"),
        ("a.tsv.gz", b"text\nx\n", NO_END, "a row of more than"),
        ("a.csv", b"text\nx\n", b'"' + b"x\n" * 90_000, "a row of more than"),
        ("a.csv", b"text\nx\n", BLANK, "(a row of more than|more than 1 MiB of blank lines)"),
        ("a.jsonl.gz", b'{"text": "x"}\n', NO_END, "a row of more than"),
        ("a.jsonl", b'{"text": "x"}\n', BLANK, "more than 1 MiB of blank lines"),
        ("a.json", b'[{"text": "x"},', BLANK, "more than 1 MiB of spaces"),
    ],
)
def test_what_has_no_end_is_not_read_to_its_end(
    name: str, start: bytes, rest: bytes, reason: str, tokens: int | None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("moekern.data.readers.ROW_LIMIT", 1 << 17)
    monkeypatch.setattr("moekern.data.readers.PASSED_LIMIT", 1 << 18)
    path = _written(tmp_path / name, start + rest)
    text, said = read(folder_of(tmp_path / "model"), path, tokens=tokens)
    assert text == "<s>x</s>"
    assert re.match(f"text: left out: 1 of 1 files: first: {name}: {reason}", said[0])


@pytest.mark.parametrize("tokens", [None, 1000])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt"])
def test_a_file_of_gigabytes_that_lie_nowhere_is_left(name: str, tokens: int | None, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.write(b'["x",\n')
        file.truncate(50 << 30)
    with pytest.raises(InputError, match=f"{name}: "):
        read(folder_of(tmp_path / "model"), tmp_path / name, strict=True, tokens=tokens)


def test_an_object_of_keys_without_end_is_not_held() -> None:
    with pytest.raises(Unreadable, match="an object of more than 1 MiB or 65,536 keys"):
        list(json_rows(io.StringIO("{" + '"a":1,' * 70_000 + '"text": "x"}'), 1 << 20))
    with pytest.raises(Unreadable, match="an object of more than"):
        list(json_rows(io.StringIO("{" + f'"{"a" * 1000}":1,' * 2000 + '"text": "x"}'), 1 << 20))


@pytest.mark.parametrize(
    ("descr", "shape", "reason"),
    [
        ("'<i8'", "(9999999999, 0)", "holds no token ids"),
        ("'<i8'", "(0,)", "holds no token ids"),
        ("(" * 5000, "(1,)", "not a readable .npy file of token ids"),
    ],
)
def test_a_header_of_ids_that_lies_is_told(descr: str, shape: str, reason: str, tmp_path: Path) -> None:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n")
    with pytest.raises(InputError, match=f"a.npy: {reason}"):
        read(folder_of(tmp_path / "model"), tmp_path / "a.npy")


@example(sizes=[0, 0], block=8, final=True)  # the last block ends with the line that the first one ends in
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=30), block=st.integers(8, 80), final=st.booleans())
def test_blocks_hold_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], block: int, final: bool
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    rows = [f"{{{n:04d}" + "é" * size for n, size in enumerate(sizes)]
    content = "\n".join(rows) + "\n" * final
    (folder / "a.txt").write_text(content)
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n" * final)
    as_lines, as_text = (
        [
            item.value
            for start in range(0, file.size, block)
            for item in read_block(file, start, min(start + block, file.size))
        ]
        for file in (file_of(folder / "a.jsonl", "a"), file_of(folder / "a.txt", "a"))
    )
    assert as_lines == rows
    text = "".join(passage.text for passage in as_text)
    assert all(text.count(f"{{{n:04d}") <= 1 for n in range(len(rows)))
    assert set(text) <= set(content)
    if max(len(row.encode()) for row in rows) < block:
        assert text.replace("\n", "") == content.replace("\n", "")


def test_ids_stay_on_the_disk_until_they_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.uint16).reshape(4, 25))
    file = file_of(tmp_path / "ids.npy", "ids.npy")
    assert [item.value.tolist() for item in read_all(file)] == np.arange(100).reshape(4, 25).tolist()
    assert [item.value.tolist() for item in read_block(file, 40, 80)] == [list(range(10, 20))]

"""Documents in a work folder: read as they were written, or refused."""

import json
from pathlib import Path

import pytest

from moekern.errors import InputError
from moekern.model.kept import read_kept, write_kept

DOCUMENT = {"losses": {"a": [0.1, 1e-300, 7], "ü": None}, "made_from": {"tokens": 3}}


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    assert read_kept(path) == {}
    write_kept(path, DOCUMENT)
    assert read_kept(path) == DOCUMENT
    assert read_kept(path, restart=True) == {}
    write_kept(path, {})
    assert read_kept(path) == {}


@pytest.mark.parametrize("change", [{"losses": {}}, {"more": 1}, {"sha256": "0" * 64}, {"sha256": 3}])
def test_one_that_was_changed_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "k.json"
    write_kept(path, DOCUMENT)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"k\.json: was changed since an earlier run .*, or --restart begins anew$"):
        read_kept(path)
    assert read_kept(path, restart=True) == {}


@pytest.mark.parametrize("text", ["[1]", "{", "", "\x00"])
def test_what_is_no_document_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "k.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"(?s)k\.json: .*; --restart begins anew$"):
        read_kept(path)
    path.write_text(json.dumps(DOCUMENT))  # as older versions left it
    assert read_kept(path) == {}

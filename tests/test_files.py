"""Files appear whole or not at all."""

import hashlib
from contextlib import suppress

import pytest

from moekern import files
from moekern.errors import InputError


def test_a_file_is_replaced_whole(tmp_path):
    target = tmp_path / "f"
    for content in (b"one", b"two and more", b""):
        files.write_bytes(target, content)
        assert target.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "f"
    files.write_bytes(target, b"old")
    with suppress(RuntimeError), files.replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_the_target_must_be_a_file_in_a_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist; make it first"):
        files.write_bytes(tmp_path / "no" / "f", b"")
    with pytest.raises(InputError, match="is a folder"):
        files.write_bytes(tmp_path, b"")


@pytest.mark.parametrize("size", [0, 1, files.CHUNK, files.CHUNK + 1])
def test_digests(tmp_path, size):
    content = bytes(size)
    (tmp_path / "f").write_bytes(content)
    assert files.sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()

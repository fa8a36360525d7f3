"""Files appear whole or not at all."""

import hashlib
import os
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


def _file(at):
    at.write_bytes(b"")


NEW = {
    "a file": (_file, "x", "exists already; name a new file or remove it"),
    "a folder": (lambda at: at.mkdir(), "x", "exists already; name a new file or remove it"),
    "a link": (lambda at: at.symlink_to(at.parent), "x", "exists already; name a new file or remove it"),
    "a link to nothing": (lambda at: at.symlink_to("nowhere"), "x", "exists already; name a new file or remove it"),
    "no folder": (lambda at: None, "x/y", "the folder .*/x does not exist; make it first"),
    "in a file": (_file, "x/y", "the folder .*/x does not exist; make it first"),
    "no name": (lambda at: None, "x/..", "names no new file"),
    "inside the source": (lambda at: (at.parent / "in").mkdir(), "in/y", "lies inside the source .*/in; name a file"),
}


@pytest.mark.parametrize("what", NEW)
def test_a_new_target(tmp_path, what):
    make, name, message = NEW[what]
    make(tmp_path / "x")
    with pytest.raises(InputError, match=f"^--to {tmp_path}/{name}: {message}") as error:
        files.check_new(f"{tmp_path}/{name}", "--to", source=tmp_path / "in")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=message.replace("file", "folder") if "new" in message else message[:20]):
        files.check_new(f"{tmp_path}/{name}", folder=True, source=tmp_path / "in")


def test_a_new_target_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    files.check_new(tmp_path / "x")
    with monkeypatch.context() as patch:  # root may write anywhere, so the answer of the system is replaced
        patch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
        with pytest.raises(InputError, match=f"^--out {tmp_path}/x: no permission to write in {tmp_path}$"):
            files.check_new(tmp_path / "x")
    status = list(os.statvfs(tmp_path))
    status[8] |= os.ST_RDONLY
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(status))
    with pytest.raises(InputError, match=f"x: {tmp_path} is on a file system that is mounted read-only"):
        files.check_new(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["file", "link", "dangling"])
def test_a_work_folder_that_is_none(tmp_path, what):
    files.check_work(tmp_path / "x")
    work = files.work_path(tmp_path / "x")
    if what == "file":
        work.touch()
    else:
        work.symlink_to(tmp_path if what == "link" else "nowhere")
    with pytest.raises(InputError, match="x.moekern: is no folder, and what is not done yet of .*/x is kept there"):
        files.check_work(tmp_path / "x")


@pytest.mark.parametrize("size", [0, 1, files.CHUNK, files.CHUNK + 1])
def test_digests(tmp_path, size):
    content = bytes(size)
    (tmp_path / "f").write_bytes(content)
    assert files.sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(tmp_path):
    stale = tmp_path / ".s.999999.00112233.tmp"
    stale.write_bytes(b"half")
    with files.replacing(tmp_path / "s") as mine:
        assert not stale.exists()
        with files.replacing(tmp_path / "s") as other:  # as another process would
            assert mine.exists()
            other.write_bytes(b"b")
        mine.write_bytes(b"a")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("s", b"a")]

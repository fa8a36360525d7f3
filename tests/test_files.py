"""Files appear whole or not at all."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import pytest

from moekern import files
from moekern.errors import InputError
from tests.helpers.mounts import mounted
from tests.helpers.planted import plant


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
    files.write_bytes(tmp_path / "new" / "too" / "f", b"x")
    assert (tmp_path / "new" / "too" / "f").read_bytes() == b"x"
    with pytest.raises(InputError, match="new/too/f is no folder"):
        files.write_bytes(tmp_path / "new" / "too" / "f" / "g", b"")
    with pytest.raises(InputError, match="is a folder"):
        files.write_bytes(tmp_path, b"")


def _file(at):
    at.write_bytes(b"")


def _model(at):
    at.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (at / name).touch()


NEW = {
    "a file": (_file, "x", "exists already; name a new file or remove it"),
    "a folder": (lambda at: at.mkdir(), "x", "exists already; name a new file or remove it"),
    "a link": (lambda at: at.symlink_to(at.parent), "x", "exists already; name a new file or remove it"),
    "a link to nothing": (lambda at: at.symlink_to("nowhere"), "x", "exists already; name a new file or remove it"),
    "in a file": (_file, "x/y", ".*/x is no folder; name another place"),
    "deep in a file": (_file, "x/y/z", ".*/x is no folder; name another place"),
    "in a link to nothing": (lambda at: at.symlink_to("nowhere"), "x/y", ".*/x is no folder; name another place"),
    "no name": (lambda at: None, "x/..", "names no new file"),
    "in a model": (_model, "x/deep/s", "would become a part of the model in .*/x; name a place outside it"),
    "inside the source": (lambda at: (at.parent / "in").mkdir(), "in/y", "lies inside the source .*/in; name a file"),
}


def test_a_file_takes_no_device_s_pipe_s_or_link_s_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match=f"{name}: a link, pipe or other thing"):
            files.write_bytes(tmp_path / name, b"some")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "pipe"]
    assert (tmp_path / "link").is_symlink()


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


def test_what_a_killed_process_left_is_removed_and_a_second_process_is_refused(tmp_path):
    stale = files.temporary_path(tmp_path / "s")
    stale.write_bytes(b"half")
    with files.replacing(tmp_path / "s") as mine:
        assert mine.read_bytes() == b""
        with pytest.raises(InputError, match=f"^{tmp_path}/s: another process is writing it, in {mine}; "):
            files.write_bytes(tmp_path / "s", b"b")  # as another process would
        mine.write_bytes(b"a")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("s", b"a")]


def test_what_another_has_written_meanwhile_stays(tmp_path):
    def write():
        with files.replacing(tmp_path / "s", new=True) as mine:
            mine.write_bytes(b"mine")
            (tmp_path / "s").write_bytes(b"other")

    with pytest.raises(InputError, match="s: exists already"):
        write()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("s", b"other")]


def test_a_temporary_that_is_taken_away_does_not_become_the_target(tmp_path):
    def write():
        with files.replacing(tmp_path / "s") as mine:
            mine.unlink()
            mine.write_bytes(b"another's")

    with pytest.raises(InputError, match="was removed or replaced while it was written"):
        write()
    assert list(tmp_path.iterdir()) == [files.temporary_path(tmp_path / "s")]  # which nobody here has written


@pytest.mark.parametrize("what", ["link", "link to nothing", "pipe", "device", "folder"])
def test_what_is_planted_at_the_name_of_a_temporary_or_lock_is_refused(tmp_path, what):
    elsewhere, work = tmp_path / "elsewhere", tmp_path / "work"
    work.mkdir()
    elsewhere.write_bytes(b"elsewhere")
    plant(what, files.temporary_path(work / "s"), elsewhere)
    with pytest.raises(InputError, match="a link, pipe or other thing that moekern did not write stands there"):
        files.write_bytes(work / "s", b"x")
    (work / "t.moekern").mkdir()
    plant(what, work / "t.moekern" / files.LOCK, elsewhere)
    with pytest.raises(InputError, match="stands there; move it away"), files.working(work / "t"):
        pass
    assert elsewhere.read_bytes() == b"elsewhere"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "work"]
    assert sorted(os.listdir(work)) == [".s.moekern.tmp", "t.moekern"]


def test_files_are_opened_without_following_or_waiting(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"elsewhere")
    for what in ("link", "link to nothing", "pipe", "device", "folder"):
        plant(what, tmp_path / what, tmp_path / "elsewhere")
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND):
            with pytest.raises(InputError, match="move it away"):
                files.open_plain(tmp_path / what, flags)
    os.link(tmp_path / "elsewhere", tmp_path / "second name")
    assert files.read_plain(tmp_path / "second name") == b"elsewhere"
    with pytest.raises(InputError, match="a second name elsewhere"):
        files.open_plain(tmp_path / "second name", os.O_WRONLY | os.O_APPEND)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["", ".", "/", "..", "x/.."])
def test_what_names_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (False, True):
        with pytest.raises(InputError, match="^--to .*: names no new (file|folder)$"):
            files.check_new(name, "--to", folder=folder)


@pytest.mark.parametrize("name", ["x" * 250, "é" * 125, "x" * 300, "a\udcffb", "\udcff/b"])
def test_names_that_cannot_be_written(name, tmp_path):
    if "/" in name:
        os.mkdir(tmp_path / "\udcff")
    with pytest.raises(
        InputError, match="^--out .*: the name is (longer than 2[0-9]{2} bytes|not UTF-8; name another)"
    ):
        files.check_new(tmp_path / name)
    files.write_bytes(tmp_path / ("x" * 241), b"")  # with what comes before and behind it that fits
    (tmp_path / ("y" * 241)).with_name(files.work_path(Path("y" * 241)).name).mkdir()


def test_a_whole_file_that_cannot_get_its_name_is_taken_up(tmp_path):
    target, temporary = tmp_path / "s", files.temporary_path(tmp_path / "s")

    def write():
        with files.replacing(target, new=True, keep=True) as mine:
            mine.write_bytes(b"measured")
            target.mkdir()

    with pytest.raises(InputError, match=f"s: exists already.*it is whole in {temporary}: run the same command again"):
        write()
    target.rmdir()
    assert not files.name_left(target, lambda left: False)
    assert [path.name for path in tmp_path.iterdir()] == [temporary.name]

    def looked_into(left):
        assert not files.name_left(target, lambda left: pytest.fail("two at once"))  # as another process would
        return left == temporary

    assert files.name_left(target, looked_into)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("s", b"measured")]
    assert not files.name_left(target, lambda left: True)
    with pytest.raises(RuntimeError), files.replacing(tmp_path / "t", keep=True):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_unfinished_file_is_taken_up_while_a_position_is_there(tmp_path):
    target, position = tmp_path / "s", tmp_path / "position"

    def stopped(text):
        with suppress(KeyboardInterrupt), files.replacing(target, new=True, position=position) as mine:
            mine.write_bytes(mine.read_bytes() + text)
            raise KeyboardInterrupt

    stopped(b"none")
    assert list(tmp_path.iterdir()) == []
    position.touch()
    stopped(b"one ")
    stopped(b"two ")
    with files.replacing(target, new=True, position=position) as mine:
        mine.write_bytes(mine.read_bytes() + b"three")
    assert target.read_bytes() == b"one two three"
    assert {path.name for path in tmp_path.iterdir()} == {"s", "position"}


def test_a_folder_for_one_process(tmp_path):
    with files.working(tmp_path / "x") as work:
        message = "x: another process is writing it, in .*work.lock"
        with pytest.raises(InputError, match=message), files.working(tmp_path / "x"):
            pass
        assert os.listdir(work) == [files.LOCK]
    assert list(tmp_path.iterdir()) == []
    with files.working(tmp_path / "x") as work:
        (work / "kept").touch()
    (work / files.LOCK).touch()  # a killed process
    with files.working(tmp_path / "x"):
        pass
    assert os.listdir(work) == ["kept"]
    (work / files.LOCK).write_text("mine")
    with pytest.raises(InputError, match="is no lock of moekern's"), files.working(tmp_path / "x"):
        pass
    assert (work / files.LOCK).read_text() == "mine"


def test_scratch_folders_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "moekern-x-0011aabb/deep").mkdir(parents=True)
    (tmp_path / "moekern-x-mine").mkdir()
    (tmp_path / "moekern-x-11223344").symlink_to(tmp_path / "moekern-x-mine")
    with files.scratch(tmp_path, "x") as mine, files.scratch(tmp_path, "x") as other:
        assert mine.is_dir()
        assert other.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["moekern-x-11223344", "moekern-x-mine"]


def test_room_is_taken_at_once(tmp_path):
    with mounted("tmpfs", 1 << 20) as small, (small / "f").open("wb") as file:
        files.reserve(file.fileno(), 1 << 19)
        assert (small / "f").stat().st_size == 1 << 19
        with pytest.raises(OSError, match="No space left on device; 2097152 bytes are needed"):
            files.reserve(file.fileno(), 1 << 21)


@pytest.mark.parametrize(("where", "held"), [("open", False), ("locked", False), ("locked", True)])
def test_a_new_folder_of_scratch_that_another_process_takes_for_one_that_was_left(tmp_path, monkeypatch, where, held):
    """It is removed before it is opened, or before it is locked, or locked by who is about to remove it."""
    lost, place = [], files.os if where == "open" else files
    call = getattr(place, where)

    def late(*given, **named):
        if lost:
            return call(*given, **named)
        lost.extend(tmp_path.iterdir())
        if not held:
            lost[0].rmdir()
        return not held and call(*given, **named)

    monkeypatch.setattr(place, where, late)
    with files.scratch(tmp_path, "spill") as folder:
        assert [folder] != lost
        assert folder.is_dir()
    assert not folder.exists()

"""Rows in memory and in a file are the same rows, and a file leaves nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from moekern import files
from moekern.errors import InputError
from moekern.refit.rows import Room, RowStore
from tests.helpers.mounts import mounted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_holds_the_same_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    found = []
    for on_disk in (False, True):
        with RowStore(50, 3, dtype, on_disk=on_disk, folder=tmp_path) as store:
            assert not store.tensor.any()
            assert len(store) == 50
            store[10:20] = torch.arange(30.0).view(10, 3)
            store.scatter(torch.tensor([3, 0, 49]), torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 3))
            store[5:6].add_(7)
            found.append((store.gather(torch.tensor([49, 3, 12, 5])), store.tensor.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].tolist() == [[3, 3, 3], [1, 1, 1], [6, 7, 8], [7, 7, 7]]


def test_the_file_has_no_name_and_is_gone_with_the_store(tmp_path: Path) -> None:
    def open_files() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum(str(tmp_path) in line for line in lines)

    store = RowStore(100, 100, torch.float32, on_disk=True, folder=tmp_path)
    assert open_files() == 1
    assert not os.listdir(tmp_path)
    store.close()
    assert open_files() == 0
    with pytest.raises(RuntimeError, match="closed"):
        store.gather(torch.tensor([0]))


def test_the_file_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RowStore(9, 9, torch.float32, on_disk=True, folder=tmp_path) as store:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        store.tensor.any()


def test_no_rows_need_no_file(tmp_path: Path) -> None:
    with RowStore(0, 4, torch.float32, on_disk=True, folder=tmp_path) as store:
        assert store.gather(torch.zeros(0, dtype=torch.int64)).shape == (0, 4)


def test_a_room_gives_memory_while_it_lasts_and_takes_it_back(tmp_path: Path) -> None:
    room = Room(1000, tmp_path)
    with room.store(10, 10) as one:
        assert room.left == 600
        with room.store(20, 10) as two:
            two[:] = one.tensor.sum() + 1
            assert room.left == 600
        with room.copy(one) as three:
            one[:] = 5
            assert room.left == 200
            assert not three.tensor.any()
    assert room.left == 1000
    assert Room().take(1 << 60)


def test_a_disk_without_room_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"free, and .* of rows go there; give more memory \(--memory\)") as found:
        RowStore(1 << 40, 1024, torch.float32, on_disk=True, folder=tmp_path)
    assert found.value.kind == "memory"

    def full(file: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "reserve", full)
    with pytest.raises(InputError, match="no room for 400 B of rows: No space left on device"):
        RowStore(10, 10, torch.float32, on_disk=True, folder=tmp_path)
    with pytest.raises(InputError, match="nowhere"):
        RowStore(10, 10, torch.float32, on_disk=True, folder=tmp_path / "nowhere")
    assert not os.listdir(tmp_path)


def test_blocks_are_taken_before_rows_are_written() -> None:
    """A file that is full of holes would end the process with SIGBUS once the disk is full."""
    with mounted("tmpfs", 1 << 20) as folder, RowStore(100, 1024, torch.float32, on_disk=True, folder=folder):
        with pytest.raises(InputError, match="free, and"):
            RowStore(200, 1024, torch.float32, on_disk=True, folder=folder)
        assert os.statvfs(folder).f_bfree * os.statvfs(folder).f_frsize <= (1 << 20) - 400 * 1024

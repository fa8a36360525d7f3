"""Where calibration puts sums: room is taken first, and what nobody could find is noticed at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moekern.errors import InputError
from moekern.statistics.file import Statistics
from moekern.statistics.store import FileStore, file_store
from tests.helpers.measured import E, H, header, layer_statistics, with_halves
from tests.helpers.mounts import mounted

DOMAINS = ("prose", "code")
WORDS = layer_statistics(0).vocabulary.shape[-1]


@contextmanager
def stored(path: Path, layers: int = 2) -> Iterator[FileStore]:
    with file_store(path, header(DOMAINS), {str(i): E for i in range(layers)}, layer_statistics(0).tiers) as store:
        yield store


def put(store: FileStore, layer: int) -> None:
    sums = {d: with_halves(layer_statistics(seed), layer_statistics(9 + seed)) for seed, d in enumerate(DOMAINS)}
    store.put(str(layer), sums)


@pytest.mark.parametrize("expected", [None, H, 3 * H])
def test_room_for_all_layers_is_there_before_the_first(tmp_path: Path, expected: int | None) -> None:
    """What was expected of H changes no byte."""
    with stored(tmp_path / "s") as store:
        if expected is not None:
            store.expect(expected, WORDS)
            status = os.fstat(store.file.fileno())
            assert status.st_size > 2 * len(DOMAINS) * expected * E * 8
            assert status.st_blocks * 512 >= status.st_size
        for layer in (0, 1):
            put(store, layer)
    with stored(tmp_path / "plain") as store:
        for layer in (0, 1):
            put(store, layer)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "plain").read_bytes()
    assert list(Statistics.load(tmp_path / "s").layers) == ["0", "1"]


def test_no_room(tmp_path: Path) -> None:
    with mounted("tmpfs", 1 << 16) as small:
        message = f"^{small}/s: not finished: No space left on device; [0-9]+ bytes are needed$"
        with pytest.raises(InputError, match=message), stored(small / "s", layers=1000) as store:
            store.expect(H, WORDS)
        assert list(small.iterdir()) == []


def test_a_folder_that_is_lost_is_noticed_at_the_next_layer(tmp_path: Path) -> None:
    def lose() -> None:
        with stored(tmp_path / "lost" / "s") as store:
            put(store, 0)
            shutil.rmtree(tmp_path / "lost")
            put(store, 1)
            pytest.fail("the second layer went nowhere")

    (tmp_path / "lost").mkdir()
    with pytest.raises(InputError, match=f"^{tmp_path}/lost/s: not finished: its file was removed while"):
        lose()

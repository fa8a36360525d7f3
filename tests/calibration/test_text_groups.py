"""Text that fits neither memory nor disk is measured in groups of segments: the bytes of one pass, killed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moekern.calibration.calibrate import calibrate
from moekern.data.batches import Batch, TokenData
from moekern.errors import NoRoomForText
from moekern.model import journal
from moekern.model.compute import Compute
from moekern.model.layerwise import LayerwiseModel
from tests.helpers import tight
from tests.helpers.commands import Done, contents, model_and_ids, moekern

H = 32
TOKENS = 352  # of two domains


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and token ids, and what one pass over all text makes ("whole")."""
    folder = model_and_ids(tmp_path_factory.mktemp("groups"))
    assert moekern(*command(folder, folder / "whole")).returncode == 0
    return folder


def command(work: Path, out: Path, *more: object, name: str = "calibrate") -> tuple[object, ...]:
    ids = work / "ids.npy"
    tiers = () if name == "iterate" else ("--tier", "dimensions", "--tier", "coalitions", "--tier", "weights")
    return (name, work / "model", "--data", f"a={ids}", "--data", f"b={ids}:2", "--sequence-length", 16, "--tokens",
            320, "--chunk", 1, "--dtype", "fp32", *tiers, "--out", out, *more)  # fmt: skip


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for the hidden states of 40 tokens, and a disk for those of 96 more."""
    tight.little_room(monkeypatch, 40 * 4 * H, 96 * 4 * H)


def test_the_bytes_are_those_of_one_pass(work: Path, tmp_path: Path, little_room: None) -> None:
    done = moekern(*command(work, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert f"{TOKENS} tokens take 44.0 KiB of hidden states: memory has room for 5.0 KiB" in done.stderr
    assert done.stderr.count("the text is measured in 3 groups, each a pass over the weights") == 1
    assert set(contents(tmp_path)) == {"out"}
    assert (tmp_path / "out").read_bytes() == (work / "whole").read_bytes()


def stopped(work: Path, out: Path, layers: int) -> tuple[Done, list[int]]:
    """The command, ended by Ctrl-C when it has loaded so many layers; and which it has."""
    load, met = LayerwiseModel._load, list[int]()

    def stop(self: LayerwiseModel, i: int, after: int | None) -> None:
        if len(met) == layers:
            raise KeyboardInterrupt
        met.append(i)
        load(self, i, after)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerwiseModel, "_load", stop)
        patch.setattr(journal, "SHARE", 0)
        return moekern(*command(work, out)), met


@pytest.mark.parametrize("room", ["little", "enough"])
def test_a_stopped_run_goes_on_in_the_group_and_layer_that_it_was_in(
    work: Path, tmp_path: Path, little_room: None, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    """In as many groups as before, also where there is room for all text by then."""
    out = tmp_path / "out"
    done, met = stopped(work, out, 6)  # a group is 4
    assert (done.returncode, met) == (130, [0, 1, 2, 3, 0, 1])
    assert done.stderr.splitlines()[-1].endswith("the same command goes on at layer 3 of 4 (first pass)")
    left = contents(tmp_path)
    assert "out.moekern/group-1-of-3.safetensors" in left
    if room == "enough":
        monkeypatch.undo()
    done, met = stopped(work, out, 100)
    assert (done.returncode, met) == (0, [2, 3, 0, 1, 2, 3]), done.stderr
    assert "group 2 of 3" in done.stderr or "where a stopped run was" in done.stderr
    assert set(contents(tmp_path)) == {"out"}
    assert out.read_bytes() == (work / "whole").read_bytes()


def test_between_two_groups_nothing_is_measured_again(work: Path, tmp_path: Path, little_room: None) -> None:
    out = tmp_path / "out"
    assert stopped(work, out, 4)[0].returncode == 130
    done, met = stopped(work, out, 100)
    assert (done.returncode, len(met)) == (0, 8)
    assert out.read_bytes() == (work / "whole").read_bytes()


@pytest.mark.whole
def test_groups_of_another_calibration_are_refused_or_begun_anew(work: Path, tmp_path: Path, little_room: None) -> None:
    out = tmp_path / "out"
    stopped(work, out, 6)
    before = contents(tmp_path)
    done = moekern(*command(work, out, "--seed", 3))
    assert done.returncode == 2
    assert "group-1-of-3.safetensors: of an earlier run, with another text" in done.stderr.splitlines()[-1]
    done = moekern(*command(work, out, "--until-stable", 0.9))
    assert done.returncode == 2
    assert "a stopped run without --until-stable is kept there" in done.stderr.splitlines()[-1]
    assert contents(tmp_path) == before
    done = moekern(*command(work, out, "--restart"))
    assert done.returncode == 0, done.stderr
    assert set(contents(tmp_path)) == {"out"}


def test_what_a_kill_after_the_last_group_leaves_is_removed(
    work: Path, tmp_path: Path, little_room: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moekern.calibration.text_groups.remove_groups_of", lambda out: None)
        assert moekern(*command(work, out)).returncode == 0
    assert len(contents(tmp_path)) == 4
    assert "exists already" in moekern(*command(work, out)).stderr
    assert set(contents(tmp_path)) == {"out"}


def test_the_library_divides_the_text_too(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held and what is written are the sums of one pass; `progress` counts all groups; nothing else is left."""
    ids = torch.from_numpy(np.load(work / "ids.npy"))[:160].reshape(10, 16)
    data = TokenData((Batch("a", ids[:4]), Batch("b", ids[4:])), {}, 1)
    compute = Compute(dtype="float32", spill=tmp_path / "spill")
    compute.spill.mkdir()
    whole, told, counted = calibrate(work / "model", data, compute), list[Any](), list[tuple[float, int]]()
    whole.save(tmp_path / "whole")
    tight.little_room(monkeypatch, 40 * 4 * H, 40 * 4 * H)
    step = lambda done, total: counted.append((done, total))  # noqa: E731
    held = calibrate(work / "model", data, compute, told=told.append, progress=step)
    held.save(tmp_path / "held")
    calibrate(work / "model", data, compute, out=tmp_path / "out")
    assert (tmp_path / "held").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [list(layer.layers) for layer in told] == [[key] for key in whole.layers]
    assert counted[-1] == (12, 12)
    assert counted == sorted(counted)
    assert set(contents(tmp_path)) == {"whole", "held", "out"}
    tight.little_room(monkeypatch, 4 * H, 0)
    with pytest.raises(NoRoomForText, match="160 tokens take 20.0 KiB of hidden states: memory has room for 128 B"):
        calibrate(work / "model", data, compute)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("calibrate", ("--tier", "outliers"), "without --tier outliers it would be measured in groups of text"),
        ("calibrate", ("--tier", "gradient"), "without --tier gradient it would be measured in groups of text"),
        (
            "iterate",
            ("--keep", 4, "--criterion", "reap"),
            "all of it is needed at each layer, so that it is not",
        ),
    ],
)
def test_what_needs_all_text_at_once_is_one_line(
    work: Path, tmp_path: Path, little_room: None, name: str, more: tuple[object, ...], message: str
) -> None:
    done = moekern(*command(work, tmp_path / "out", *more, name=name))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_segment_that_there_is_no_room_for_is_refused(
    work: Path, tmp_path: Path, little_room: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight.little_room(monkeypatch, 4 * H, 0)
    done = moekern(*command(work, tmp_path / "out"))
    assert done.returncode == 2
    assert "give more (--memory), another folder (--spill) or less text (--tokens)" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())

"""Parts of a calibration, measured apart, make the bytes of the whole; a part that is wrong is told in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.data.text import Text
from moekern.demo import MODEL, TEXT
from moekern.errors import InputError
from moekern.files import state_path
from moekern.measurement import gradient_parts
from moekern.measurement.gradient_parts import finishing
from moekern.model.compute import Compute
from moekern.model.journal import Resume
from moekern.model.room import Need
from moekern.statistics.file import Statistics
from moekern.statistics.parts import merge_parts, open_part
from moekern.team import Part
from tests.helpers.commands import model_and_ids, moekern
from tests.helpers.threads import using_threads

TIERS = ["dimensions", "coalitions", "weights", "vocabulary", "replay"]
FLOAT32 = Compute(dtype="float32")
pytestmark = pytest.mark.xdist_group("parts")  # what they share is dear


def text(tokens: int = 500, seed: int = 0) -> TokenData:
    sources = (f"c={TEXT / 'c' / 'calibration.txt'}:0.7", f"de={TEXT / 'german' / 'calibration.txt'}:0.3")
    return Text(sources, tokens, 32, chunk=1, seed=seed).read(open_checkpoint(MODEL))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the whole, with three parts of it, and with two parts of other text."""
    folder = tmp_path_factory.mktemp("parts")
    with using_threads(1):
        calibrate(MODEL, text(), FLOAT32, tiers=TIERS, out=folder / "whole")
        for number in (1, 2, 3):
            calibrate(MODEL, text(), FLOAT32, tiers=TIERS, out=folder / f"{number}-3", part=Part(number, 3))
        for number in (1, 2):
            calibrate(MODEL, text(seed=1), FLOAT32, tiers=TIERS, out=folder / f"{number}-2", part=Part(number, 2))
    return folder


def test_all_parts_make_the_bytes_of_the_whole(made: Path, tmp_path: Path) -> None:
    done = moekern("merge", *(made / f"{number}-3" for number in (2, 3, 1)), "--out", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s").read_bytes() == (made / "whole").read_bytes()


def test_parts_share_the_text(made: Path) -> None:
    parts = [open_part(made / f"{number}-3") for number in (1, 2, 3)]
    segments = [segment for part in parts for segment in part.segments.values()]
    assert len(set(segments)) == len(segments) == 11 + 5
    sizes = [sum(part.tokens.values()) for part in parts]
    assert sum(sizes) == 500
    assert max(sizes) - min(sizes) <= 32


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("1-3", "3-3"), "part 2 of 3 is missing"),
        (("2-3",), "parts 1, 3 of 3 are missing"),
        (("1-3", "2-3", "2-3", "3-3"), "are both part 2"),
        (("1-3", "2-2", "3-3"), "2-2: of another calibration than .*1-3: its number of parts differs"),
        (("1-2", "whole"), "whole: statistics of their own, no part"),
    ],
)
def test_parts_that_do_not_make_a_whole(made: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"^merge: .*{message}|^[^ ]*{message}"):
        merge_parts([made / name for name in names])


def test_a_part_of_other_text(made: Path, tmp_path: Path) -> None:
    with using_threads(1):
        calibrate(MODEL, text(), FLOAT32, tiers=TIERS, out=tmp_path / "1", part=Part(1, 2))
    with pytest.raises(InputError, match="2-2: of another calibration than .*/1: its runs differs"):
        merge_parts([tmp_path / "1", made / "2-2"])


def test_a_part_with_another_sample(made: Path, tmp_path: Path) -> None:
    name = b'\\"--replay-tokens\\": 51'
    (tmp_path / "2").write_bytes((made / "2-3").read_bytes().replace(name + b"2", name + b"1"))
    with pytest.raises(InputError, match="2: of another calibration than .*1-3: its --replay-tokens differs"):
        merge_parts([made / "1-3", tmp_path / "2", made / "3-3"])


def test_a_part_is_no_statistics(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1-3: one part of a calibration by parts; merge all of them first"):
        Statistics.load(made / "1-3")
    done = moekern("merge", made / "1-3", made / "whole", "--out", tmp_path / "s")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("change", ['"of": 0', '"segments": 5', '"segments": [["c", 0]]', '"tokens": {}'])
def test_a_header_that_is_not_a_parts(made: Path, tmp_path: Path, change: str) -> None:
    name = change.partition(":")[0].strip('"')
    data = (made / "1-3").read_bytes()
    length = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + length])
    header = json.loads(document["__metadata__"]["moekern"])
    header["part"] |= json.loads(f"{{{change}}}")
    assert name in header["part"]
    document["__metadata__"]["moekern"] = json.dumps(header)
    text = json.dumps(document).encode()
    (tmp_path / "s").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(InputError, match="header: part: "):
        open_part(tmp_path / "s")


def test_what_a_part_cannot_measure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--tier outliers: it needs all of the text, and --part 1/2 has a share"):
        calibrate(MODEL, text(), FLOAT32, tiers=["outliers"], out=tmp_path / "s", part=Part(1, 2))
    with pytest.raises(InputError, match="a part keeps the gradients of its segments in a file; name one as out"):
        calibrate(MODEL, text(), FLOAT32, tiers=["gradient"], part=Part(1, 2))
    with pytest.raises(InputError, match="--part 1/20: the text has 16 segments; make no more parts of it"):
        calibrate(MODEL, text(), FLOAT32, out=tmp_path / "s", part=Part(1, 20))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and with its gradients as a whole and in 1, 2, and 4 parts."""
    folder = tmp_path_factory.mktemp("kept")
    model_and_ids(folder)
    for number, of in ((0, 1), *((i, n) for n in (1, 2, 4) for i in range(1, n + 1))):
        kept_part(folder, f"{number}-{of}", Part(number, of) if number else None)
    return folder


def kept_part(folder: Path, name: str, part: Part | None, **more: Any) -> Path:
    ids = torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(0))
    data = TokenData((Batch("a", ids[:3]), Batch("b", ids[3:])), {})
    with using_threads(1):
        calibrate(folder / "model", data, FLOAT32, tiers=["gradient"], out=folder / name, part=part, **more)
    return folder / name


@pytest.mark.parametrize("of", [1, 2, 4])
def test_gradients_of_parts(kept: Path, tmp_path: Path, of: int) -> None:
    """A part keeps G of its segments, of which merging makes what is no sum."""
    parts = [kept / f"{number}-{of}" for number in range(of, 0, -1)]
    merge_parts(parts, finishing(tmp_path)).save(tmp_path / "s", new=True)
    assert (tmp_path / "s").read_bytes() == (kept / "0-1").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_gradients_beyond_memory_are_added_up_in_files(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_parts, "IN_MEMORY", 0)
    merge_parts([kept / "1-2", kept / "2-2"], finishing(tmp_path)).save(tmp_path / "s", new=True)
    assert (tmp_path / "s").read_bytes() == (kept / "0-1").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"/gradient.0.", b"/gradient.7.", "layer 0: segment [ab]/[0-9]: gradients of other shapes"),
        (b"/gradient.0.", b"/gradien/.0.", "is not <layer>/<domain number>/<field>"),
    ],
)
def test_parts_with_gradients_of_another_run(
    kept: Path, tmp_path: Path, before: bytes, after: bytes, message: str
) -> None:
    data = (kept / "2-2").read_bytes()
    assert before in data
    (tmp_path / "2").write_bytes(data.replace(before, after, 1))
    with pytest.raises(InputError, match=message):
        merge_parts([kept / "1-2", tmp_path / "2"], finishing(tmp_path))


def test_a_stopped_part_with_gradients_goes_on(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept / "model", tmp_path / "model")
    said: list[str] = []
    resume = Resume(state_path(tmp_path / "1-2"), tell=said.append)

    def stop(done: float, total: int) -> None:
        if done >= total - 1:  # on the way back, with a layer to come
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_part(tmp_path, "1-2", Part(1, 2), resume=resume, progress=stop)
    assert not (tmp_path / "1-2").exists()
    kept_part(tmp_path, "1-2", Part(1, 2), resume=resume)
    assert any("going on" in line for line in said)
    assert (tmp_path / "1-2").read_bytes() == (kept / "1-2").read_bytes()


def test_gradients_that_do_not_add_up_are_named(kept: Path, tmp_path: Path) -> None:
    part = open_part(kept / "2-2")
    entry = next(iter(part.layers["0"].gradients[next(iter(part.segments))].values()))
    (tmp_path / "2").write_bytes((kept / "2-2").read_bytes())
    with (tmp_path / "2").open("r+b") as file:
        file.seek(entry.start)
        file.write(b"\xff" * 4)
    merged = merge_parts([kept / "1-2", tmp_path / "2"], finishing(tmp_path))
    with pytest.raises(InputError, match="merge: layer 0, domain [ab]: gradient_norm_sum: gradients of the parts"):
        merged.save(tmp_path / "s", new=True)


def test_gradients_without_room_are_refused(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_parts.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(Need, "check", lambda *arguments: 0)
    with pytest.raises(InputError, match=r"gradients of \d segments take .*, and .* has 1000 B free; make more parts"):
        kept_part(kept, "none", Part(1, 2))
    assert not (kept / "none").exists()


def test_outliers_are_counted_by_the_mean_of_all_parts(tmp_path: Path) -> None:
    """A second array of jobs, by what the first one has measured together."""
    ids = model_and_ids(tmp_path) / "ids.npy"
    command = ["calibrate", tmp_path / "model", "--data", f"a={ids}:2", "--data", f"b={ids}:1", "--tokens", 48]
    command += ["--sequence-length", 16, "--chunk", 1, "--dtype", "float32"]

    def made(name: str, *words: object) -> Path:
        done = moekern(*words, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    def of_parts(name: str, *more: object) -> Path:
        parts = [made(f"{name}-{n}", *command, *more, "--part", f"{n}/2") for n in (1, 2)]
        return made(name, "merge", *parts)

    whole = made("whole", *command, "--tier", "outliers")
    by = ("--tier", "outliers", "--first", of_parts("first", "--tier", "dimensions"))
    assert of_parts("second", *by).read_bytes() == whole.read_bytes()
    done = moekern(*command, "--seed", 1, *by, "--part", "1/2", "--out", tmp_path / "other")
    assert done.returncode == 2
    assert f"{tmp_path / 'first'}: another text " in done.stderr
    assert "give statistics of the same text, with the tier dimensions" in done.stderr
    done = moekern(*command, *by, "--out", tmp_path / "other")
    assert f"--first {tmp_path / 'first'}: parts of the tier outliers are counted by it" in done.stderr
    assert not (tmp_path / "other").exists()


def test_the_command_says_what_is_next(tmp_path: Path) -> None:
    data = ["--data", f"c={TEXT / 'c' / 'calibration.txt'}", "--tokens", 200, "--sequence-length", 32, "--chunk", 1]
    done = moekern("calibrate", MODEL, *data, "--part", "2/2", "--out", tmp_path / "2")
    assert done.returncode == 0, done.stderr
    assert "part 2 of 2: 3 segments with 96 of 200 tokens; `moekern merge` makes statistics of all parts" in done.stderr
    done = moekern("calibrate", MODEL, *data, "--part", "3/2", "--out", tmp_path / "3")
    assert done.stderr == "moekern: --part 3/2: expected I/N, I from 1 to N, such as 1/4\n"

"""The command `estimate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moekern.estimation import probe
from tests.helpers.commands import document, moekern
from tests.helpers.hub import Hub, client, serving

MakeCheckpoint = Callable[[str], Path]
ID = "someone/tiny-moe"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SECONDS", 0.01)
    monkeypatch.setattr(probe, "PROBED", 32 << 20)


@pytest.fixture
def hub(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> Iterator[Hub]:
    with serving() as served, client(served, tmp_path / "home"):
        served.add(ID, family_checkpoint("qwen3_moe"))
        yield served


def test_stages_and_what_each_figure_is_known_by(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    given = (family_checkpoint("qwen3_moe"), "--tokens", "4k", "--tier", "outliers", "--out", tmp_path)
    found: dict[str, Any] = document("estimate", *given)
    trainings = ["recover --train router", "recover --train all"]
    assert list(found["stages"]) == ["calibrate", "evaluate", "prune", "refit", "refit --refine", *trainings]
    assert (found["tokens"], found["dtype"], found["gpu_memory"]) == (4000, "float32", None)
    for stage in found["stages"].values():
        for name in ("seconds", "memory", "disk"):
            figure = stage[name]
            assert figure["value"] == pytest.approx(sum(part["value"] for part in figure["parts"]))
            assert {part["known"] for part in figure["parts"]} <= {"counted", "measured", "assumed"}
    done = moekern("estimate", *given)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("computing on ")
    for word in ("calibrate", "hidden states", "counted", "measured", "FLOP/s"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_of_a_hub_id_headers_are_enough(hub: Hub, family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    found: dict[str, Any] = document("estimate", ID, "--tokens", "4k", "--out", tmp_path)
    local: dict[str, Any] = document(
        "estimate", family_checkpoint("qwen3_moe"), "--tokens", "4k", "--out", tmp_path
    )  # fmt: skip
    assert found["rates"]["read"]["known"] == "assumed"
    assert "the download of" in found["stages"]["calibrate"]["notes"][0]
    assert found["stages"]["calibrate"]["disk"] == local["stages"]["calibrate"]["disk"]
    assert hub.sent(".safetensors") < sum(f.stat().st_size for f in family_checkpoint("qwen3_moe").iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tokens", "all"), "--tokens all: an estimate needs a number"),
        (("--tokens", "0"), "--tokens 0: expected 1 or more"),
        (("--keep", "9999"), "--keep 9999"),
        (("--memory", "1MB"), "--memory 976.6 KiB: the process has"),
        (("--memory", "much"), "--memory much: expected a size"),
        (("--gpu-memory", "1GB", "--device", "cpu"), "--gpu-memory: layers are computed on cpu"),
        (("--out", "nowhere"), "--out nowhere: no folder that can be written to"),
    ],
)
def test_what_is_wrong_is_one_line(more: tuple[str, ...], message: str, family_checkpoint: MakeCheckpoint) -> None:
    done = moekern("estimate", family_checkpoint("qwen3_moe"), *more)
    assert done.returncode == 2
    assert done.stderr.startswith(f"moekern: {message}")
    assert done.stderr.count("\n") == 1

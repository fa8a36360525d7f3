"""A process whose memory has a hard limit, smaller than one layer of its model, calibrates, evaluates and iterates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import large

TIDY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}  # the limit counts holes of the heap too
SIZES = {"0.3GB": (32, 300), "0.6GB": (64, 500)}  # of a layer: its experts, and the limit in MiB


@pytest.fixture(scope="module", params=["0.3GB", pytest.param("0.6GB", marks=pytest.mark.whole)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    experts, megabytes = SIZES[request.param]
    folder = large.save(tmp_path_factory.mktemp("large") / "model", experts)
    assert megabytes << 20 < (folder / "model-00001-of-00003.safetensors").stat().st_size
    return folder, megabytes


DEAR = [pytest.param(stage, marks=pytest.mark.whole) for stage in ("evaluate", "iterate")]


@pytest.mark.parametrize("stage", ["calibrate", *DEAR])
def test_a_layer_larger_than_the_limit_gives_the_same_numbers(stage: str, model: tuple[Path, int]) -> None:
    free, limited = _both(stage, *model)
    assert limited["found"] == free["found"]


@pytest.mark.whole
def test_gradients_of_a_layer_larger_than_the_limit_differ_by_rounding(model: tuple[Path, int]) -> None:
    free, limited = _both("gradient", *model)
    for key, norms in free["found"].items():
        assert limited["found"][key] == pytest.approx(norms, rel=2**-5)  # of bfloat16


def _both(stage: str, folder: Path, megabytes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What comes of a stage without the limit and with it."""
    free, limited = (_run(stage, folder, limit) for limit in (0, megabytes))
    assert free["groups"] == 1
    assert limited["groups"] > 1
    assert limited["peak"] <= free["peak"]  # of a process that is forked from a large one both are what that one had
    return free, limited


def _run(stage: str, folder: Path, megabytes: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.limited", stage, str(folder), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **TIDY})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]

"""A checkpoint to verify."""

from pathlib import Path

import pytest

from moekern.pruning.prune import prune


@pytest.fixture
def pruned(source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The module's `source`, pruned by its PLAN."""
    prune(source, request.module.PLAN, tmp_path / "out")
    return tmp_path / "out"

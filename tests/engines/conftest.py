"""The engines of the folder --engines, and checkpoints that several tests of them share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import engine_models
from tests.helpers.engines import Engines


@pytest.fixture(scope="session")
def engines(request: pytest.FixtureRequest) -> Engines:
    return Engines(Path(request.config.getoption("--engines")).absolute())


@pytest.fixture(scope="session")
def needs(engines: Engines) -> Callable[[str], None]:
    """needs(environment): skip the test where it is not there."""

    def check(environment: str) -> None:
        if not engines.has(environment):
            pytest.skip(f"no {environment} in {engines.root}; tests/engines/setup.sh installs it")

    return check


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """original(name) -> folder of a family's checkpoint for engines, written once."""
    root = tmp_path_factory.mktemp("originals")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            engine_models.save(name, root / name)
        return root / name

    return folder

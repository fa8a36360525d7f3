"""Shared by all tests: NaN-filled memory, quiet transformers, and one tiny checkpoint a family for the whole run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Before Triton is imported: without a GPU its kernels are tested in its interpreter, with one they are compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import transformers
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.helpers")  # a failed assert says what it compared, as in a test

from tests.helpers import families  # noqa: E402

settings.register_profile("moekern", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moekern")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="also what the default run leaves out of dear matrices")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--whole"):
        spare = [item for item in items if item.get_closest_marker("whole")]
        config.hook.pytest_deselected(items=spare)
        items[:] = [item for item in items if not item.get_closest_marker("whole")]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """A kernel that forgets to write what it returns is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family_checkpoint(name) -> folder of that family's tiny random checkpoint, written once."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        target = root / name
        if not target.exists():
            families.save(name, target)
        return target

    return folder

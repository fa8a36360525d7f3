"""Shared by all tests: NaN-filled memory, quiet transformers, and each family's checkpoint and model, made once.

A family's tests run one after another, and in one process under pytest-xdist's --dist loadgroup. What they share in
memory is that family's alone.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Before Triton is imported: without a GPU its kernels are tested in its interpreter, with one they are compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub but that of tests/helpers/hub.py
# Where transformers copies code that comes with a checkpoint; one folder a process, since it is imported from there.
CODE = tempfile.TemporaryDirectory(prefix="moekern-tests-code-")
os.environ["HF_MODULES_CACHE"] = CODE.name

import transformers  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

pytest.register_assert_rewrite("tests.helpers")  # a failed assert says what it compared, as in a test

from moekern.errors import speaking_flags  # noqa: E402
from tests.helpers import families, in_flight  # noqa: E402

settings.register_profile("moekern", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moekern")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


# Files with tests of a quarter of a minute: first, so that at the end no process waits for one.
DEAR = ("test_docs.py", "test_tour.py", "test_limits.py", "test_cuda_logic.py", "test_triton.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="also what is marked whole")
    parser.addoption("--engines", metavar="FOLDER", help="also what needs engines, which lie there")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(families.FAMILIES)}
    for item in items:
        if (name := _family(item)) in places:
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: (item.path.name not in DEAR, places.get(_family(item), len(places))))
    for name in ("whole", "engines"):
        if not config.getoption(f"--{name}"):
            spare = [item for item in items if item.get_closest_marker(name)]
            config.hook.pytest_deselected(items=spare)
            items[:] = [item for item in items if not item.get_closest_marker(name)]


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: the garbage collector need not look through it again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def _family(item: pytest.Item) -> str:
    """The family whose checkpoint a test is about, by its parameter `name`; or no family's name."""
    name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
    return name if isinstance(name, str) and "family_checkpoint" in item.fixturenames else ""  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _errors_name_flags() -> Iterator[None]:
    """Tests of the core expect the words of the command line; tests/test_library.py has those of the library."""
    with speaking_flags():
        yield


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


@pytest.fixture(scope="session")
def _shared(
    family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[in_flight.Shared]:
    shared = in_flight.Shared(family_checkpoint, tmp_path_factory.mktemp("halves"))
    yield shared
    shared.clear()


@pytest.fixture
def whole_model(_shared: in_flight.Shared) -> Iterator[Callable[[str], Any]]:
    """whole_model(name) -> the model of family_checkpoint(name), the same one for all tests of the family.

    They leave it as it was, which is checked; those that change it take a copy (copy.deepcopy).
    """
    yield _shared.model
    _shared.check()


@pytest.fixture
def half(_shared: in_flight.Shared) -> Callable[[str], in_flight.Half]:
    """half(name) -> the family's checkpoint with half of the experts, pruned once."""
    return _shared.half

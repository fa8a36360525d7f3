"""Dropped experts that are constants (`--replace`), in vLLM: tokens are those of the literal model in transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from moekern.architectures import find_layout
from moekern.architectures.substitution import APPROXIMATE, FORMS, as_whole
from moekern.checkpoint.folder import open_checkpoint
from moekern.judging.live import constants_applied
from moekern.model.transformers_api import loader_of
from moekern.plan.constants import stored_constants
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.replacement import Replacement
from moekern.plan.served import check_folder, verdict
from moekern.plan.targets import Target
from moekern.pruning.prune import prune
from tests.helpers import families
from tests.helpers.engine_models import SIZES
from tests.helpers.engines import Answer, Engines, greedy
from tests.helpers.substitution import Vectors

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

NAMES = ("qwen2_moe", "qwen3_moe", "glm4_moe")  # with a shared expert, plain, and with both that and groups
KEPT = ((0, 2, 7), (4,), (1, 3, 5, 6, 7), (2, 6))  # of each layer in turn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, original: Callable[[str], Path]) -> dict[tuple[str, str], Path]:
    """(family, form) -> its checkpoint with constants that are not zero."""
    root, made = tmp_path_factory.mktemp("replaced"), {}
    for name in NAMES:
        layers = find_layout(open_checkpoint(original(name))).layers
        plan = Plan({key: LayerPlan(KEPT[i]) for i, key in enumerate(layers)}, {}, Replacement("mean", "0" * 64))
        for form in FORMS:
            made[name, form] = root / f"{name}-{form}"
            prune(original(name), plan, made[name, form], form=form, vectors=Vectors(SIZES["hidden_size"]))
    return made


@pytest.fixture(scope="module")
def answers(
    engines: Engines, folders: Mapping[tuple[str, str], Path], needs: Callable[[str], None]
) -> Callable[[str, Path], Answer]:
    found: dict[str, dict[Path, Answer]] = {}

    def answer(environment: str, folder: Path) -> Answer:
        needs(environment)
        if environment not in found:
            found[environment] = engines.vllm(list(folders.values()), environment)
        return found[environment][folder]

    return answer


def literal(source: Path, folder: Path) -> list[list[int]]:
    """Tokens of the original whose dropped experts return the folder's constants."""
    checkpoint = open_checkpoint(folder)
    _, constants = as_whole(checkpoint)
    model, layout = families.load(source), find_layout(open_checkpoint(source))
    with constants_applied(loader_of(model), layout, stored_constants(checkpoint, constants)):
        return greedy(model).tokens


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_vllm_computes_the_constants(
    name: str, form: str, folders: Mapping[tuple[str, str], Path], answers: Callable[[str, Path], Answer],
    original: Callable[[str], Path],
) -> None:  # fmt: skip
    folder = folders[name, form]
    assert verdict(check_folder(folder, [Target("vllm")]).found["vllm"])
    assert answers("vllm-0.33", folder) == literal(original(name), folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_vllm_before_0_33_does_not(
    name: str, form: str, folders: Mapping[tuple[str, str], Path], answers: Callable[[str, Path], Answer],
    original: Callable[[str], Path],
) -> None:  # fmt: skip
    """The form that is written by default ends it; of the other one it may not notice anything."""
    answer = answers("vllm", folders[name, form])
    assert answer != literal(original(name), folders[name, form])
    assert isinstance(answer, str) or form == APPROXIMATE

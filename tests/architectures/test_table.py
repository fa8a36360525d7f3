"""What rows of the table say a family cannot do is refused in one line, before anything is loaded."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from moekern.architectures import FAMILIES, built_by_transformers, family_named
from moekern.calibration.calibrate import calibrate
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.plan.engines import registries
from tests.helpers import families

ONLY_PRUNED = [name for name in families.FAMILIES if (row := family_named(name.split("-")[0])) and row.only_pruned]


def test_a_row_gives_reasons_for_what_it_can_be_asked() -> None:
    for row in FAMILIES:
        assert not (row.refused and (row.only_pruned or row.no_gradient)), row.name
        assert not (row.only_pruned and row.no_gradient), row.name
        assert bool(row.stacks) <= bool(row.only_pruned), row.name
    assert {"diffusion_gemma", "qwen3_omni_moe"} <= set(ONLY_PRUNED)


def test_names_that_transformers_has_no_class_for_are_told_from_the_others() -> None:
    types = registries()["transformers"]["types"]
    for row in FAMILIES:
        for name in (row.name, *row.also):
            assert built_by_transformers(name) == (name in types), name
    assert not built_by_transformers("something_new")


@pytest.mark.parametrize("name", ONLY_PRUNED)
def test_what_is_only_pruned_is_not_calibrated(name: str, family_checkpoint: Callable[[str], Path]) -> None:
    row = family_named(name)
    assert row is not None
    data = TokenData((Batch("a", families.input_ids(name)),), {})
    with pytest.raises(InputError, match=f"{row.name} cannot be run: {re.escape(row.only_pruned)}"):
        calibrate(family_checkpoint(name), data)

"""What decides the bits of a calibration beside text and options."""

import pytest
import torch

from moekern.calibration import sharing
from moekern.calibration.sharing import recipe_of
from moekern.data.batches import TokenData
from moekern.model.compute import Compute


def test_the_recipe_names_the_library_of_products_where_it_is_not_torchs_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = TokenData((), {"seed": 1})
    monkeypatch.setattr(sharing, "library_of", lambda dtype: "onednn" if dtype == torch.float32 else None)
    assert recipe_of(data, Compute("cpu", dtype="float32"), ())["products"] == "onednn"
    assert "products" not in recipe_of(data, Compute("cpu", dtype="bfloat16"), ())

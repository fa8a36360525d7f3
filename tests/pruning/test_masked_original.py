"""The oracle, for every family: the pruned checkpoint is the original with the dropped experts masked out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern.model.masking import masked
from moekern.model.transformers_api import loader_of
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.in_flight import REFUSED, Half

# 256 float32 epsilons on logits of order 1: the sums over experts and the softmax take another order.
TOLERANCE = 2**-15


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in REFUSED])
def test_pruned_equals_masked(
    name: str, family_checkpoint: Callable[[str], Path], whole_model: Callable[[str], Any], half: Callable[[str], Half]
) -> None:
    pruned, model = half(name), whole_model(name)
    assert verify(family_checkpoint(name), pruned.plan, pruned.folder).problems == ()
    layout, keeps = pruned.layout, {key: layer.keep for key, layer in pruned.plan.layers.items()}
    ids = families.input_ids(name)
    whole = families.forward(model, ids)
    dropped = {key: sorted(set(range(layout.num_experts)) - set(keeps[key])) for key in layout.layers}
    with torch.no_grad(), masked(loader_of(model), layout, dropped):
        want = families.forward(model, ids)
    assert (want - whole).abs().max() > 1000 * TOLERANCE, "masking changed nothing"
    torch.testing.assert_close(pruned.logits, want, rtol=0, atol=TOLERANCE)

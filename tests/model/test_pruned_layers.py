"""A layer pruned in memory computes what the pruned checkpoint's layer computes, bit for bit, in every family."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekern.model.pruned_layers import LivePruner
from moekern.model.transformers_api import loader_of
from tests.helpers import families
from tests.helpers.in_flight import REFUSED, Half


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in REFUSED])
def test_logits_are_those_of_the_pruned_checkpoint(
    name: str, whole_model: Callable[[str], Any], half: Callable[[str], Half]
) -> None:
    ids, written = families.input_ids(name), half(name)
    model = copy.deepcopy(whole_model(name))
    whole = families.forward(model, ids)
    live = LivePruner(loader_of(model), written.layout)
    for key, layer in written.plan.layers.items():
        live.prune(key, layer.keep)
    got = families.forward(model, ids)
    assert not torch.equal(got, whole)
    assert torch.equal(got, written.logits)

"""A layer pruned in memory computes what the pruned checkpoint's layer computes, bit for bit, in every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.model.pruned_layers import LivePruner
from moekern.model.transformers_api import loader_of
from moekern.pruning.prune import prune
from tests.helpers import families
from tests.pruning.test_masked_original import REFUSED, random_plan

MakeCheckpoint = Callable[[str], Path]


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in REFUSED])
def test_logits_are_those_of_the_pruned_checkpoint(
    name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = family_checkpoint(name)
    layout = find_layout(open_checkpoint(folder))
    plan = random_plan(layout, seed=len(name))
    prune(folder, plan, tmp_path / "out")
    ids = families.input_ids(name)
    model, written = families.load(folder), families.load(tmp_path / "out")
    whole = families.forward(model, ids)
    live = LivePruner(loader_of(model), layout)
    for key, layer in plan.layers.items():
        live.prune(key, layer.keep)
    got = families.forward(model, ids)
    assert not torch.equal(got, whole)
    assert torch.equal(got, families.forward(written, ids))

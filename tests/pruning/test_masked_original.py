"""The oracle, for every family: the pruned checkpoint is the original with the dropped experts masked out."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekern.architectures import FAMILIES, Layout, find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.model.masking import masked
from moekern.model.transformers_api import loader_of
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.verification.tensors import verify
from tests.helpers import families

# 256 float32 epsilons on logits of order 1: the sums over experts and the softmax take another order.
TOLERANCE = 2**-15


def random_plan(layout: Layout, seed: int, per_group: int | None = None) -> Plan:
    """A different half of the experts in each layer, the same number in each group."""
    rng = random.Random(seed)
    size = layout.num_experts // layout.n_group
    count = per_group or size // 2
    layers = {}
    for key in layout.layers:
        groups = [rng.sample(range(g * size, (g + 1) * size), count) for g in range(layout.n_group)]
        layers[key] = LayerPlan(tuple(sorted(e for group in groups for e in group)))
    return Plan(layers)


REFUSED = {name for family in FAMILIES if family.refused for name in (family.name, *family.also)}
REFUSED |= {"diffusion_gemma"}  # two stacks share their layers, and only one of them has names in the checkpoint


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in REFUSED])
def test_pruned_equals_masked(name: str, family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_checkpoint(name)
    layout = find_layout(open_checkpoint(folder))
    plan = random_plan(layout, seed=len(name))
    prune(folder, plan, tmp_path / "out")
    assert verify(folder, plan, tmp_path / "out").problems == ()

    pruned, info = families.load(tmp_path / "out", loading_info=True)
    assert not any(info.values()), info
    model = families.load(folder)
    ids = families.input_ids(name)
    whole = families.forward(model, ids)
    dropped = {key: sorted(set(range(layout.num_experts)) - set(plan.layers[key].keep)) for key in layout.layers}
    with torch.no_grad(), masked(loader_of(model), layout, dropped):
        want = families.forward(model, ids)
    got = families.forward(pruned, ids)
    assert (want - whole).abs().max() > 1000 * TOLERANCE, "masking changed nothing"
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)

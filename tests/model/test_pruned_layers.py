"""A layer pruned in memory computes what the pruned checkpoint's layer computes, bit for bit, in every family."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern.architectures import find_layout
from moekern.architectures.widths import narrow_numbers
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.model.masking import masked
from moekern.model.pruned_layers import LivePruner
from moekern.model.transformers_api import loader_of
from tests.helpers import families
from tests.helpers.in_flight import REFUSED, Half, random_plan
from tests.helpers.narrow import random_channels
from tests.helpers.pairwise import thirds

NAMES = [name for name in families.FAMILIES if name not in REFUSED]
BOTH = {"hunyuan_v1_moe", "llama4_text", "llama4", "deepseek_v4", "inkling_text", "inkling_mm_model", "jamba"}
FEW = ("qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "jetmoe", "longcat_flash", "muse_spark", "step3p7")
# 256 float32 epsilons on logits of order 1: sums over channels and experts take another order.
TOLERANCE = 2**-15


@torch.no_grad()
@pytest.mark.parametrize("name", thirds(NAMES, 2))
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


@torch.no_grad()
@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.whole) for n in NAMES])
def test_narrow_experts_are_whole_ones_whose_other_channels_are_silent(
    name: str, family_checkpoint: Callable[[str], Path], whole_model: Callable[[str], Any]
) -> None:
    """Shared experts stay as they are, although the config's width makes them narrower."""
    layout, ids = find_layout(open_checkpoint(family_checkpoint(name))), families.input_ids(name)
    whole, live = whole_model(name), copy.deepcopy(whole_model(name))
    pruner = LivePruner(loader_of(live), layout)
    keeps = {key: layer.keep for key, layer in random_plan(layout, 0).layers.items()}
    channels = random_channels(layout, keeps, 16, 1)
    if name in BOTH:
        key, keep = next(iter(keeps.items()))
        with pytest.raises(InputError, match="channels of this model cannot be cut"):
            pruner.prune(key, keep, channels[key])
        return
    for key, keep in keeps.items():
        pruner.prune(key, keep, channels[key])
    dropped = {key: sorted(set(range(layout.num_experts)) - set(keep)) for key, keep in keeps.items()}
    silent = {key: dict(zip(keep, channels[key], strict=True)) for key, keep in keeps.items()}
    with masked(loader_of(whole), layout, dropped, silent):
        want = families.forward(whole, ids)
    with masked(loader_of(whole), layout, dropped):
        assert (want - families.forward(whole, ids)).abs().max() > 1000 * TOLERANCE
    torch.testing.assert_close(families.forward(live, ids), want, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_experts_first_and_channels_later(
    family_checkpoint: Callable[[str], Path], whole_model: Callable[[str], Any]
) -> None:
    name = "deepseek_v3"
    layout, ids = find_layout(open_checkpoint(family_checkpoint(name))), families.input_ids(name)
    both, steps = (copy.deepcopy(whole_model(name)) for _ in range(2))
    one, two = LivePruner(loader_of(both), layout), LivePruner(loader_of(steps), layout)
    keeps = {key: (0, 1, 4, 6) for key in layout.layers}
    channels = random_channels(layout, keeps, 8, 3)
    for key, keep in keeps.items():
        one.prune(key, keep, channels[key])
        two.prune(key, (0, 1, 2, 4, 6, 7))
        two.prune(key, (0, 1, 2, 4, 6, 7), channels[key][[0, 1, 0, 2, 3, 0]])
        two.prune(key, keep)  # narrow ones may still go
    assert torch.equal(families.forward(both, ids), families.forward(steps, ids))
    assert narrow_numbers(layout, 8).items() >= {("moe_intermediate_size",): 8, ("n_shared_experts",): 3}.items()
    with pytest.raises(ValueError, match="has lost some already"):
        one.prune("1", keeps["1"], channels["1"])


@torch.no_grad()
@pytest.mark.parametrize("keep", [(0, 2, 5, 7), tuple(range(8))])
def test_a_layer_pruned_for_a_while_is_the_same_again(
    keep: tuple[int, ...], family_checkpoint: Callable[[str], Path], whole_model: Callable[[str], Any]
) -> None:
    model, ids = whole_model("gpt_oss"), families.input_ids("gpt_oss")
    layout, whole = find_layout(open_checkpoint(family_checkpoint("gpt_oss"))), families.forward(model, ids)
    pruner, found = LivePruner(loader_of(model), layout), []
    for seed, width in ((0, 8), (1, 8), (0, 8), (2, 7)):  # rows of 7 numbers are no whole 16 bytes
        with pruner.pruned("1", keep, random_channels(layout, {"1": keep}, width, seed)["1"]):
            found.append(families.forward(model, ids))
        assert torch.equal(families.forward(model, ids), whole)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    with pytest.raises(ValueError, match="expected .* numbers"):
        pruner.prune("1", keep, torch.zeros(len(keep) - 1, 8).long())
    beyond = torch.full((len(keep), 8), 24)
    for refused in (
        lambda: pruner.prune("1", keep, beyond),
        masked(pruner.loader, layout, {}, {"1": dict(enumerate(beyond))}).__enter__,
    ):
        with pytest.raises(InputError, match="layer 1: channel 24 is to stay, and its experts have channels 0 to 23"):
            refused()


@torch.no_grad()
def test_experts_that_are_not_there_are_not_cut(
    family_checkpoint: Callable[[str], Path], whole_model: Callable[[str], Any]
) -> None:
    model = copy.deepcopy(whole_model("qwen3_moe"))
    layout, block = find_layout(open_checkpoint(family_checkpoint("qwen3_moe"))), model.model.layers[1].mlp.experts
    block.down_proj = torch.nn.Parameter(block.down_proj.to("meta"), requires_grad=False)
    with pytest.raises(InputError, match="layer 1: its experts run in groups"):
        LivePruner(loader_of(model), layout).prune("1", range(8), torch.arange(8).repeat(8, 1))

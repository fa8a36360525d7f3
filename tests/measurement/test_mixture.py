"""Distances from the mixture on tiny real models, against the deletion rebuilt from what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.criteria import criterion_named, score_layer
from moekern.criteria.mixture import sum_to_one_number
from moekern.data.batches import Batch, TokenData
from moekern.measurement.replay import block_of
from moekern.model.compute import Compute
from moekern.model.experts import experts_of
from moekern.model.masking import masked
from moekern.model.transformers_api import loader_of
from moekern.statistics.layer import LayerStatistics
from tests.helpers import families
from tests.helpers.measured import close

MakeCheckpoint = Callable[[str], Path]
E = families.EXPERTS


class Watched:
    """A family's last MoE layer: its sums as they are streamed, and what its block and experts are called with."""

    def __init__(self, name: str, folder: Path, model: Any, tier: str) -> None:
        ids = families.input_ids(name, 2, 12, 1)
        data = TokenData((Batch("text", ids),), {})
        statistics = calibrate(folder, data, Compute(dtype=torch.float32), tiers=(tier,))
        self.key = list(statistics.layers)[-1]
        self.sums: LayerStatistics = statistics.layer(self.key)
        self.layout, self.loader = find_layout(open_checkpoint(folder)), loader_of(model)
        self.layer = self.loader.decoder_layers()[1][self.loader.moe_places(self.layout)[self.key]]
        self.model, self.seen = model, dict[str, Any]()
        experts = experts_of(self.layer)
        assert experts is not None
        self.experts = experts
        hook = experts.register_forward_pre_hook(lambda module, args: self.seen.update(args=args))
        self.run = lambda: families.forward(model, ids)
        with torch.no_grad():
            self.run()
        hook.remove()

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """[T, E, H] of all experts."""
        hidden, T = self.seen["args"][0], len(self.seen["args"][0])
        return torch.stack(
            [self.experts(hidden, torch.full((T, 1), e), torch.ones(T, 1)) for e in range(E)], 1
        ).double()

    @torch.no_grad()
    def block_without(self, *dropped: int) -> Tensor:
        """[T, H] of the block, asked again on its own inputs."""
        block, calls = block_of(self.key, self.layer, self.model), list[Any]()
        hook = block.register_forward_pre_hook(lambda module, *given: calls.append(given), with_kwargs=True)
        self.run()
        hook.remove()
        args, kwargs = calls[-1]
        with masked(self.loader, self.layout, {self.key: list(dropped)}):
            out = block(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(-1, out.shape[-1]).double()


@pytest.fixture
def watched(family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any]) -> Callable[[str, str], Watched]:
    return lambda name, tier: Watched(name, family_checkpoint(name), whole_model(name), tier)


# A softmax whose gates sum to 1; a scaled sigmoid with groups and a bias; a gain of each expert; a latent space.
RENORMALISED = [
    pytest.param("qwen3_moe", marks=pytest.mark.whole),
    "deepseek_v3",
    "gemma4_text",
    pytest.param("nemotron_h", marks=pytest.mark.whole),
]


@pytest.mark.parametrize("name", [*RENORMALISED, "qwen2_moe"])
def test_an_expert_is_left_out_of_its_mixture(name: str, watched: Callable[[str, str], Watched]) -> None:
    """Its row goes, the router's weights of the others grow until they sum to what they did, and the output changes."""
    it = watched(name, "mixture")
    _, ids, gates = it.seen["args"]
    gates, y = gates.double(), it.outputs()
    gain = dict(it.layer.named_parameters()).get("router.per_expert_scale")
    assert (gain is not None and bool((gain != gain[0]).any())) == (name == "gemma4_text")
    left, apart = torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for t in range(len(ids)):
        own, gate = ids[t], gates[t]
        weight = gate if gain is None else gate / gain.detach().double()[own]
        p = gate[:, None] * y[t, own]
        for k, e in enumerate(own.tolist()):
            others = [j for j in range(len(own)) if j != k]
            grown = p[others].sum(0) * (weight.sum() / weight[others].sum())
            left[e] += (p.sum(0) - grown).square().sum()
            apart[e] += (p[k] - weight[k] / weight.sum() * p.sum(0)).square().sum()
    assert sum_to_one_number(it.sums) == (name != "qwen2_moe")
    close(it.sums.left_out_square_sum, left)
    close(it.sums.mixture_square_sum, apart)
    if name == "qwen2_moe":  # its softmax is over all experts: the others' gates stay
        left = apart = it.sums.gated_norm_square_sum
    close(score_layer(criterion_named("rcs_loo"), it.sums, it.key)[it.sums.count > 0], left[it.sums.count > 0])
    close(score_layer(criterion_named("rcs"), it.sums, it.key)[it.sums.count > 0], apart[it.sums.count > 0])


@pytest.mark.parametrize("name", [*RENORMALISED[:2], "qwen2_moe"])
def test_razor_is_what_the_block_loses_when_its_router_chooses_without_an_expert(
    name: str, watched: Callable[[str, str], Watched]
) -> None:
    it = watched(name, "replay")
    _, ids, gates = it.seen["args"]
    whole, y = it.block_without(), it.outputs()
    want = torch.zeros(E, dtype=torch.float64)
    for e in range(E):
        mine = (ids == e).any(1)
        if not mine.any():
            continue
        lost = (whole - it.block_without(e))[mine]
        if name == "qwen2_moe":
            lost = promoted(it, y, e)[mine]
        want[e] = lost.square().sum(1).mean().sqrt()
    used = it.sums.count > 0
    assert torch.equal(it.sums.deletion_count, it.sums.count)
    close(score_layer(criterion_named("razor"), it.sums, it.key)[used], want[used])
    by_router = (it.sums.deletion_gram.diagonal() / it.sums.deletion_count.clamp(min=1)).sqrt()
    assert torch.allclose(by_router[used], want[used], rtol=1e-3) == (name != "qwen2_moe")


def promoted(it: Watched, y: Tensor, e: int) -> Tensor:
    """[T, H]: g y - h z, z the output of the best expert that a token did not choose and h its share of the softmax."""
    _, ids, gates = it.seen["args"]
    logits = list[Tensor]()
    router = next(m for n, m in it.layer.named_modules() if n.endswith("gate") and type(m).__name__.endswith("Router"))
    hook = router.register_forward_hook(lambda module, args, out: logits.append(out[0]))
    it.run()
    hook.remove()
    p = logits[-1].double().softmax(1).scatter(1, ids, 0)
    best = p.argmax(1)
    gate = torch.zeros_like(p).scatter(1, ids, gates.double())[:, e]
    rows = torch.arange(len(p))
    return gate[:, None] * y[:, e] - p[rows, best, None] * y[rows, best]


def test_experts_that_scale_their_inputs_are_their_contributions(watched: Callable[[str, str], Watched]) -> None:
    it = watched("llama4_text", "mixture")
    assert not sum_to_one_number(it.sums)
    close(score_layer(criterion_named("rcs"), it.sums, it.key), it.sums.gated_norm_square_sum)


def test_both_tiers_are_one_read_and_a_gram_matrix_of_what_rows_add(
    family_checkpoint: MakeCheckpoint, watched: Callable[[str, str], Watched]
) -> None:
    it = watched("qwen3_moe", "gram")
    _, ids, gates = it.seen["args"]
    p = torch.zeros(len(ids), E, dtype=torch.float64).scatter(1, ids, gates.double())[..., None] * it.outputs()
    close(it.sums.contribution_gram, torch.einsum("tih,tjh->ij", p, p))
    data = TokenData((Batch("text", families.input_ids("qwen3_moe", 2, 12, 1)),), {})
    both = calibrate(
        family_checkpoint("qwen3_moe"), data, Compute(dtype=torch.float32), tiers=("mixture", "gram")
    ).layer(it.key)
    assert torch.equal(both.contribution_gram, it.sums.contribution_gram)
    assert both.tiers == ("mixture", "gram")

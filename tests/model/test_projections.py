"""An expert in two halves, views of its weights, and one expert alone, against the modules' own forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.model.experts import experts_of
from moekern.model.projections import Views, halves, one_expert, views
from moekern.model.transformers_api import loader_of
from tests.helpers import families
from tests.helpers.in_flight import REFUSED

NAMES = [name for name in families.FAMILIES if name not in REFUSED]
EPS = 2**-23


def block_of(model: Any, folder: Any) -> nn.Module:
    """The experts' module of a copy of the last decoder layer that has one."""
    layout, loader = find_layout(open_checkpoint(folder)), loader_of(model)
    place = list(loader.moe_places(layout).values())[-1]
    block = experts_of(loader.decoder_layers()[1][place])
    assert block is not None
    return copy.deepcopy(block)


def rows_for(block: nn.Module, counts: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [N, H] grouped by expert, and their offsets."""
    H = views(block).up.shape[2]
    rows = torch.randn(sum(counts), H, generator=torch.Generator().manual_seed(seed))
    return rows, torch.tensor([0, *counts]).cumsum(0)


def by_hand(block: Any, v: Views, rows: Tensor, e: int) -> Tensor:
    """[N, H]: one expert from its views, each product on its own; what is between them is the module's."""
    up = rows @ v.up[e].T + (0 if v.up_bias is None else v.up_bias[e])
    owner = block.experts if hasattr(block, "experts") else block
    if v.gate is None:
        inner = owner.act_fn(up)
    else:
        gate = rows @ v.gate[e].T + (0 if v.gate_bias is None else v.gate_bias[e])
        if hasattr(owner, "_apply_gate"):
            alternating = not getattr(owner, "is_concatenated", True)
            inner = owner._apply_gate(
                torch.stack([gate, up], -1).flatten(-2) if alternating else torch.cat([gate, up], -1)
            )
        else:
            act = next(getattr(o, n) for o in (owner, getattr(owner, "mlp", None))
                       for n in ("act_fn", "activation", "activation_fn") if hasattr(o, n))  # fmt: skip
            inner = act(gate) * up
    y = inner @ v.down[e].T + (0 if v.down_bias is None else v.down_bias[e])
    return block.post_expert_norm(y) if getattr(block, "has_post_expert_norm", False) else y  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_halves_views_and_one_expert(
    name: str, family_checkpoint: Callable[[str], Any], whole_model: Callable[[str], Any]
) -> None:
    block = block_of(whole_model(name), family_checkpoint(name))
    known, v = halves(block), views(block)
    assert known is not None
    E, width, H = v.up.shape
    assert v.down.shape == (E, H, width)
    counts = tuple((3 * e) % 5 for e in range(E))  # some without rows
    rows, offsets = rows_for(block, counts)
    inner = known.inner(block, rows, offsets)
    assert inner.shape == (len(rows), width)
    y = known(block, rows, offsets)
    assert torch.equal(known.outer(block, inner, offsets), y)
    assert known.linear != (name == "muse_spark")
    room = 64 * EPS * max(1.0, float(y.abs().max()))
    for e in range(E):
        a, b = offsets[e], offsets[e + 1]
        torch.testing.assert_close(by_hand(block, v, rows[a:b], e), y[a:b], rtol=0, atol=room)
        alone, own = one_expert(block, e), torch.tensor([0, int(b - a)])
        torch.testing.assert_close(known(alone, rows[a:b], own), y[a:b], rtol=0, atol=room)
        assert sum(p.numel() for p in alone.parameters()) == sum(
            x[e].numel() for x in vars(v).values() if x is not None
        )
    covered(block, v, known.parameters)

    # channel c of expert e gone from down is channel c gone from what goes into it
    e, c = max(range(E), key=counts.__getitem__), width // 2
    expert = torch.arange(E).repeat_interleave(offsets.diff())
    less = inner.clone()
    less[expert == e, c] = 0
    want = known.outer(block, less, offsets)
    v.down[e, :, c] = 0
    got = known.outer(block, inner, offsets)
    torch.testing.assert_close(got, want, rtol=0, atol=room)
    assert not torch.equal(got[expert == e], y[expert == e])
    assert torch.equal(got[expert != e], y[expert != e])


def covered(block: nn.Module, v: Views, names: Any) -> None:
    """Adding 1 to all views adds it to every number of the experts' parameters once."""
    before = [block.get_parameter(name).detach().clone() for name in names]
    extra = getattr(block, "zero_expert_num", 0) or 0  # rows of experts that have no weights
    for value in (x for x in vars(v).values() if x is not None):
        value.zero_()
    for x in (x for x in vars(v).values() if x is not None):
        x.add_(1)
    for name, old in zip(names, before, strict=True):
        value = block.get_parameter(name)
        n = len(value) - (extra if name == "gate_up_proj" else 0)
        assert bool((value[:n] == 1).all()), name
        assert torch.equal(value[n:], old[n:])
        value.copy_(old)


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "gpt_oss", "llama4_text", "dbrx", "jetmoe", "longcat_flash", "muse_spark"]
)
def test_one_expert_has_the_gradients_of_its_rows(
    name: str, family_checkpoint: Callable[[str], Any], whole_model: Callable[[str], Any]
) -> None:
    """A step along the gradient changes a weighed sum of the outputs by the gradient's square times the step."""
    block = block_of(whole_model(name), family_checkpoint(name))
    before = {key: value.detach().clone() for key, value in block.named_parameters()}
    known, alone = halves(block), one_expert(block, 1)
    assert known is not None
    rows, offsets = rows_for(block, (6,))
    given = rows.requires_grad_()
    weights = torch.randn(known(alone, given, offsets).shape, generator=torch.Generator().manual_seed(1))
    (known(alone, given, offsets) * weights).sum().backward()
    gradients = [(value, value.grad) for value in (given, *alone.parameters())]
    assert all(grad is not None and bool(grad.any()) for _, grad in gradients)
    slope = sum(float(grad.double().square().sum()) for _, grad in gradients)
    step, found = 1e-3 / slope**0.5, []
    with torch.no_grad():
        for way in (step, -2 * step):
            for value, grad in gradients:
                value.add_(way * grad)
            found.append(float((known(alone, given, offsets) * weights).double().sum()))
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(slope, rel=0.02)
    assert all(torch.equal(value, before[key]) for key, value in block.named_parameters())  # copies, not views
    assert not any(p.requires_grad for p in one_expert(block, 0, requires_grad=False).parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["qwen3_moe", "gpt_oss", "aria_text", "dbrx", "jetmoe", "llama4_text", "longcat_flash"]
)
def test_the_block_computes_with_what_is_written_into_views(
    name: str, family_checkpoint: Callable[[str], Any], whole_model: Callable[[str], Any]
) -> None:
    """An expert whose weights are another's makes the other's rows."""
    block = block_of(whole_model(name), family_checkpoint(name))
    known, v = halves(block), views(block)
    assert known is not None
    rows, offsets = rows_for(block, (0, 0, 8, *[0] * (len(v.up) - 3)))
    want = known(block, rows, offsets)
    for value in (x for x in vars(v).values() if x is not None):
        value[0].copy_(value[2])
    got = known(block, rows, torch.tensor([0, *[8] * len(v.up)]))
    assert torch.equal(got, want)


def test_blocks_of_other_kinds_have_none() -> None:
    assert halves(nn.Linear(2, 2)) is None
    with pytest.raises(ValueError, match="got Linear"):
        views(nn.Linear(2, 2))

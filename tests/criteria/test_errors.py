"""Standard errors, against the spread of scores over many drawn texts."""

from __future__ import annotations

import math

import pytest
import torch

from moekern.criteria import criterion_named, score_layer
from moekern.criteria.errors import standard_errors
from moekern.statistics.layer import LayerStatistics

E, T, TEXTS = 5, 400, 300
SHARES = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.0])  # of tokens that choose the expert


def _drawn(draw: torch.Generator) -> LayerStatistics:
    """Independent tokens, each of which chooses any number of experts; sums as a recorder has them."""
    s = LayerStatistics.zeros(E)
    chosen = torch.rand(T, E, generator=draw) < SHARES
    gate = torch.rand(T, E, generator=draw).double() * chosen
    norm = torch.rand(T, E, generator=draw).double().exp() * chosen * torch.arange(1, E + 1)
    s.tokens.fill_(T)
    s.count.copy_(chosen.sum(0))
    for name, values in {"gate": gate, "norm": norm, "gated_norm": gate * norm}.items():
        getattr(s, f"{name}_sum").copy_(values.sum(0))
        getattr(s, f"{name}_square_sum").copy_(values.square().sum(0))
    return s


@pytest.mark.parametrize("name", ["usage", "gate_mass", "ean", "gated_norm", "man", "reap", "hts(1,1,0)"])
def test_the_error_is_the_spread_over_texts(name: str) -> None:
    draw, criterion = torch.Generator().manual_seed(1), criterion_named(name)
    texts = [_drawn(draw) for _ in range(TEXTS)]
    scores = torch.stack([score_layer(criterion, s, "0") for s in texts])[:, :4]
    errors = torch.stack([e for s in texts if (e := standard_errors(criterion, s)) is not None])
    assert len(errors) == TEXTS
    # The spread of TEXTS draws is itself known to 1 / sqrt(2 TEXTS): four of these. A mean over n tokens, themselves
    # drawn, adds about 1 / n.
    found, want = errors[:, :4].square().mean(0).sqrt(), scores.std(0)
    assert ((found / want - 1).abs() < 4 / math.sqrt(2 * TEXTS) + 1 / (T * SHARES[:4])).all()


def test_of_one_token_a_mean_tells_nothing_and_a_sum_does() -> None:
    s = _drawn(torch.Generator().manual_seed(2))
    assert standard_errors(criterion_named("reap"), s)[4] == torch.inf  # type: ignore[index]
    assert standard_errors(criterion_named("gated_norm"), s)[4] == 0  # type: ignore[index]


@pytest.mark.parametrize("name", ["msan", "gated_square", "hts(0.5,1,1)", "hope", "ecc", "ews", "random", "rank(reap)"])
def test_where_no_second_moment_is_held_nothing_is_said(name: str) -> None:
    assert standard_errors(criterion_named(name), _drawn(torch.Generator().manual_seed(2))) is None

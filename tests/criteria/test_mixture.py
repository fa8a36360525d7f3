"""Distances from the mixture: routers whose gates do not sum to one number, layers of one expert a token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moekern.criteria import criterion_named, score_layer
from moekern.errors import InputError
from moekern.plan.make import make_plan
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import model_statistics
from tests.helpers.tokens import measured, tokens

KINDS = ("", "_sum", "_mean", "_rms")


def test_gates_that_sum_to_no_number_leave_the_magnitude() -> None:
    """Gates of the text's second half are half as large: then the others do not grow when one goes."""
    s = measured(tokens(0))
    s = replace(s, share_sum=0.75 * s.share_sum, share_square_sum=0.625 * s.share_square_sum)
    n = s.count.double()
    total, squares = s.gated_norm_sum, s.gated_norm_square_sum
    for kind, want in zip(KINDS, (squares, total, total / n, (squares / n).sqrt()), strict=True):
        for name in (f"rcs{kind}", f"rcs_loo{kind}"):
            assert torch.equal(score_layer(criterion_named(name), s, "0"), want)


def test_sums_of_gates_may_differ_by_rounding() -> None:
    s = measured(tokens(0))
    want = score_layer(criterion_named("rcs"), s, "0")
    rounded = replace(s, share_square_sum=s.share_square_sum * (1 + 2.0**-18))  # a spread of 2^-9: bfloat16's
    assert torch.equal(score_layer(criterion_named("rcs"), rounded, "0"), want)
    apart = replace(s, share_square_sum=s.share_square_sum * (1 + 2.0**-14))
    assert not torch.equal(score_layer(criterion_named("rcs"), apart, "0"), want)


def test_a_layer_of_one_expert_a_token_is_named() -> None:
    s = measured(tokens(0, K=1))
    with pytest.raises(InputError, match="layer 7: rcs_loo: a token chooses one expert here"):
        score_layer(criterion_named("rcs_loo"), s, "7")
    with pytest.raises(InputError, match="layer 7: rcs: a token chooses one expert here"):
        score_layer(criterion_named("rank(rcs, usage)"), s, "7")
    varied = replace(s, share_square_sum=2 * s.share_square_sum)  # a sigmoid: the gate of its one expert says something
    assert torch.equal(score_layer(criterion_named("rcs"), varied, "7"), s.gated_norm_square_sum)
    statistics = model_statistics()
    layers = {"0": statistics.layers["0"], "2": {d: _of_one(part) for d, part in statistics.layers["2"].items()}}
    with pytest.raises(InputError, match="layer 2: rcs: a token chooses one expert"):
        make_plan(replace(statistics, layers=layers), "rcs", 3)


def _of_one(s: LayerStatistics) -> LayerStatistics:
    alone = torch.diag(s.coactivation.diagonal())
    total = s.tokens.double()
    return replace(s, coactivation=alone, share_sum=total, share_square_sum=total)

"""Experts trained one at a time: what is gained stays, what is not is put back bit for bit."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.refit import Refine, Refined, refine_experts
from moekern.team import Team
from tests.helpers.refitting import Layer, layer_of

QUICK = Refine(batch=64)


@dataclass
class Case:
    layer: Layer
    target: Tensor  # [N, H] float64
    residual: Tensor
    held: Tensor

    def run(self, options: Refine = QUICK, **given: object) -> Refined:
        return refine_experts(self.layer, self.residual, self.held, options, name="3", **given)  # type: ignore[arg-type]

    def off(self) -> float:
        """How far the residual is from what the layer lacks."""
        return float((self.residual.double() - (self.target - self.layer.output())).abs().max())

    def weights(self) -> list[Tensor]:
        return [w.clone() for w in (self.layer.gate, self.layer.up, self.layer.downs)]

    def stays(self, before: Case) -> bool:
        pairs = zip([*self.weights(), self.residual], [*before.weights(), before.residual], strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def case(dtype: torch.dtype = torch.float32, tokens: int = 1200, noise: float = 0.0, hold: int = 5) -> Case:
    """A layer that is to put out what it did before all its weights were moved, and noise."""
    draw = torch.Generator().manual_seed(2)
    layer = layer_of(tokens, 4, 8, 12, dtype=dtype)
    target = layer.output()
    target += noise * torch.randn(target.shape, generator=draw, dtype=torch.float64)
    for weights in (layer.gate, layer.up, layer.downs):
        weights += 0.1 * torch.randn(weights.shape, generator=draw).to(dtype)
    held = torch.arange(tokens) % hold == 0 if hold else torch.zeros(tokens, dtype=torch.bool)
    return Case(layer, target, (target - layer.output()).float(), held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_come_nearer_to_what_the_layer_should_put_out(dtype: torch.dtype) -> None:
    given = case(dtype)
    before = given.weights()
    result = given.run()
    assert result.held[1] < 0.5 * result.held[0]
    assert result.fitted[1] < 0.5 * result.fitted[0]
    assert (result.improved, result.put_back, result.alone) == (8, 0, ())
    assert all((a != b).flatten(1).any(1).all() for a, b in zip(before, given.weights(), strict=True))
    assert given.off() < 1e-5  # a weight of bfloat16 is rounded by about 1e-3


def test_what_it_says_is_the_error_of_the_layer() -> None:
    given = case(torch.bfloat16)
    before = given.residual.double()
    result = given.run()
    lacks = given.target - given.layer.output()
    for rows, (first, last) in ((~given.held, result.fitted), (given.held, result.held)):
        assert first == pytest.approx(float(before[rows].square().sum()))
        assert last == pytest.approx(float(lacks[rows].square().sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_that_does_not_get_better_is_put_back(dtype: torch.dtype) -> None:
    given = case(dtype)
    before = copy.deepcopy(given)
    result = given.run(replace(QUICK, rate=30.0))
    assert given.stays(before)
    assert (result.improved, result.put_back) == (0, 8)
    assert result.held[0] == result.held[1]


@pytest.mark.parametrize("seed", range(4))
def test_held_back_rows_are_never_worse_off(seed: int) -> None:
    """With noise alone to learn, and few rows."""
    given = case(torch.bfloat16, tokens=60 + 10 * seed, noise=3.0)
    result = given.run(replace(QUICK, batch=8, rate=0.1, seed=seed))
    assert result.put_back
    assert float(given.residual[given.held].double().square().sum()) == pytest.approx(result.held[1])
    assert result.held[1] <= result.held[0]
    assert given.off() < 1e-5


def test_rounding_decides_too() -> None:
    """Steps that the type rounds away change nothing, so nothing is stored."""
    given = case(torch.bfloat16)
    before = copy.deepcopy(given)
    result = given.run(replace(QUICK, rate=1e-11, epochs=1))
    assert given.stays(before)
    assert result.improved == 0
    finer = case(torch.float32)
    assert finer.run(replace(QUICK, rate=1e-6, epochs=1)).improved == 8


def test_training_ends_when_held_back_rows_get_worse() -> None:
    quiet, noisy = case(), case(tokens=80, noise=3.0)
    options = Refine(batch=8, rate=0.1, epochs=9, sweeps=1)
    assert noisy.run(options).passes < 0.7 * quiet.run(options).passes


def test_the_best_epoch_is_taken() -> None:
    """At a rate that does not fall, the end of a run of fewer epochs: the last that made it better."""
    options, ends = Refine(batch=16, rate=0.003, last=1.0, sweeps=1), list[tuple[Case, float]]()
    for epochs in range(1, 9):
        given = case(tokens=200, noise=0.5)
        result = given.run(replace(options, epochs=epochs))
        ends.append((given, result.held[1]))
    worse = next(place for place in range(1, 8) if ends[place][0].stays(ends[place - 1][0]))
    assert ends[7][0].stays(ends[worse][0])
    assert ends[7][1] == min(error for _, error in ends)


def test_passes_are_those_of_the_rows() -> None:
    """An epoch is 7 thirds of a forward pass of the fitted rows and one of those held back; two more are for what an
    expert puts out before and after, one of those held back for what it does rounded."""
    given = case()
    routed = sum(len(given.layer.tokens(expert)) for expert in range(4))
    back = sum(int(given.held[given.layer.tokens(expert)].sum()) for expert in range(4))
    wanted = 2 * (3 * (7 / 3 * (routed - back) + back) + 2 * routed + back)
    assert given.run().passes == pytest.approx(wanted / routed)


def test_two_runs_give_the_same_bits(tmp_path: Path) -> None:
    found = [case() for _ in range(4)]
    found[0].run()
    found[1].run(memory=0, folder=tmp_path)
    found[2].run(replace(QUICK, seed=1))
    refine_experts(found[3].layer, found[3].residual, found[3].held, QUICK, name="4")
    assert found[1].stays(found[0])
    assert not found[2].stays(found[0])
    assert not found[3].stays(found[0])
    assert not list(tmp_path.iterdir())


def test_the_size_of_weights_changes_nothing() -> None:
    """Smaller weights on larger inputs are the same expert; rates are in proportion."""
    given, other = case(), case()
    other.layer.inputs_ = other.layer.inputs_ * 16
    for weights in (other.layer.gate, other.layer.up):
        weights /= 16
    a, b = given.run(), other.run()
    assert b.held == pytest.approx(a.held, rel=0.05)


def test_without_held_back_rows_those_that_are_fitted_decide() -> None:
    given = case(hold=0)
    result = given.run()
    assert result.fitted[1] < 0.5 * result.fitted[0]
    assert result.held == (0, 0)
    spoilt = case(hold=0)
    before = copy.deepcopy(spoilt)
    assert spoilt.run(replace(QUICK, rate=30.0)).put_back == 8
    assert spoilt.stays(before)


def test_experts_that_cannot_be_judged_are_left_alone() -> None:
    """One that no token chose, one that no held-back token chose, and one that only held-back tokens chose."""
    given = case()
    chosen = given.layer.chosen
    chosen[chosen == 0] = 3
    chosen[(chosen == 1) & given.held[:, None]] = 3
    chosen[(chosen == 2) & ~given.held[:, None]] = 3
    given.residual = (given.target - given.layer.output()).float()
    before = given.weights()
    result = given.run()
    assert result.alone == (0, 1, 2)
    changed = [(a != b).flatten(1).any(1).tolist() for a, b in zip(before, given.weights(), strict=True)]
    assert changed == [[False, False, False, True]] * 3


def test_a_layer_that_lacks_nothing_stays() -> None:
    given = case()
    given.residual.zero_()
    before = copy.deepcopy(given)
    result = given.run()
    assert given.stays(before)
    assert result.improved == 0


def test_numbers_that_leave_the_range_are_put_back() -> None:
    given = case(torch.float16)
    before = copy.deepcopy(given)
    result = given.run(replace(QUICK, rate=1e30))
    assert given.stays(before)
    assert result.improved == 0


def test_what_cannot_be_is_refused() -> None:
    given = case()
    team = Team()
    team.size = 2
    with pytest.raises(InputError, match="trained by one process"):
        given.run(team=team)
    given.residual[3, 0] = float("inf")
    with pytest.raises(InputError, match="holds NaN or infinities"):
        given.run()
    for wrong in ({"batch": 0}, {"epochs": 0}, {"sweeps": 0}, {"rate": 0.0}, {"rate": float("nan")}):
        with pytest.raises(InputError, match="--refine"):
            Refine(**wrong)  # type: ignore[arg-type]

"""Down projections fitted by ridge regression: what is solved, what decides, and what changes no bit."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.refit import Refit, Ridge, Unit, refit_down
from moekern.refit.ridge import solved
from moekern.refit.units import ROWS
from moekern.team import ALONE, Team
from tests.helpers.refitting import Layer, layer_of
from tests.helpers.thread_team import in_ranks
from tests.helpers.threads import using_threads

ONE = Ridge((0.3,))


def wanted(layer: Layer, noise: float = 0.0, seed: int = 1) -> Tensor:
    """What the layer should put out, float64 [N, H]: what it did with other down projections, and noise."""
    draw = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(layer)
    other.downs = layer.downs + 0.3 * torch.randn(layer.downs.shape, generator=draw).to(layer.downs)
    out = other.output()
    return out + noise * torch.randn(out.shape, generator=draw, dtype=torch.float64)


def every(step: int, tokens: int) -> Tensor:
    """Every so many-th token is held back; 0: none."""
    return torch.arange(tokens) % step == step - 1 if step else torch.zeros(tokens, dtype=torch.bool)


@dataclass
class Case:
    layer: Layer
    residual: Tensor
    held: Tensor

    def run(self, options: Ridge = ONE, **given: object) -> Refit:
        return refit_down(self.layer, self.residual, self.held, options, **given)  # type: ignore[arg-type]

    def features(self) -> list[Tensor]:
        """phi of each expert for all tokens, float64 [N, m], zeros for those that did not choose it."""
        layer, found = self.layer, []
        for expert in range(layer.count):
            full = torch.zeros(len(layer.inputs_), layer.width, dtype=torch.float64)
            tokens = layer.tokens(expert)
            full[tokens] = layer.features(expert, tokens).double()
            found.append(full)
        layer.asked.clear()
        return found

    def mean_diagonal(self) -> float:
        grams = [phi[~self.held].square().sum(0).mean() for phi in self.features()]
        return float(torch.stack(grams).mean())


def case(layer: Layer | None = None, noise: float = 0.1, hold: int = 0) -> Case:
    layer = layer_of() if layer is None else layer
    residual = (wanted(layer, noise) - layer.output()).float()
    return Case(layer, residual, every(hold, len(residual)))


def same(a: Case, b: Case) -> bool:
    return torch.equal(a.layer.downs, b.layer.downs) and torch.equal(a.residual, b.residual)


@pytest.mark.parametrize("hold", [0, 5])
def test_many_sweeps_give_the_joint_solution(hold: int) -> None:
    """All experts' weights at once: X (Phi'Phi + lambda I) = R'Phi over the rows that are not held back."""
    given = case(hold=hold)
    n, hidden, width = given.layer.downs.shape
    first, phi, fit = given.layer.downs.clone(), torch.cat(given.features(), 1), ~given.held
    weight = 0.3 * given.mean_diagonal()
    gram = phi[fit].T @ phi[fit] + weight * torch.eye(n * width, dtype=torch.float64)
    joint = torch.linalg.solve(gram, phi[fit].T @ given.residual[fit].double())
    result = given.run(replace(ONE, sweeps=60))
    assert result.weight == pytest.approx(weight, rel=1e-6)
    found = (given.layer.downs - first).double()
    torch.testing.assert_close(found, joint.T.view(hidden, n, width).transpose(0, 1), rtol=0, atol=1e-5)
    assert not result.kept_as_it_was


def test_a_sweep_takes_the_experts_in_their_order() -> None:
    """Two sweeps, written out in float64; the second one's penalty is on the distance from the first weights."""
    given = case(hold=7)
    features, fit, weight = given.features(), ~given.held, 0.3 * given.mean_diagonal()
    residual, change = given.residual.double(), torch.zeros(given.layer.downs.shape, dtype=torch.float64)
    first = given.layer.downs.clone()
    for _ in range(2):
        for e, phi in enumerate(features):
            gram = phi[fit].T @ phi[fit] + weight * torch.eye(phi.shape[1], dtype=torch.float64)
            step = torch.linalg.solve(gram, phi[fit].T @ residual[fit] - weight * change[e].T).T
            change[e] += step
            residual -= phi @ step.T
    result = given.run(replace(ONE, sweeps=2))
    torch.testing.assert_close((given.layer.downs - first).double(), change, rtol=0, atol=1e-5)
    torch.testing.assert_close(given.residual.double(), residual, rtol=0, atol=1e-5)
    assert result.fitted.after == pytest.approx(float(residual[fit].square().sum()), rel=1e-5)
    assert result.held.after == pytest.approx(float(residual[~fit].square().sum()), rel=1e-5)
    assert (result.fitted.rows, result.held.rows) == (258, 42)


@pytest.mark.parametrize("hold", [0, 5])
def test_a_layer_that_lacks_nothing_stays(hold: int) -> None:
    given = case(hold=hold)
    given.residual.zero_()
    before = copy.deepcopy(given)
    assert given.run(Ridge()).kept_as_it_was
    assert same(given, before)


def test_what_rounding_lacks_moves_weights_by_no_more(tmp_path: Path) -> None:
    given = case()
    given.residual = 1e-7 * torch.randn(given.residual.shape, generator=torch.Generator().manual_seed(0))
    before = given.layer.downs.clone()
    given.run()
    assert (given.layer.downs - before).abs().max() < 1e-6


def test_the_factor_with_the_least_error_on_held_back_rows_goes_on() -> None:
    """Noise and few rows want a strong pull; a clean target wants a weak one."""
    chosen = []
    for tokens, noise in ((60, 2.0), (600, 0.0)):
        given = case(layer_of(tokens), noise, hold=4)
        singles = {f: copy.deepcopy(given).run(Ridge((f,), 1)).held for f in (0.03, 0.3, 30.0)}
        result = given.run(Ridge((0.03, 0.3, 30.0)))
        for factor, error in result.raced:
            if singles[factor].after < singles[factor].before:  # else it was put back
                assert error == singles[factor].after
        assert result.ridge == min(result.raced, key=lambda pair: pair[1])[0]
        chosen.append(result.ridge)
    assert chosen == [30.0, 0.03]


def test_the_winner_goes_on_as_if_it_had_been_alone() -> None:
    given = case(layer_of(dtype=torch.bfloat16), hold=5)
    alone = copy.deepcopy(given)
    result = given.run(Ridge((0.03, 0.3, 30.0)))
    single = alone.run(Ridge((result.ridge,)))
    assert same(given, alone)
    assert (result.held, result.fitted, result.weight) == (single.held, single.fitted, single.weight)


def test_without_held_back_rows_the_middle_factor_is_taken() -> None:
    result = case().run(Ridge((1.0, 0.1, 0.3)))
    assert (result.ridge, result.raced, result.held.rows) == (0.3, (), 0)


def test_weights_that_do_not_help_held_back_rows_are_put_back() -> None:
    given = case(layer_of(80, dtype=torch.bfloat16), hold=4)
    given.residual = torch.randn(given.residual.shape, generator=torch.Generator().manual_seed(5))
    before = copy.deepcopy(given)
    result = given.run(Ridge((0.01, 0.02)))
    assert result.kept_as_it_was
    assert same(given, before)
    assert result.held.after == result.held.before
    assert "the squared error on held-back rows went from" in result.notes[-1]


@pytest.mark.parametrize("seed", range(6))
def test_held_back_rows_are_never_worse_off(seed: int) -> None:
    given = case(layer_of(90, seed=seed, dtype=torch.bfloat16), noise=1.0 + seed % 2, hold=4)
    before = float(given.residual[given.held].double().square().sum())
    result = given.run(Ridge((0.1, 0.3)))
    after = float(given.residual[given.held].double().square().sum())
    assert after < before or result.kept_as_it_was
    assert (result.held.before, result.held.after) == (pytest.approx(before), pytest.approx(after))


def test_the_residual_is_that_of_the_rounded_weights() -> None:
    given = case(layer_of(dtype=torch.bfloat16), hold=5)
    target = given.residual.double() + given.layer.output()
    assert not given.run().kept_as_it_was
    error = (given.residual.double() - (target - given.layer.output())).abs().max()
    assert error < 1e-5  # a weight is rounded by about 1e-3


def pieces(tokens: int) -> list[Unit]:
    ends = [0, tokens // 5, tokens // 5, tokens // 2, tokens]  # one of them is empty
    return [Unit(number, start, stop) for number, (start, stop) in enumerate(zip(ends, ends[1:], strict=False))]


def large() -> Case:
    """More rows of an expert than are multiplied together."""
    return case(layer_of(5 * ROWS, 3, 5, 7, dtype=torch.bfloat16), hold=9)


def test_memory_changes_no_bit(tmp_path: Path) -> None:
    given, found = large(), []
    for memory in (None, 0, 500_000, 560_000):
        copied = copy.deepcopy(given)
        result = copied.run(Ridge(), units=pieces(5 * ROWS), memory=memory, folder=tmp_path)
        found.append((copied, result))
    assert found[0][1].passes == 1
    assert found[1][1].passes > 5
    assert 1 < found[3][1].passes < found[1][1].passes
    for copied, result in found[1:]:
        assert same(copied, found[0][0])
        assert replace(result, passes=1.0) == found[0][1]
    assert not list(tmp_path.iterdir())


def test_threads_change_no_bit() -> None:
    """Widths of which no number of threads has whole vectors, a few rows, a matrix that several would factor.

    The features are in float64, which threads round alike once they are float32.
    """
    for tokens, width, hidden in ((700, 21, 36), (150, 64, 16)):
        given, found = case(layer_of(tokens, 2, width, hidden), hold=9), []
        given.layer = replace(given.layer, inputs_=given.layer.inputs_.double())
        for threads in (1, 2, 3, 4):
            copied = copy.deepcopy(given)
            with using_threads(threads):
                copied.run(Ridge())
            found.append(copied)
        assert all(same(found[0], other) for other in found[1:])


def test_a_matrix_is_factored_alike_by_any_number_of_threads() -> None:
    rows = torch.randn(600, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = torch.randn(16, 512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for threads in (1, 2, 4):
        with using_threads(threads):
            found.append(solved(rows.T @ rows, moment, torch.zeros_like(moment), 0.1)[0])
    assert all(each is not None and torch.equal(each, found[0]) for each in found)  # type: ignore[arg-type]


def test_features_are_asked_for_by_chunks_of_one_unit_and_one_kind() -> None:
    given = large()
    given.run(units=pieces(5 * ROWS))
    assert max(rows for _, rows in given.layer.asked) == ROWS
    assert sum(rows for _, rows in given.layer.asked) == 2 * 5 * ROWS


def share(given: Case, units: list[Unit], numbers: list[int]) -> tuple[Case, list[Unit], Tensor]:
    """What a process has that was given some units: its tokens, units and their rows in the whole."""
    own, at = [], 0
    rows = [torch.arange(units[number].start, units[number].stop) for number in numbers]
    for number, part in zip(numbers, rows, strict=True):
        own.append(Unit(number, at, at + len(part)))
        at += len(part)
    among = torch.cat([torch.zeros(0, dtype=torch.int64), *rows])
    whole = given.layer
    layer = replace(
        copy.deepcopy(whole), inputs_=whole.inputs_[among], chosen=whole.chosen[among], gates=whole.gates[among]
    )
    return Case(layer, given.residual[among], given.held[among]), own, among


@pytest.mark.parametrize("owners", [[0, 1, 0, 1], [2, 0, 1, 0], [1, 1, 1, 1]], ids=str)
def test_processes_change_no_bit(owners: list[int]) -> None:
    """Units in turn, in another order, and all with another rank than 0, which has no tokens."""
    given, units = large(), pieces(5 * ROWS)
    size = max(owners) + 1
    alone = copy.deepcopy(given)
    result = alone.run(Ridge(), units=units)

    def rank(team: Team) -> tuple[Case, Tensor, Refit]:
        mine, own, rows = share(given, units, [number for number, owner in enumerate(owners) if owner == team.rank])
        return mine, rows, mine.run(Ridge(), units=own, team=team, memory=(None, 0, None)[team.rank])

    for mine, rows, found in in_ranks(size, rank):
        assert torch.equal(mine.layer.downs, alone.layer.downs)
        assert torch.equal(mine.residual, alone.residual[rows])
        assert replace(found, passes=1.0) == result


def test_units_decide_the_bits() -> None:
    """Else the test above would say nothing."""
    given, other = large(), large()
    given.run(units=pieces(5 * ROWS))
    other.run()
    assert not same(given, other)
    torch.testing.assert_close(given.residual, other.residual, rtol=0, atol=0.05)


def test_experts_without_rows_are_left_alone() -> None:
    """One that no token chose, one that only held-back tokens chose, and one whose activations are all zero."""
    given = case(layer_of(400, 6), hold=4)
    chosen = given.layer.chosen
    chosen[chosen == 1] = 0
    chosen[(chosen == 2) & ~given.held[:, None]] = 0
    given.layer.up[3] = 0
    assert len(given.layer.tokens(2))
    before = given.layer.downs.clone()
    result = given.run()
    assert result.alone == (1, 2, 3)
    changed = (given.layer.downs != before).flatten(1).any(1).tolist()
    assert changed == [True, False, False, False, True, True]
    assert result.notes == ()


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-25, 1e-10])
def test_no_activation_is_too_small(size: float) -> None:
    given = case(hold=5)
    given.layer.up *= size
    result = given.run()
    assert torch.isfinite(given.layer.downs).all()
    assert torch.isfinite(given.residual).all()
    assert result.held.after <= result.held.before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25], ids=str)
def test_an_expert_that_is_not_finite_is_left_alone_and_named(bad: float) -> None:
    given = case(layer_of(400), hold=5)
    token = int(given.layer.tokens(1)[~given.held[given.layer.tokens(1)]][0])
    given.layer.gates[token, given.layer.chosen[token] == 1] = bad
    before = given.layer.downs.clone()
    result = given.run()
    assert 1 in result.alone
    assert any(note.startswith("expert 1: its ") for note in result.notes)
    assert torch.equal(given.layer.downs[1], before[1])
    assert torch.isfinite(given.layer.downs).all()


def test_weights_that_the_type_cannot_hold_are_not_stored() -> None:
    given = case(layer_of(300, 4, dtype=torch.float16), hold=5)
    given.residual *= 1e7
    before = given.layer.downs.clone()
    result = given.run()
    assert torch.equal(given.layer.downs, before)
    assert [note for note in result.notes if "expert 2: refitted weights leave the range of the model's type" in note]


def test_a_residual_that_is_not_finite_is_refused() -> None:
    given = case(hold=5)
    given.residual[7, 3] = float("nan")
    before = given.layer.downs.clone()
    with pytest.raises(InputError, match="holds NaN or infinities"):
        given.run()
    assert torch.equal(given.layer.downs, before)


def test_a_gram_that_rounding_has_spoilt_is_solved_where_it_can_be() -> None:
    draw = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q
    values = torch.tensor([-1e-9, 1e-9, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    gram, moment = (vectors * values) @ vectors.T, torch.randn(5, 6, generator=draw, dtype=torch.float64)
    step, exact = solved(gram, moment, torch.zeros_like(moment), 0.0)
    assert step is not None
    assert not exact
    torch.testing.assert_close(step, moment @ (vectors[:, 2:] / values[2:]) @ vectors[:, 2:].T)
    step, exact = solved(gram, moment, moment, 1.0)
    torch.testing.assert_close(step, torch.zeros_like(moment))
    assert exact


def test_what_cannot_be_is_refused() -> None:
    for options in ({"factors": ()}, {"factors": (0.0,)}, {"factors": (float("nan"),)}, {"sweeps": 0}):
        with pytest.raises(InputError):
            Ridge(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Ridge([0.1])  # type: ignore[arg-type]
    given = case()
    for units in ([Unit(0, 0, 100)], [Unit(0, 0, 200), Unit(1, 100, 300)], [Unit(1, 0, 100), Unit(0, 100, 300)]):
        with pytest.raises(InputError, match="units: expected ranges"):
            given.run(units=units)
    with pytest.raises(ValueError, match=r"\[refit\] residual: expected float32 \[N, 10\]"):
        refit_down(given.layer, given.residual.double(), given.held)
    with pytest.raises(ValueError, match=r"\[refit\] held: expected bool \[300\]"):
        refit_down(given.layer, given.residual, given.held[1:])
    with pytest.raises(InputError, match="two processes have one of the same number"):
        in_ranks(2, lambda team: given.run(units=None, team=team))
    assert given.run(team=ALONE).notes == ()

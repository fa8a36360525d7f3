"""The loss against its formula, token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekern.recovery.objective import ROWS, Objective, divergence
from moekern.recovery.teacher import Predicted

V = 24


def logits(rows: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def literal(p: Tensor, q: Tensor, top: int | None) -> Tensor:
    """KL of float64 logits [n, V], over the `top` likeliest of p and the others as one; with autograd, by entries."""
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs in zip(p.double().softmax(-1), q.double().softmax(-1), strict=True):
        inside = sorted(range(V), key=lambda v: -float(mine[v]))[: top or V]
        for v in inside:
            total = total + mine[v] * (mine[v] / theirs[v]).log()
        outside = [v for v in range(V) if v not in inside]
        if outside:
            r, s = (sum((each[v] for v in outside), torch.zeros(())) for each in (mine, theirs))
            total = total + r * (r / s).log()
    return total


@pytest.mark.parametrize("top", [None, 1, 5, V - 1, V])
def test_divergence_and_its_gradient(top: int | None) -> None:
    p, q = logits(6, 0), logits(6, 1).requires_grad_()
    found = divergence(q.log_softmax(-1), Predicted.of(p, top))
    (gradient,) = torch.autograd.grad(found, q)
    twin = q.detach().double().requires_grad_()
    want = literal(p, twin, top)
    (by_formula,) = torch.autograd.grad(want, twin)
    assert float(found.detach()) == pytest.approx(float(want.detach()), rel=1e-4)
    torch.testing.assert_close(gradient.double(), by_formula, rtol=1e-3, atol=1e-5)


def test_tokens_together_are_never_more_than_the_vocabulary() -> None:
    p, q = logits(40, 2, 4.0), logits(40, 3, 4.0).log_softmax(-1)
    found = [float(divergence(q, Predicted.of(p, top))) for top in (1, 2, 4, 8, 16, V, None)]
    assert all(a <= b + 1e-4 * b for a, b in zip(found, found[1:], strict=False))
    assert 0 < found[0] < 0.9 * found[-1]
    assert found[-2] == pytest.approx(found[-1], rel=1e-5)


@pytest.mark.parametrize("top", [None, 1, 5])
def test_the_divergence_from_itself_is_nothing(top: int | None) -> None:
    p = logits(8, 4)
    assert float(divergence(p.log_softmax(-1), Predicted.of(p, top))) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("top", [None, 3])
def test_what_is_masked_in_both_counts_nothing(top: int | None) -> None:
    """Entries of the vocabulary that both models rule out; with 3 likeliest of which one is ruled out."""
    p, q = logits(4, 5), logits(4, 6)
    p[:, 2:] = q[:, 2:] = -torch.inf
    q = q.requires_grad_()
    found = divergence(q.log_softmax(-1), Predicted.of(p, top))
    (gradient,) = torch.autograd.grad(found, q)
    want = literal(p[:, :2].repeat(1, V // 2), q[:, :2].repeat(1, V // 2), None)  # the same two, again and again
    assert float(found.detach()) == pytest.approx(float(want.detach()), rel=1e-4)
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


def test_certainty_stays_finite() -> None:
    """All probability on one token, in float16 as a file holds it, in the teacher's, and then in the student's."""
    sure, other = torch.full((2, V), -60.0), logits(2, 7)
    sure[:, 3] = 60.0
    for p, q in ((sure, other), (other, sure), (sure, sure)):
        teacher = Predicted.of(p, 4)
        leaf = q.clone().requires_grad_()
        found = divergence(leaf.log_softmax(-1), Predicted(teacher.ids, teacher.logp.half().float()))
        (gradient,) = torch.autograd.grad(found, leaf)
        assert math.isfinite(float(found.detach()))
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 1, 2 * ROWS + 7])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_rows_add_up_over_chunks(rows: int, weights: tuple[float, float]) -> None:
    p, q = logits(rows, 8), logits(rows, 9).requires_grad_()
    ids = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(0))
    kl, following = weights
    teacher = Predicted.of(p, 5)
    total, sums = Objective(kl, following)(q, ids, teacher)
    (gradient,) = torch.autograd.grad(total, q)
    logq = q.log_softmax(-1)
    own = divergence(logq, teacher)
    nll = -logq.gather(1, ids[:, None]).sum()
    (want,) = torch.autograd.grad(kl * own + following * nll, q)
    assert float(total.detach()) == pytest.approx(float((kl * own + following * nll).detach()), rel=1e-5)
    torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-6)
    same = int((p.argmax(1) == q.argmax(1)).sum())
    assert sums.tolist() == pytest.approx([float(nll.detach()), float(own.detach()), same, rows], rel=1e-5)
    with torch.no_grad():
        again, found = Objective(kl, following)(q, ids, teacher)
    assert (float(again), found.tolist()) == (float(total.detach()), sums.tolist())


def test_without_a_teacher_the_divergence_is_nothing() -> None:
    q, ids = logits(3, 10), torch.tensor([1, 2, 3])
    total, sums = Objective(0.0, 1.0)(q, ids, None)
    assert float(total.detach()) == pytest.approx(float(torch.nn.functional.cross_entropy(q, ids, reduction="sum")))
    assert sums.tolist()[1:] == [0, 0, 3]

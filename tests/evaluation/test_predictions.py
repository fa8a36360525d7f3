"""Figures of predicted tokens against a literal computation on whole logits, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.evaluation import predictions
from moekern.evaluation.buckets import AXES, FIGURES, bucket_rows, bucket_sums
from moekern.evaluation.losses import means
from moekern.evaluation.predictions import ENTROPY, SHARED, compared, summed, token_figures

B, S, V = 3, 37, 50


def logits(seed: int, spread: float = 3.0) -> Tensor:
    """Some tokens are near certain, some open; two entries are masked, as heads do."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(B, S, V, generator=generator) * spread * torch.rand(B, S, 1, generator=generator)
    found[..., 7] = found[..., 9] = -torch.inf
    return found


def wanted() -> Tensor:
    return torch.randint(10, V, (B, S), generator=torch.Generator().manual_seed(5))


def literal(q_logits: Tensor, p_logits: Tensor, ids: Tensor) -> list[list[list[float]]]:
    found = []
    for b in range(B):
        rows = []
        for s in range(S):
            p, q = (each[b, s].double().softmax(-1).tolist() for each in (p_logits, q_logits))
            rows.append([
                -math.log(q[int(ids[b, s])]),
                sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x),
                float(p.index(max(p)) == q.index(max(q))),
                1 - sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
                -sum(x * math.log(x) for x in p if x),
            ])  # fmt: skip
        found.append(rows)
    return found


def test_each_token_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, p, ids = logits(0), logits(1), wanted()
    want = torch.tensor(literal(q, p, ids), dtype=torch.float64)
    whole = token_figures(q, p, ids)
    torch.testing.assert_close(whole, want, rtol=1e-4, atol=2e-6)  # float32 within a token
    held, plain = list[int](), Tensor.log_softmax
    monkeypatch.setattr(predictions, "CHUNK", 4 * V)
    monkeypatch.setattr(Tensor, "log_softmax", lambda x, dim: held.append(x.numel()) or plain(x, dim))
    assert torch.equal(token_figures(q, p, ids), whole)
    assert max(held) == 4 * V


def test_the_original_is_itself() -> None:
    p, ids = logits(1), wanted()
    found = token_figures(p, p, ids)
    assert found[..., 1].abs().max() == 0
    assert bool((found[..., 2:ENTROPY] == 1).all())
    torch.testing.assert_close(found, token_figures(p, p.clone(), ids), rtol=1e-6, atol=1e-6)


def test_what_both_give_alike_is_no_more_than_all() -> None:
    """Rounded sums of float32 come to more than 1 for some tokens."""
    of = torch.randn(2, 64, 999, generator=torch.Generator().manual_seed(0))
    assert float(of.log_softmax(-1).exp().sum(-1).max()) > 1
    assert float(token_figures(of, of.clone(), torch.zeros(2, 64, dtype=torch.int64))[..., SHARED].max()) == 1


def test_a_token_that_the_head_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="predicts 50 classes, and the text has token 50"):
        compared(logits(0), logits(1), wanted() * 0 + V)


def test_sums_become_bits_of_bytes_and_what_both_give_alike() -> None:
    q, p, ids = logits(0), logits(1), wanted()
    sizes = ids % 5
    loss = means(["x"], [("x", "d", summed(token_figures(q, p, ids), sizes))])["x"]["d"]
    rows = [row for each in literal(q, p, ids) for row in each]
    assert loss.one_minus_tv == pytest.approx(sum(row[SHARED] for row in rows) / len(rows), rel=1e-5)
    bits = sum(row[0] for row in rows) / math.log(2)
    assert loss.bits_per_byte == pytest.approx(bits / int(sizes.sum()), rel=1e-5)
    by_sequence = [sum(row[0] for row in each) / math.log(2) for each in literal(q, p, ids)]
    left = [b - loss.bits_per_byte * int(n.sum()) for b, n in zip(by_sequence, sizes, strict=True)]
    want = math.sqrt(sum(x * x for x in left) * B / (B - 1)) / int(sizes.sum())
    assert loss.bits_per_byte_error == pytest.approx(want, rel=1e-3)
    without = means(["x"], [("x", "d", compared(q, p, ids))])["x"]["d"]
    assert (without.bits_per_byte, without.nll) == (None, loss.nll)


@pytest.mark.parametrize("axis", AXES)
def test_buckets_hold_every_token_once_with_errors_by_sequence(axis: str) -> None:
    """Against losses of the tokens of each bucket alone."""
    figures = token_figures(logits(0), logits(1), wanted())
    place = torch.arange(1.0, S + 1).expand(B, S) if axis == "position" else figures[..., ENTROPY]
    halves = [bucket_sums(part)[axis] for part in (figures[:1], figures[1:])]
    rows = bucket_rows(axis, halves[0] + halves[1])
    assert sum(row["tokens"] for row in rows) == B * S
    for row in rows:
        last = math.inf if row["to"] is None else row["to"] + (axis == "position")
        inside = (place >= row["from"]) & (place < last)
        parts = []
        for b in range(B):
            own = figures[b][inside[b]]
            if len(own):
                parts.append(
                    torch.cat([own.sum(0)[:SHARED], torch.tensor([len(own)]), own.sum(0)[SHARED : SHARED + 1]])
                )
        want = means(["x"], [("x", "d", torch.stack(parts).double())])["x"]["d"]
        assert (row["tokens"], row["sequences"]) == (want.tokens, want.sequences)
        for name in FIGURES:
            assert row[name] == pytest.approx(getattr(want, name))
            error = getattr(want, f"{name}_error")
            assert row[f"{name}_error"] == (error if error is None else pytest.approx(error, rel=1e-6, abs=1e-7))

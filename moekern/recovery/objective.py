"""What training makes smaller: KL to the original, and cross-entropy of the next token.

KL(original || model) over the original's likeliest tokens and all others as one: with the tokens in S, p the
original's probabilities and q the model's, sum over S of p log(p / q), plus r log(r / s) of the rests r = 1 - sum p
and s = 1 - sum q. It is the KL over the vocabulary where S is that, and never more. Temperature 1 (arXiv:2603.02217);
at another one, T, it is over S alone, with p^(1/T) and q^(1/T) divided by their sums over S, and not times T^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moekern.recovery.teacher import Predicted

ROWS = 512  # predicted tokens whose probabilities over the vocabulary are in memory together
LEAST = 1e-6  # of the rests of probability


@dataclass(frozen=True)
class Objective:
    """Weights of the two parts."""

    kl: float = 1.0
    next: float = 0.0
    temperature: float = 1.0  # of the loss; the KL that is told is that of 1

    def __call__(self, logits: Tensor, ids: Tensor, teacher: Predicted | None) -> tuple[Tensor, Tensor]:
        """logits [n, V] of the tokens whose successors are `ids` [n]. The loss, summed over them, for autograd; and
        float64 sums without it: cross-entropy, KL, tokens whose likeliest is the original's, tokens. Without a teacher
        KL is 0.

        Memory: the gradient of the logits, and ROWS times V numbers.
        """
        total, sums = logits.new_zeros((), dtype=torch.float32), torch.zeros(4, dtype=torch.float64)
        for start in range(0, len(ids), ROWS):
            part = slice(start, start + ROWS)
            own = None if teacher is None else teacher.rows(part).moved(logits.device)
            if torch.is_grad_enabled():
                loss, found = checkpoint(self._rows, logits[part], ids[part], own, use_reentrant=False)
            else:
                loss, found = self._rows(logits[part], ids[part], own)
            total, sums = total + loss, sums + found.cpu()
        return total, sums

    def _rows(self, logits: Tensor, ids: Tensor, teacher: Predicted | None) -> tuple[Tensor, Tensor]:
        logq = logits.float().log_softmax(-1)
        nll = F.nll_loss(logq, ids, reduction="sum")
        kl = logq.new_zeros(()) if teacher is None else divergence(logq, teacher)
        pulled = kl
        if teacher is not None and self.temperature != 1:
            pulled = softened(logq, teacher, self.temperature)
        loss = self.kl * pulled + self.next * nll if self.next else self.kl * pulled
        same = 0.0 if teacher is None else float((logq.detach().argmax(1) == teacher.likeliest).sum())
        found = torch.tensor([float(nll.detach()), float(kl.detach()), same, len(ids)], dtype=torch.float64)
        return loss, found


def divergence(logq: Tensor, teacher: Predicted) -> Tensor:
    """KL(teacher || q) summed over rows; logq [n, V]."""
    logp = teacher.logp
    if teacher.ids is None:
        return F.kl_div(logq, logp, reduction="none", log_target=True).masked_fill(logp == -torch.inf, 0).sum()
    mine, p = logq.gather(1, teacher.ids), logp.exp()
    inside = (p * (logp - mine)).masked_fill(p == 0, 0).sum()
    rest, other = ((1 - each.sum(1)).clamp(min=LEAST) for each in (p, mine.exp()))
    return inside + (rest * (rest.log() - other.log())).sum()


def softened(logq: Tensor, teacher: Predicted, temperature: float) -> Tensor:
    """KL(teacher || q) at a temperature, over the teacher's tokens alone, summed over rows; logq [n, V]."""
    mine = logq if teacher.ids is None else logq.gather(1, teacher.ids)
    p, q = ((each / temperature).log_softmax(1) for each in (teacher.logp, mine))
    return F.kl_div(q, p, reduction="none", log_target=True).masked_fill(p == -torch.inf, 0).sum()

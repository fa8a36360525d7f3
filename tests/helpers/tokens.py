"""A layer of random tokens with everything kept, and its sums of every tier but gradients, in the plainest way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moekern.statistics.layer import LayerStatistics

V = 50  # token ids


@dataclass(frozen=True)
class Tokens:
    """T tokens of a softmax router whose chosen gates are made to sum to 1."""

    logits: Tensor  # [T, E]
    y: Tensor  # [T, E, H] of all experts
    residual: Tensor  # [T, H]
    token_ids: Tensor  # [T]
    weights: Tensor  # [E, M, N] one matrix an expert
    router: Tensor  # [E, H]
    K: int

    @property
    def E(self) -> int:
        return self.logits.shape[1]

    def gates(self, t: int, without: tuple[int, ...] = ()) -> Tensor:
        """[E], 0 where not chosen, when the experts `without` are not there."""
        logits = self.logits[t].clone()
        logits[list(without)] = -torch.inf
        score, ids = logits.softmax(0).topk(self.K)
        return torch.zeros(self.E, dtype=torch.float64).index_add_(0, ids, score / score.sum())

    def left_out(self, t: int, e: int) -> Tensor:
        """[H], what the output loses when e goes and the others make up for its gate, nobody coming in."""
        gates = self.gates(t)
        gates[e] = 0
        return self.output(t) - gates / gates.sum() @ self.y[t]

    def output(self, t: int, without: tuple[int, ...] = ()) -> Tensor:
        """[H], the layer's."""
        return self.gates(t, without) @ self.y[t]

    def chosen(self, t: int) -> list[int]:
        return self.gates(t).nonzero()[:, 0].tolist()

    def routed(self, e: int) -> list[int]:
        """The tokens that chose e."""
        return [t for t in range(len(self.logits)) if e in self.chosen(t)]


def tokens(seed: int, T: int = 60, E: int = 6, K: int = 2, H: int = 5) -> Tokens:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    loud = torch.linspace(0.5, 2, E)[:, None]
    ids = torch.randint(V, (T,), generator=draw)
    return Tokens(1.5 * normal(T, E), loud * (normal(T, E, H) + normal(E, H)), normal(T, H), ids, normal(E, 4, 7),
                  normal(E, H), K)  # fmt: skip


def measured(raw: Tokens) -> LayerStatistics:
    """Sums of all tiers but gradients."""
    T, E, H = raw.y.shape
    s = LayerStatistics.zeros(
        E,
        H,
        tiers=("vocabulary", "token_counts", "coalitions", "outliers", "reap", "mixture", "gram", "replay", "weights"),
        words=1,
    )
    sets: Counter[tuple[int, ...]] = Counter()
    everything = {e: torch.stack([raw.y[t, e] for t in raw.routed(e)]) for e in range(E) if raw.routed(e)}
    for e, rows in everything.items():
        s.outlier_sum[e] = ((rows - rows.mean()).abs() > 3 * rows.std(correction=0)).sum()
    for t in range(T):
        gate, ids = raw.gates(t), raw.chosen(t)
        norm, a = raw.y[t].norm(dim=1), raw.gates(t) * raw.y[t].norm(dim=1)
        h = raw.residual[t]
        turn = 1 - torch.cosine_similarity(h, h + raw.output(t), dim=0)
        s.tokens.add_(1)
        s.logit_tokens.add_(1)
        s.residual_tokens.add_(1)
        s.logit_gram.add_(raw.logits[t, :, None] * raw.logits[t])
        sets[tuple(ids)] += 1
        for e in ids:
            s.count[e] += 1
            s.gate_sum[e] += gate[e]
            s.gate_square_sum[e] += gate[e] ** 2
            s.norm_sum[e] += norm[e]
            s.norm_square_sum[e] += norm[e] ** 2
            s.gated_norm_sum[e] += a[e]
            s.gated_norm_square_sum[e] += a[e] ** 2
            s.residual_sum[e] += a[e] * turn.clamp(min=0)
            s.square_sum[e] += raw.y[t, e] ** 2
            s.value_sum[e] += raw.y[t, e]
            s.unit_sum[e] += raw.y[t, e] / norm[e]
            s.vocabulary[e] |= 1 << int(raw.token_ids[t])
            s.token_count[e, raw.token_ids[t]] += 1
            s.renormalised_norm_sum[e] += gate[e] / gate.sum() * norm[e]
            for other in ids:
                s.coactivation[e, other] += 1
                s.pair_sum[e, other] += a[e] * a[other]
        for e in raw.logits[t].topk(raw.K).indices.tolist():
            s.compat_count[e] += 1
            s.compat_gated_norm_sum[e] += raw.logits[t].softmax(0)[e] * norm[e]
        add_mixture(s, raw, t)
        add_replay(s, raw, t)
    rows = [[*ids, n] for ids, n in sorted(sets.items())]
    flat = raw.weights.flatten(1)
    singular = torch.linalg.svdvals(raw.weights)
    return replace(
        s,
        coalitions=torch.tensor(rows),
        weight_count=torch.full((E,), flat.shape[1]),
        weight_abs_sum=flat.abs().sum(1),
        weight_square_sum=flat.square().sum(1),
        weight_stable_rank=singular.square().sum(1) / singular[:, 0] ** 2,
        weight_gram=flat @ flat.T,
        router_gram=raw.router @ raw.router.T,
    )


def add_mixture(s: LayerStatistics, raw: Tokens, t: int) -> None:
    """RAZOR's quantities as the paper prints them, of gates that sum to 1."""
    w, c = raw.gates(t), raw.output(t)
    s.share_sum.add_(w.sum())
    s.share_square_sum.add_(w.sum() ** 2)
    for e in raw.chosen(t):
        apart = w[e] * (raw.y[t, e] - c).norm()
        s.mixture_norm_sum[e] += apart
        s.mixture_square_sum[e] += apart**2
        s.left_out_norm_sum[e] += apart / (1 - w[e])
        s.left_out_square_sum[e] += (apart / (1 - w[e])) ** 2
        for other in raw.chosen(t):
            s.contribution_gram[e, other] += (w[e] * raw.y[t, e]) @ (w[other] * raw.y[t, other])


def add_replay(s: LayerStatistics, raw: Tokens, t: int) -> None:
    whole = raw.output(t)
    lost = torch.stack([whole - raw.output(t, (e,)) for e in range(raw.E)])
    unit = raw.y[t] / raw.y[t].norm(dim=1, keepdim=True)
    s.replay_tokens.add_(1)
    s.output_sum.add_(raw.y[t])
    s.scored_output_sum.add_(raw.logits[t].softmax(0)[:, None] * raw.y[t])
    s.output_gram.add_(raw.y[t] @ raw.y[t].T)
    s.output_cosine.add_(unit @ unit.T)
    s.deletion_norm_sum.add_(lost.norm(dim=1))
    s.deletion_gram.add_(lost @ lost.T)
    s.deletion_sum.add_(lost)
    s.deletion_count[raw.chosen(t)] += 1
    s.refill_square_sum.add_(lost.square().sum(1))
    for kept in range(1 << raw.E):
        without = tuple(e for e in range(raw.E) if not kept >> e & 1)
        loss = (whole - raw.output(t, without)).square().sum() if raw.E - len(without) >= raw.K else whole @ whole
        s.subset_loss[kept] += loss

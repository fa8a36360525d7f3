"""Scores from pairs and sets of experts: who does what another does. [E] float64, higher is kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moekern.criteria.needs import cosines, distances, idle_lowest, need, others
from moekern.kernels import pair_popcount
from moekern.statistics.layer import LayerStatistics


def ecc(statistics: LayerStatistics) -> Tensor:
    """The step at which the expert is dropped: of the pair chosen together most often, the less used goes (ECC).

    The rule is repeated over the survivors (MC-Suite, arXiv:2504.05586, Fig. 10), so scores are ranks 0 to E - 1.
    """
    return _rarer_of_a_pair(statistics, statistics.coactivation.double())


def ecc_apart(statistics: LayerStatistics) -> Tensor:
    """The other end of `ecc`: of the pair chosen together least often, the less used goes."""
    return _rarer_of_a_pair(statistics, statistics.coactivation.double(), closest=False)


def ets(statistics: LayerStatistics) -> Tensor:
    """As `ecc`, for the pair with the most distinct token ids in common (ETS of MC-Suite, arXiv:2504.05586).

    The paper counts common tokens; here each id counts once, in `ets_tokens` as often as both have seen it.
    """
    need(statistics, "ets", "vocabulary")
    return _rarer_of_a_pair(statistics, pair_popcount(statistics.vocabulary).double())


def ets_apart(statistics: LayerStatistics) -> Tensor:
    """The other end of `ets`: of the pair with the fewest distinct token ids in common, the less used goes."""
    need(statistics, "ets", "vocabulary")
    return _rarer_of_a_pair(statistics, pair_popcount(statistics.vocabulary).double(), closest=False)


def ets_tokens(statistics: LayerStatistics) -> Tensor:
    """As `ets` (arXiv:2504.05586), an id counting as often as it was routed to both: the lesser of its two counts."""
    return _rarer_of_a_pair(statistics, _common_tokens(statistics, "ets_tokens"))


def ets_tokens_apart(statistics: LayerStatistics) -> Tensor:
    """The other end of `ets_tokens`."""
    return _rarer_of_a_pair(statistics, _common_tokens(statistics, "ets_tokens"), closest=False)


def _common_tokens(statistics: LayerStatistics, criterion: str) -> Tensor:
    need(statistics, criterion, "token_count")
    counts = statistics.token_count
    return torch.stack([torch.minimum(row, counts).sum(1) for row in counts]).double()


def _rarer_of_a_pair(statistics: LayerStatistics, together: Tensor, *, closest: bool = True) -> Tensor:
    """The step at which each expert is dropped; `together` [E, E] counts from 0 on, and the pair with most goes first,
    or with `closest` False the one with least."""
    count, E = statistics.count.tolist(), statistics.num_experts
    left = (together if closest else 1 + together.max() - together).cpu().numpy().copy()
    np.fill_diagonal(left, -1.0)
    most, partner = left.max(1), left.argmax(1)  # of each row
    scores = np.zeros(E)
    alive = np.ones(E, dtype=bool)
    for step in range(E - 1):
        i = int(most.argmax())  # of equal pairs the first
        j = int(partner[i])
        if most[i] <= 0:  # none of the survivors meet: the least used goes
            dropped = min(np.flatnonzero(alive).tolist(), key=lambda e: (count[e], -e))
        else:
            dropped = i if (count[i], -i) < (count[j], -j) else j
        scores[dropped] = step
        alive[dropped] = False
        left[dropped], left[:, dropped] = -1.0, -1.0
        changed = np.flatnonzero(partner == dropped)
        most[changed], partner[changed] = left[changed].max(1), left[changed].argmax(1)
        most[dropped] = -1.0
    scores[alive] = E - 1 if E > 1 else 0
    return idle_lowest(statistics, torch.from_numpy(scores).to(statistics.count.device))


def m_smoe(statistics: LayerStatistics) -> Tensor:
    """-the largest (cos + 1) / 2 of router logits with a more used expert (similarity of M-SMoE, arXiv:2310.01334)."""
    need(statistics, "m_smoe", "logit_gram")
    return _covered(statistics, (cosines(statistics.logit_gram) + 1) / 2, statistics.count)


def hc_smoe(statistics: LayerStatistics) -> Tensor:
    """The least distance of mean outputs from a more used expert's (distance of HC-SMoE, arXiv:2410.08589).

    Euclidean, as in the official code. Means are over the replayed tokens, on which every expert was run.
    """
    return _covered(statistics, -distances(mean_output_gram(statistics, "hc_smoe")), statistics.count)


def hc_smoe_cosine(statistics: LayerStatistics) -> Tensor:
    """-the largest cosine of mean outputs with a more used expert: `hc_smoe` (arXiv:2410.08589) by angle alone."""
    return _covered(statistics, cosines(mean_output_gram(statistics, "hc_smoe_cosine")), statistics.count)


def mean_output_gram(statistics: LayerStatistics, criterion: str) -> Tensor:
    """[E, E] inner products of the experts' mean outputs over the replayed tokens."""
    need(statistics, criterion, "output_sum")
    means = statistics.output_sum / statistics.replay_tokens.clamp(min=1)
    return means @ means.T


def ream(statistics: LayerStatistics) -> Tensor:
    """-the largest similarity with an expert of higher REAP (similarity of REAM, arXiv:2604.04356).

    As in the official code, the mean of (1 + c) / 2, c the cosine of the mean outputs over all tokens, each output
    times the softmax of its logit; and of 1 - d / the largest d, d the distance of the experts' router logits over all
    tokens, each expert's divided by their norm. Outputs are those of the replayed tokens, logits those of all.
    """
    need(statistics, "ream", "scored_output_sum", "logit_gram")
    return _covered(statistics, ream_likeness(statistics), _reap(statistics))


def ream_likeness(statistics: LayerStatistics) -> Tensor:
    """[E, E], from 0 to 1: what `ream` compares experts by. The replay tier and router logits must be there."""
    outputs = (1 + cosines(statistics.scored_output_sum @ statistics.scored_output_sum.T)) / 2
    apart = distances(cosines(statistics.logit_gram))
    return (outputs + 1 - apart / apart.max().clamp(min=1e-300)) / 2


def ream_tokens(statistics: LayerStatistics) -> Tensor:
    """As `ream` (arXiv:2604.04356), by the mean over tokens of the outputs' cosine, and the router logits' cosine.

    The cosine of two outputs of one token does not depend on their gates.
    """
    need(statistics, "ream_tokens", "output_cosine", "logit_gram")
    outputs = statistics.output_cosine / statistics.replay_tokens.clamp(min=1)
    return _covered(statistics, (outputs + cosines(statistics.logit_gram)) / 2, _reap(statistics))


def _reap(statistics: LayerStatistics) -> Tensor:
    return statistics.gated_norm_sum / statistics.count.clamp(min=1)


def _covered(statistics: LayerStatistics, similarity: Tensor, salience: Tensor) -> Tensor:
    """-the largest similarity with a more salient expert; the most salient expert has none and scores highest.

    It stands above the others by the mean step between them, or 1 where all are equal. Of equally salient experts the
    lower number counts as the more salient.
    """
    E = statistics.num_experts
    rank = torch.empty(E, dtype=torch.int64, device=salience.device)
    rank[salience.argsort(descending=True, stable=True)] = torch.arange(E, device=salience.device)
    above = rank[None, :] < rank[:, None]
    scores = -torch.where(above, similarity, -torch.inf).max(1).values
    compared = above.any(1)
    some = scores[compared & (statistics.count > 0)]
    step = (some.max() - some.min()) / (len(some) - 1) if len(some) > 1 else some.new_zeros(())
    top = (some.max() if len(some) else 0.0) + torch.where(step > 0, step, 1.0)
    return idle_lowest(statistics, torch.where(compared, scores, top))


def router_redundancy(statistics: LayerStatistics) -> Tensor:
    """-Σ over other experts of the cosine of router logits over all tokens."""
    need(statistics, "router_redundancy", "logit_gram")
    return idle_lowest(statistics, -others(cosines(statistics.logit_gram)))


def output_redundancy(statistics: LayerStatistics) -> Tensor:
    """-Σ over other experts of the mean cosine of their outputs on the same tokens."""
    need(statistics, "output_redundancy", "output_cosine")
    return idle_lowest(statistics, -others(statistics.output_cosine / statistics.replay_tokens.clamp(min=1)))


def leave_one_out(statistics: LayerStatistics) -> Tensor:
    """Σ ‖Δ‖₂² over the replayed tokens: what the block's output loses when the expert is dropped alone.

    A token's next-best expert takes over as the model's own router chooses it. Exact for the sampled tokens.
    """
    need(statistics, "leave_one_out", "deletion_gram")
    return idle_lowest(statistics, statistics.deletion_gram.diagonal().clamp(min=0))


def shape(statistics: LayerStatistics) -> Tensor:
    """Shapley-like share of the coalitions' value: Σ over chosen sets A with e of (v(A) - α n(A without e)) (SHAPE).

    v(A) is how often exactly A was chosen, n(B) how many tokens chose all of B, α the least v(A) / n(A without e) over
    the sets with e (arXiv:2606.09886; the official code's n is this one up to a constant).
    """
    need(statistics, "shape", "coalitions")
    sets, value = statistics.coalitions[:, :-1], statistics.coalitions[:, -1].double()
    C, K = sets.shape
    scores = torch.zeros(statistics.num_experts, dtype=torch.float64)
    if K == 1:
        return idle_lowest(statistics, scores.index_add_(0, sets[:, 0], value))
    without = torch.stack([torch.cat([sets[:, :k], sets[:, k + 1 :]], 1) for k in range(K)], 1)  # [C, K, K - 1]
    _, index = without.reshape(C * K, K - 1).unique(dim=0, return_inverse=True)
    n = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, value.repeat_interleave(K))
    expert, chosen, rest = sets.reshape(-1), value.repeat_interleave(K), n[index]
    alpha = torch.ones(statistics.num_experts, dtype=torch.float64)
    alpha.scatter_reduce_(0, expert, chosen / rest, "amin")
    scores.index_add_(0, expert, chosen - alpha[expert] * rest)
    return idle_lowest(statistics, scores)

"""What routers and experts of a layer look like: load, entropy, and the three ailments that HoME (arXiv:2408.05430)
names of experts, collapse, degradation and underfitting, as far as sums over a text tell."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor

from moekern.criteria.needs import distances
from moekern.criteria.subsets import average_linkage
from moekern.report.shares import outlying, uneven
from moekern.statistics.coverage import THIN
from moekern.statistics.layer import LayerStatistics

OWNED = 0.9  # of an expert's mass, from one domain
CLUSTER = 8  # experts of a cluster, in the mean, where the router has no groups: as MoEC's 64 in 8


def coverage_of(sums: LayerStatistics) -> dict[str, Any]:
    """Tokens that experts of a layer saw."""
    count = sums.count
    return {
        "experts": sums.num_experts,
        "idle": int((count == 0).sum()),
        "thin": int((count < THIN).sum()),
        "least": int(count.min()),
        "median": float(count.double().quantile(0.5)),
        "most": int(count.max()),
    }


def router_of(sums: LayerStatistics) -> dict[str, Any]:
    """Router and load of a layer. Entropy is that of a token's scores over all experts, mean over tokens, as a share of
    ln E; margin the mean of the k-th minus the (k+1)-th score. z is in standard deviations over the layer's experts: of
    tokens, and of the log of the mean output norm."""
    E, seen, used = sums.num_experts, int(sums.logit_tokens), sums.count > 0
    largest, gini, variation = uneven(sums.count)
    norm = (sums.norm_sum / sums.count.clamp(min=1)).clamp(min=1e-300).log()
    return {
        "entropy": float(sums.entropy_sum) / seen / log(E) if seen and E > 1 else None,
        "margin": float(sums.margin_sum) / seen if seen else None,
        "max_over_mean": largest,
        "gini": gini,
        "variation": variation,
        "dead": int((~used).sum()),
        "load_z": _told(outlying(sums.count.double(), torch.ones_like(used))),
        "norm_z": _told(outlying(norm, used & (sums.norm_sum > 0))),
    }


def _told(found: tuple[int, float] | None) -> dict[str, Any] | None:
    return None if found is None else {"expert": found[0], "z": found[1]}


def domains_of(parts: Mapping[str, LayerStatistics]) -> dict[str, Any] | None:
    """What domains have to do with experts of a layer. Mass is the sum of gate x output norm, each domain's made to sum
    to 1, so that domains of more tokens count no more.

    owner, share: the domain that most of an expert's mass comes from, and how much. owned: experts that get OWNED of
    it from one domain (degradation: an expert for all serves one). served: of each domain's mass the share on experts
    whose owner it is; where that is little, others' experts serve it (underfitting). None of fewer than two domains
    with text.
    """
    masses = {name: sums.gated_norm_sum.clamp(min=0) for name, sums in parts.items()}
    masses = {name: mass / mass.sum() for name, mass in masses.items() if float(mass.sum()) > 0}
    if len(masses) < 2:
        return None
    names, table = list(masses), torch.stack(list(masses.values()))  # [D, E]
    whole = table.sum(0)
    share, owner = (table / whole.clamp(min=1e-300)).max(0)
    owner[whole == 0] = -1
    e = int(share.argmax())
    return {
        "owned": int(((share >= OWNED) & (whole > 0)).sum()),
        "most": {"expert": e, "domain": names[int(owner[e])], "share": float(share[e])},
        "served": {name: float(table[d][owner == d].sum()) for d, name in enumerate(names)},
        "experts": {name: int((owner == d).sum()) for d, name in enumerate(names)},
    }


def preferences(parts: Mapping[str, LayerStatistics]) -> dict[str, Tensor]:
    """Domain -> log2 of the share of its slots that each expert gets, over the mean of these shares over domains [E];
    NaN of experts that no domain chose, and -inf of those that this one did not."""
    shares = {name: sums.count.double() / sums.count.sum() for name, sums in parts.items() if sums.count.any()}
    if not shares:
        return {}
    mean = torch.stack(list(shares.values())).mean(0)
    return {name: (share / mean).log2() for name, share in shares.items()}


def routing_variance(sums: LayerStatistics, groups: int) -> dict[str, Any] | None:
    """What router logits vary by within clusters of experts and between them (the two variances that MoEC trains,
    arXiv:2207.09094): means over tokens of the variance over experts, of which the two are the parts.

    Clusters are the router's groups, or average linkage of the logits' distances into as many as have CLUSTER experts
    in the mean. None where logits were not given, or of fewer than 4 experts.
    """
    gram, seen, E = sums.logit_gram, int(sums.logit_tokens), sums.num_experts
    if not gram.numel() or not seen or E < 4:
        return None
    if groups > 1:
        clusters = [list(range(first, first + E // groups)) for first in range(0, E, E // groups)]
    else:
        clusters = average_linkage(distances(gram).cpu().numpy(), list(range(E)), max(2, round(E / CLUSTER)))
    of_means = sum(float(gram[members][:, members].sum()) / len(members) for members in clusters)
    within = (float(gram.trace()) - of_means) / (E * seen)
    between = (of_means - float(gram.sum()) / E) / (E * seen)
    return {"clusters": len(clusters), "within": max(within, 0.0), "between": max(between, 0.0)}


def routing_term(experts: int, top_k: int, tokens: int) -> float:
    """The part of the bound of arXiv:2403.17404 on a sparse mixture's generalisation error that routing makes, for
    `tokens` samples, up to a factor: sqrt(E (2 k (1 + ln(E / k)) + ln(2 m))). The router's Natarajan dimension is taken
    as its number of weights, so as proportional to E; the term of the confidence is left out, small beside these.
    Only the ratio of two means something."""
    return sqrt(experts * (2 * top_k * (1 + log(max(1.0, experts / top_k))) + log(2 * max(1, tokens))))

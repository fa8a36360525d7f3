"""Statistics of given or random tokens, computed in the plainest way, for tests."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from moekern.router import Router
from moekern.statistics.file import Statistics
from moekern.statistics.folding import Folding
from moekern.statistics.header import Source, make_header
from moekern.statistics.layer import TIERS, LayerStatistics

E, K, H = 6, 2, 5
FINGERPRINT = "f" * 64


@dataclass(frozen=True)
class Layer:
    num_experts: int


@dataclass(frozen=True)
class Model:
    """As much of a Layout as check_plan looks at."""

    router: Router = Router(8, 2)
    layers: Mapping[str, Layer] = field(default_factory=lambda: {"0": Layer(8), "10": Layer(8)})
    mtp: Mapping[str, Layer] = field(default_factory=lambda: {"mtp.0": Layer(8)})


def add_token(s, ids, gate, y, score=None):
    """Add one token routed to experts `ids` with gates `gate` and outputs `y` [len(ids), H]."""
    ids, gate, y = torch.tensor(ids), torch.tensor(gate).double(), torch.as_tensor(y).double()
    a = gate * y.norm(dim=1)
    s.tokens.add_(1)
    s.count[ids] += 1
    s.top1_count[ids[gate.argmax()]] += 1
    s.gate_sum[ids] += gate
    s.gate_square_sum[ids] += gate**2
    if score is not None:
        s.logit_tokens.add_(1)
        s.score_sum.add_(score)
        s.entropy_sum.add_(torch.special.entr(score / score.sum()).sum())
        s.margin_sum.add_(-score.sort(descending=True).values[: len(ids) + 1].diff()[-1])
    s.coactivation[ids[:, None], ids] += 1
    s.norm_sum[ids] += y.norm(dim=1)
    s.norm_square_sum[ids] += (y**2).sum(1)
    s.gated_norm_sum[ids] += a
    s.gated_norm_square_sum[ids] += a**2
    s.pair_sum[ids[:, None], ids] += a[:, None] * a
    s.max_abs[ids] = torch.maximum(s.max_abs[ids], y.abs().amax(1))
    if s.dimensions:
        s.square_sum[ids] += y**2
        s.value_sum[ids] += y
        s.unit_sum[ids] += y / y.norm(dim=1, keepdim=True)


def layer_statistics(seed, experts=E, dimensions=H, tokens=40, idle=(), top_k=K):
    """Sums of `tokens` random tokens; experts in `idle` get none, and later experts speak louder."""
    return deepcopy(_drawn(seed, experts, dimensions, tokens, tuple(idle), top_k))


@cache  # one token after another takes ten times as long as a copy
def _drawn(seed, experts, dimensions, tokens, idle, top_k):
    draw = torch.Generator().manual_seed(seed)
    s = LayerStatistics.zeros(experts, dimensions)
    busy = torch.tensor([e for e in range(experts) if e not in idle])
    for _ in range(tokens):
        ids = busy[torch.randperm(len(busy), generator=draw)[:top_k]]
        y = torch.randn(top_k, dimensions or 3, generator=draw).double() * (1 + ids[:, None])
        gate, score = torch.rand(top_k, generator=draw), torch.rand(experts, generator=draw)
        add_token(s, ids.tolist(), gate.tolist(), y, score.double())
    return s


def with_halves(even, odd):
    """The sums of two halves of a text, and what is kept of each apart. Takes both over."""
    fold = Folding()
    fold.add(0, even)
    fold.add(1, odd)
    return fold.total()


def with_tiers(s, seed=0, tokens=40):
    """The same sums with every tier filled by random numbers of the right kind; weights do not depend on the seed."""
    tokens_draw, weights_draw = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    whole = LayerStatistics.zeros(s.num_experts, s.dimensions, tiers=TIERS, hidden=H, words=2)
    filled = {}
    for f in fields(whole):
        value = getattr(whole, f.name)
        draw = weights_draw if f.metadata["tier"] == "weights" else tokens_draw
        if f.metadata["tier"] in ("routed", "dimensions"):
            value = getattr(s, f.name)
            if f.name == "residual_tokens":
                value = torch.ones_like(value)
            elif f.name == "residual_sum":
                value = torch.rand(value.shape, generator=draw, dtype=torch.float64)
        elif f.name == "vocabulary":
            value = distinct_vocabulary(s.num_experts)
        elif f.name == "token_count":
            value = distinct_tokens(s.num_experts)
        elif f.name == "coalitions":
            sets = (
                torch.stack([torch.randperm(s.num_experts, generator=draw)[:K] for _ in range(tokens)]).sort(1).values
            )
            ids, counts = sets.unique(dim=0, return_counts=True)
            value = torch.cat([ids, counts[:, None]], 1)
        elif value.dtype == torch.int64:
            value = torch.randint(1, 9, value.shape, generator=draw)
        else:
            value = torch.rand(value.shape, generator=draw, dtype=torch.float64)
        filled[f.name] = value
    filled["compat_count"][s.count == 0] = 0
    filled["joint_gradients"] = filled["gradients"].clone()
    return LayerStatistics(**filled)


def distinct_pairs(experts):
    """[E, E] symmetric, every pair another number from 1 on; the diagonal is larger than all."""
    pairs = torch.zeros(experts, experts, dtype=torch.int64)
    for number, (i, j) in enumerate(combinations(range(experts), 2), start=1):
        pairs[i, j] = pairs[j, i] = number
    return pairs + torch.diag(torch.arange(1000, 1000 + experts))


def distinct_vocabulary(experts):
    """Bits [E, W] of token ids such that experts i and j have distinct_pairs(experts)[i, j] ids in common."""
    pairs = distinct_pairs(experts)
    words = int(pairs.triu(1).sum()) // 64 + 1
    seen, start = torch.zeros(experts, 64 * words, dtype=torch.bool), 0
    for i, j in combinations(range(experts), 2):
        stop = start + int(pairs[i, j])
        seen[[i, j], start:stop] = True
        start = stop
    return (seen.view(experts, words, 64).long() << torch.arange(64)).sum(-1)


def distinct_tokens(experts):
    """Counts [E, V] of ids of which any two experts share one, with distinct_pairs(experts)[i, j] tokens each."""
    pairs, ids = distinct_pairs(experts), list(combinations(range(experts), 2))
    counts = torch.zeros(experts, -(-max(len(ids), 1) // 64) * 64, dtype=torch.int64)
    for number, (i, j) in enumerate(ids):
        counts[[i, j], number] = pairs[i, j]
    return counts


def header(domains, **changes):
    """A valid header for E experts and top-K; `changes` are fields of the router or the source, or keys of the run."""
    router = Router(**{"num_experts": E, "top_k": K, **_taken(changes, Router)})
    source = replace(Source(FINGERPRINT, "mixtral", "softmax", router), **_taken(changes, Source))
    run = {
        "tokens": dict.fromkeys(domains, 40),
        "data": {"domains": list(domains)},
        "backend": "reference",
        "versions": {"torch": "2"},
    }
    return make_header(source, **{**run, **changes})


def _taken(changes, kind):
    """What is a field of the dataclass `kind`, taken out of `changes`."""
    return {f.name: changes.pop(f.name) for f in fields(kind) if f.name in changes}


def model_statistics(seed=0, layers=("0", "2", "10"), domains=("prose", "code"), **changes):
    """Random statistics of a model with these layers and domains; `changes` go into the header."""
    sums = {
        key: {d: with_tiers(layer_statistics(n := 1000 * seed + 10 * i + j), n) for j, d in enumerate(domains)}
        for i, key in enumerate(layers)
    }
    return Statistics(header(domains, **changes), {key: _of_one_run(parts) for key, parts in sums.items()})


def _of_one_run(parts):
    """The same sums of a layer, with one joint gradient of all domains."""
    first = next(iter(parts.values()))
    joint = {f.name: getattr(first, f.name) for f in fields(first) if f.metadata["merge"] == "alike"}
    joint["joint_gradients"] = torch.tensor([len(parts)])
    return {d: replace(s, **joint, gradients=torch.ones(1, dtype=torch.int64)) for d, s in parts.items()}


def assert_same(a: LayerStatistics, b: LayerStatistics, **tolerance: float) -> None:
    """Every field is equal, dtype too, or within a tolerance."""
    for f in fields(LayerStatistics):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if tolerance:
            torch.testing.assert_close(x, y, **tolerance)
        else:
            assert x.dtype == y.dtype
            assert torch.equal(x, y), f.name


def differences(a: LayerStatistics, b: LayerStatistics, besides: str = "") -> list[str]:
    """Fields that differ, but those that merge in the way `besides`."""
    return [
        f.name
        for f in fields(a)
        if f.metadata["merge"] != besides and not torch.equal(getattr(a, f.name), getattr(b, f.name))
    ]


def close(found: Tensor, expected: Tensor) -> None:
    """Both sides compute in float32, through products of other shapes; differences of gates lose some digits more."""
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=2e-5 * scale)


def close_gradients(name: str, got: Tensor, want: Tensor) -> None:
    """Fields of the gradient tier in float32, but for rounding of products of other shapes; logarithms of small
    variances lose more."""
    if "outlier" in name:  # entries at 3 sigma may fall on either side
        assert int((got - want).abs().max()) <= 2
        return
    scale = float(want.double().abs().max())
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-3, atol=2e-4 * max(scale, 1e-6))

"""What every kernel computes. Other backends must agree with these functions; nothing else defines them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu, softplus

from moekern.kernels.quantised import AWQ_PLACES, Quantised, codes_in
from moekern.kernels.reference_mixture import add_at
from moekern.kernels.reference_mixture import mixture_stats as mixture_stats

if TYPE_CHECKING:
    from moekern.kernels import GramSums, SimilaritySums
    from moekern.kernels.sums import ExpertSums, RouterSums
    from moekern.kernels.weight_stats import WeightSums

SCORES = {
    "softmax": lambda logits: logits.softmax(1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: softplus(logits, threshold=100).sqrt(),
    "identity": lambda logits: logits.where(logits > -torch.inf, 0),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu, "gelu": gelu, "gelu_pytorch_tanh": partial(gelu, approximate="tanh")
}  # fmt: skip


def obstacle(device: str) -> str | None:
    """Why none of this runs on a device of this type; None where it does."""
    return None


def router_stats(
    logits: Tensor | None, topk_idx: Tensor, topk_weight: Tensor, mask: Tensor | None, sums: RouterSums, *, score: str
) -> None:
    """Add the counted tokens of a batch to RouterSums, in place, in float64.

    logits [T, E] and topk_weight [T, K] of any floating dtype, topk_idx [T, K] of any integer one; mask [T] bool counts
    all tokens where it is None. An id outside [0, E) is an empty slot. `score` names one of SCORES.

    tokens counts the tokens, logit_tokens those with logits; without these only the sums of slots are added to. With s
    = score(l) and p = s / Σₑ s of each token: score_sum takes s of every expert, entropy_sum -Σₑ p ln p (0 ln 0 is 0),
    margin_sum the K-th largest s minus the next (nothing where K = 0 or K = E), logit_gram lᵢlⱼ where it was asked for.
    top1_count takes the expert of the largest gate among filled slots, of equal ones the lowest slot's; coactivation
    each ordered pair of different ids of a token, and on its diagonal every filled slot, as count does.
    """
    E, K = len(sums.count), topk_idx.shape[1]
    if mask is not None:
        logits = None if logits is None else logits[mask]
        topk_idx, topk_weight = topk_idx[mask], topk_weight[mask]
    idx, gate = topk_idx.long(), topk_weight.double()
    filled = (idx >= 0) & (idx < E)
    sums.tokens.add_(len(idx))
    add_at(sums.count, idx[filled], None)
    add_at(sums.gate_sum, idx[filled], gate[filled])
    add_at(sums.gate_square_sum, idx[filled], gate[filled] ** 2)

    routed = filled.any(1)
    if K:
        slot = gate.masked_fill(~filled, -torch.inf).argmax(1, keepdim=True)
        add_at(sums.top1_count, idx.gather(1, slot)[routed, 0], None)
    i, j = idx[:, :, None].expand(-1, K, K), idx[:, None, :].expand(-1, K, K)
    pairs = filled[:, :, None] & filled[:, None, :] & (i != j)
    add_at(sums.coactivation.view(-1), (i * E + j)[pairs], None)
    add_at(sums.coactivation.view(-1), idx[filled] * (E + 1), None)

    if logits is None:
        return
    s = SCORES[score](logits.double())
    p = s / s.sum(1, keepdim=True)
    sums.logit_tokens.add_(len(s))
    sums.score_sum.add_(s.sum(0))
    sums.entropy_sum.add_(-torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0).sum())
    if sums.logit_gram.numel():
        sums.logit_gram.add_(logits.double().T @ logits.double())
    if 0 < K < E:
        largest = s.topk(K + 1, dim=1).values
        sums.margin_sum.add_((largest[:, K - 1] - largest[:, K]).sum())


def combine_and_measure(
    y: Tensor, topk_weight: Tensor, topk_idx: Tensor, order: Tensor, offsets: Tensor, mask: Tensor | None,
    residual: Tensor | None, sums: ExpertSums | None,
) -> Tensor:  # fmt: skip
    """Σₖ gate·y of each token, [T, H] of y's dtype; its rows are added to ExpertSums, in place, in float64.

    y [N, H] holds outputs grouped by expert: row n belongs to slot order[n] = t·K + k, rows offsets[e]:offsets[e + 1]
    to expert e, and rows from offsets[E] on to nobody. topk_weight [T, K] floating, topk_idx [T, K], order [N] and
    offsets [E + 1] integers, mask [T] bool or None: the tokens that the sums count; all are combined. residual [T, H]
    or None.

    The output adds, in slot order, float32(gate)·float32(y) to a float32 sum, each product and each sum rounded, and is
    rounded once to y's dtype. With n = ‖y‖₂ of a row in float64 and a = gate·n the sums take, for the row's expert: n,
    n², a, a², the largest |y|; aᵢaⱼ for each ordered pair of a token's rows of different experts, a² on the diagonal;
    and where square_sum has columns, y², y and y / n (0 for n = 0) of each dimension. With a residual h residual_tokens
    counts the tokens and residual_sum takes a·turned(h, output), with the output as it was rounded. Without sums
    nothing is measured.
    """
    (T, K), E = topk_idx.shape, len(offsets) - 1
    y, order = y[: offsets[-1]], order[: offsets[-1]]
    row_of = torch.full((T * K,), -1, device=y.device).index_put_((order,), torch.arange(len(y), device=y.device))
    row_of = row_of.view(T, K)
    out = torch.zeros(T, y.shape[1], device=y.device)
    for k in range(K):  # a product, then a sum, each rounded to float32: the output's bits are part of the meaning
        filled = row_of[:, k] >= 0
        out[filled] += topk_weight[filled, k, None].float() * y[row_of[filled, k]].float()
    out = out.to(y.dtype)
    if sums is None:
        return out

    counted = (
        torch.ones_like(order, dtype=torch.bool) if mask is None else mask[order.div(max(K, 1), rounding_mode="floor")]
    )
    expert = topk_idx.reshape(-1)[order].long()
    norm = torch.cat([rows.double().norm(dim=1) for rows in y.split(4096)])
    gated = norm * topk_weight.reshape(-1)[order].double()
    e = expert[counted]
    add_at(sums.norm_sum, e, norm[counted])
    add_at(sums.norm_square_sum, e, norm[counted] ** 2)
    add_at(sums.gated_norm_sum, e, gated[counted])
    add_at(sums.gated_norm_square_sum, e, gated[counted] ** 2)
    top = y.abs().amax(1).double() if y.shape[1] else norm
    sums.max_abs.copy_(sums.max_abs.scatter_reduce(0, e, top[counted], "amax"))

    a = torch.zeros(T * K, dtype=torch.float64, device=y.device).index_put_((order[counted],), gated[counted])
    a, idx = a.view(T, K), topk_idx.long()
    i, j = idx[:, :, None].expand(-1, K, K), idx[:, None, :].expand(-1, K, K)
    pairs = (row_of[:, :, None] >= 0) & (row_of[:, None, :] >= 0) & (i != j)
    add_at(sums.pair_sum.view(-1), (i * E + j)[pairs], (a[:, :, None] * a[:, None, :])[pairs])
    add_at(sums.pair_sum.view(-1), e * (E + 1), gated[counted] ** 2)
    if sums.square_sum.shape[1]:
        for rows, norms, experts in zip(*(x[counted].split(4096) for x in (y, norm, expert)), strict=True):
            row = rows.double()
            add_at(sums.square_sum, experts, row**2)
            add_at(sums.value_sum, experts, row)
            add_at(sums.unit_sum, experts, torch.where(norms == 0, 0, 1 / norms)[:, None] * row)
    if residual is not None:
        sums.residual_tokens.add_(T if mask is None else mask.sum())
        turn = turned(residual, out).repeat_interleave(K)
        add_at(sums.residual_sum, e, (gated * turn[order])[counted])
    return out


def turned(h: Tensor, out: Tensor) -> Tensor:
    """1 - cos(h, h + out) of each row, at least 0, [T] float64; the cosine with a zero vector is 0."""
    turn = torch.ones(len(h), dtype=torch.float64, device=h.device)
    for start in range(0, len(h), 4096):
        a = h[start : start + 4096].double()
        b = a + out[start : start + 4096].double()
        norms = a.norm(dim=1) * b.norm(dim=1)
        cosine = torch.where(norms == 0, 0, (a * b).sum(1) / norms)
        turn[start : start + 4096] = (1 - cosine).clamp(min=0)
    return turn


def grouped_mlp(
    x: Tensor, gate_up: Tensor | Quantised, down: Tensor | Quantised, topk_weight: Tensor, topk_idx: Tensor,
    order: Tensor, offsets: Tensor, mask: Tensor | None, residual: Tensor | None, sums: ExpertSums | None, *,
    activation: str,
) -> Tensor:  # fmt: skip
    """Σₖ gate·y of each token, [T, H] of x's dtype, with y = down(act(gate(x))·up(x)) of the slot's expert.

    x [T, H]; gate_up [E, 2I, H], the gate's rows before up's; down [E, H, I]: of x's dtype, or Quantised and then as
    dequantize gives them in it. activation names one of ACTIVATIONS. The others are as for combine_and_measure, which
    combines and measures y. Products are added in float64; rounded to x's dtype, each once, are gate(x), up(x),
    act(gate(x)), its product with up(x), and y.
    """
    bounds, K = offsets.tolist(), topk_idx.shape[1]
    y = x.new_zeros(len(order), x.shape[1])
    for e, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start < stop:
            w, v = (of_expert(weight, e, x.dtype).double() for weight in (gate_up, down))
            gate, up = (x[order[start:stop] // K].double() @ w.T).to(x.dtype).chunk(2, dim=1)
            inner = ACTIVATIONS[activation](gate.double()).to(x.dtype).double() * up.double()
            y[start:stop] = (inner.to(x.dtype).double() @ v.T).to(x.dtype)
    return combine_and_measure(y, topk_weight, topk_idx, order, offsets, mask, residual, sums)


def of_expert(weight: Tensor | Quantised, e: int, dtype: torch.dtype) -> Tensor:
    """Expert e's matrix, [R, C]: a slice of [E, R, C], or dequantised to dtype."""
    return weight[e] if isinstance(weight, Tensor) else dequantize(weight.expert(e), dtype)[0]


def similarity(y: Tensor, norm_square: Tensor | None, mask: Tensor | None, sums: SimilaritySums) -> None:
    """Add the counted tokens of a tile to SimilaritySums, in place, in float64.

    y [E, T, H] floating: every expert's output for each token; mask [T] bool or None. gram_sum takes <yᵢ, yⱼ> of each
    token, cosine_sum <yᵢ, yⱼ> / (‖yᵢ‖·‖yⱼ‖), 0 where a norm is 0, and exactly 1 of an expert with itself. norm_square
    [E, T] replaces the squared norms: it is then gram_sum's diagonal, and divides the cosines.
    """
    if mask is not None:
        y, norm_square = y[:, mask], None if norm_square is None else norm_square[:, mask]
    E, T, _ = y.shape
    sums.tokens.add_(T)
    for start in range(0, T, 64):
        rows = y[:, start : start + 64].double().transpose(0, 1)  # [t, E, H]
        gram = rows @ rows.mT
        own = gram.diagonal(dim1=1, dim2=2)
        if norm_square is not None:
            own.copy_(norm_square[:, start : start + 64].T)
        scale = torch.where(own == 0, 0, own.rsqrt())
        cosine = gram * scale[:, :, None] * scale[:, None, :]
        cosine.diagonal(dim1=1, dim2=2).copy_(torch.where(own == 0, 0, own / own))
        sums.gram_sum.add_(gram.sum(0))
        sums.cosine_sum.add_(cosine.sum(0))


SKETCH_TOKENS = 64  # tokens that share a projection


def sketch(y: Tensor, size: int, *, seed: int, start: int) -> tuple[Tensor, Tensor]:
    """Projections [E, T, size] float32 of rows y [E, T, H], and the rows' squared norms [E, T] float32.

    Token t, at position start + t, is multiplied by the signs of chunk (start + t) // SKETCH_TOKENS and divided by
    √size, in float64. `seed` is a signed 64-bit integer.
    """
    E, T, H = y.shape
    z = torch.empty(E, T, size, device=y.device)
    t = 0
    while t < T:
        chunk = (start + t) // SKETCH_TOKENS
        stop = min(T, (chunk + 1) * SKETCH_TOKENS - start)
        z[:, t:stop] = (y[:, t:stop].double() @ signs(size, H, seed, chunk).to(y.device).T / size**0.5).float()
        t = stop
    return z, y.double().square().sum(2).float()


def signs(size: int, H: int, seed: int, chunk: int) -> Tensor:
    """A chunk's projection [size, H] before it is divided by the root of its size: +1 or -1, a bit of SplitMix64 each.

    Column h is bit h mod 64 of the word for (row, h // 64). int64 arithmetic wraps around like unsigned.
    """
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    key = mixed(torch.tensor(chunk + 1) * golden + seed)
    words = -(-H // 64)
    word = mixed(torch.arange(1, size * words + 1).view(size, words) * golden + key)
    bit = word[:, :, None] >> torch.arange(64) & 1
    return (2 * bit.reshape(size, words * 64)[:, :H] - 1).double()


def mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift & (1 << (64 - shift)) - 1)) * factor
    return x


def vocabulary(token_ids: Tensor, topk_idx: Tensor, mask: Tensor | None, bits: Tensor) -> None:
    """Set bit token_ids[t] of the experts of token t, in place.

    token_ids [T] and topk_idx [T, K] integers, mask [T] bool or None, bits [E, W] int64: bit v mod 64 of word v // 64
    stands for id v. Ids of experts outside [0, E) are empty slots; token ids of counted tokens lie in [0, 64·W).
    """
    (E, W), K = bits.shape, topk_idx.shape[1]
    idx, ids = topk_idx.reshape(-1).long(), token_ids.long().repeat_interleave(K)
    kept = (idx >= 0) & (idx < E)
    if mask is not None:
        kept &= mask.repeat_interleave(K)
    seen = unpacked(bits)
    seen[idx[kept], ids[kept]] = True
    shift = torch.arange(64, device=bits.device)
    bits.copy_((seen.view(E, W, 64).long() << shift).sum(2))


def popcount(bits: Tensor) -> Tensor:
    """How many bits each expert has set, [E] int64, of bits [E, W] int64."""
    return unpacked(bits).sum(1)


def pair_popcount(bits: Tensor) -> Tensor:
    """How many bits both experts of each pair have set, [E, E] int64, of bits [E, W] int64."""
    seen = unpacked(bits)
    return torch.stack([(seen & row).sum(1) for row in seen]) if len(seen) else bits.new_zeros(0, 0)


def unpacked(bits: Tensor) -> Tensor:
    """[E, W] words -> [E, 64·W] bool."""
    return (bits[:, :, None] >> torch.arange(64, device=bits.device) & 1).bool().view(len(bits), -1)


def sort_by_expert(topk_idx: Tensor, num_experts: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(order [T·K] int64, offsets [E + 1] int64): flat slots t·K + k by expert, rising within an expert.

    topk_idx [T, K] integers, mask [T] bool or None. Slots with an id outside [0, E), and those of tokens that mask
    leaves out, come last, from offsets[E] on, rising.
    """
    E, idx = num_experts, topk_idx.long()
    filled = (idx >= 0) & (idx < E) & (True if mask is None else mask[:, None])
    ids = idx.masked_fill(~filled, E).reshape(-1)
    counts = torch.bincount(ids, minlength=E + 1)
    return ids.argsort(stable=True), counts.cumsum(0) - counts


def expert_gram(
    a: Tensor, r: Tensor, offsets: Tensor, mask: Tensor | None, sums: GramSums, *, tokens: Tensor | None
) -> None:
    """Add a'a, where it is wanted, and a'r of each expert's rows; row n of a goes with r[tokens[n]], or r[n]."""
    for e, n in grouped(offsets, mask):
        x = a[n].double()
        if sums.gram.numel():
            sums.gram[e] += x.T @ x
        sums.product[e] += x.T @ r[n if tokens is None else tokens[n]].double()


def gated_energy(rows: Tensor, gates: Tensor, offsets: Tensor, mask: Tensor | None, energy: Tensor) -> Tensor:
    """gate·rows: [N, M] float32; squares are those of float64."""
    a = rows.double() * gates.double()[:, None]
    a[int(offsets[-1]) :] = 0
    for e, n in grouped(offsets, mask):
        energy[e] += a[n].square().sum(0)
    return a.float()


def scatter_residual(r: Tensor, a: Tensor, delta: Tensor, tokens: Tensor, offsets: Tensor) -> None:
    """r[tokens] -= a @ delta[e], expert after expert; r is rounded once for each."""
    for e, n in grouped(offsets, None):
        r[tokens[n]] = (r[tokens[n]].double() - a[n].double() @ delta[e].double()).float()


def grouped(offsets: Tensor, mask: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Each expert, and the numbers of its rows that count."""
    bounds = offsets.tolist()
    for e, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        rows = torch.arange(start, stop, device=offsets.device)
        yield e, rows if mask is None else rows[mask[start:stop]]


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def weight_stats(weight: Tensor | Quantised, sums: WeightSums) -> None:
    """weight is dense [E, N], or quantised."""
    for e in range(len(sums.count)):
        w = of_expert(weight, e, torch.float32)
        sums.count[e] += w.numel()
        if w.numel():
            sums.abs_sum[e] += w.double().abs().sum()
            sums.square_sum[e] += w.double().square().sum()
            sums.max_abs[e] = sums.max_abs[e].maximum(w.double().abs().max())


def dequantize(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """[E, R, C] in the order of the codes' rows and columns."""
    device = weight.codes.device
    row = torch.arange(weight.rows, device=device) // weight.block[0]
    rows = row.expand(len(weight.codes), -1) if weight.group is None else weight.group.long()
    column = torch.arange(weight.columns, device=device) // weight.block[1]
    index = (torch.arange(len(rows), device=device)[:, None, None], rows[:, :, None], column)
    scale = weight.scale.view(torch.float8_e8m0fnu) if weight.scale.dtype == torch.uint8 else weight.scale
    w = decode(weight) if weight.zero is None else decode(weight) - weight.zero[index]
    return (w * scale.float()[index]).to(dtype)


def decode(weight: Quantised) -> Tensor:
    """The codes' values, [E, R, C] float32."""
    codes, coding = weight.codes, weight.coding
    if coding in ("e4m3", "e5m2", "int8"):
        stored = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}[coding]
        return codes.view(stored).float()
    if coding == "e2m1":
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(2)[..., : weight.columns]
        return torch.tensor(E2M1, device=codes.device)[nibbles.long()]
    words, bits = codes.view(torch.int32), weight.bits
    if coding.startswith("rows"):
        found = codes_in(words.mT, bits, weight.rows).mT
    else:
        found = codes_in(words, bits, weight.columns, AWQ_PLACES[bits] if coding.startswith("awq") else ())
    return (found - (1 << bits - 1)).float()

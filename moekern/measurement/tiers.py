"""The tiers: what each takes, and what a batch adds to the sums of those that are measured as batches pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moekern import kernels
from moekern.errors import InputError, nearest_name
from moekern.measurement.batch import BatchContext, Routed, Seen
from moekern.model.compute import check_device, device_named
from moekern.model.products import pieces
from moekern.statistics.layer import TIERS, LayerStatistics

ROWS = 4096  # output rows that are widened to float64 at a time
ROUTED_OPS = ("router_stats", "sort_by_expert", "combine_and_measure")  # kernels of the tier that is always measured

Add = Callable[[Seen, BatchContext, LayerStatistics, "str | None"], None]  # the last: kernels' backend


@dataclass(frozen=True)
class Tier:
    """What it takes to measure a tier beside the routed one.

    `by`: "batch", as batches pass; "second pass" over the same data; "replay" of a sample when a layer's batches have
    passed; a pass "backward"; "weights" alone. `ops` are its kernels beside those of the routed tier, which for weights
    run on the CPU; `implies` the tiers it is made from; `add` what a batch adds, where that is not done by the kernels
    of the routed tier or kept apart (coalitions).
    """

    by: Literal["batch", "second pass", "replay", "backward", "weights"]
    ops: tuple[str, ...] = ()
    implies: tuple[str, ...] = ()
    add: Add | None = None


def wanted_tiers(names: Collection[str], measurable: Sequence[str], where: str) -> tuple[str, ...]:
    """The tiers that are to be measured, in their usual order, with those they imply; "routed" is always there.

    Raises InputError for a name that `where` cannot measure.
    """
    for name in names:
        if name != "routed" and name not in measurable:
            reason = f"{where} does not measure it" if name in TIERS else "unknown"
            near = nearest_name(name, measurable)
            raise InputError(f"--tier {name}: {reason}; expected one of {', '.join(('routed', *measurable))}{near}")
    implied = {other for name in names if name != "routed" for other in TABLE[name].implies}
    return tuple(tier for tier in TIERS if tier in names or tier in implied)


def at_once(tiers: Collection[str]) -> tuple[str, ...]:
    """Those of which parts of the text do not add up to the whole: what they count depends on all of it."""
    return tuple(tier for tier in tiers if tier != "routed" and TABLE[tier].by not in ("batch", "weights"))


def not_by_segments(tiers: Collection[str]) -> tuple[str, ...]:
    """Those of which segments of one text, measured apart, do not add up to the whole."""
    return tuple(tier for tier in at_once(tiers) if TABLE[tier].by != "replay")


def backends_of(device: str, backend: str | None, tiers: Collection[str] = ()) -> dict[str, str]:
    """Op -> the backend that serves it, for the statistics' header. Raises InputError where it or the device is not."""
    check_device(device)
    ops = {op: "cpu" for tier in tiers if TABLE[tier].by == "weights" for op in TABLE[tier].ops}
    kind = device_named(device).type
    ops |= dict.fromkeys((*ROUTED_OPS, *(op for t in tiers if TABLE[t].by != "weights" for op in TABLE[t].ops)), kind)
    return served(ops, backend)


def served(ops: Mapping[str, str], backend: str | None) -> dict[str, str]:
    """Op -> the backend that serves it; `ops` say on which device's type. Raises InputError where none does."""
    try:
        return {op: kernels.backend_for(op, where, backend) for op, where in ops.items()}
    except NotImplementedError as error:
        raise InputError(f"--backend {backend}: {error}" if backend else str(error)) from error


def add_constants(seen: Seen, context: BatchContext, sums: LayerStatistics, backend: str | None) -> None:
    """Add gate^2 x output of every counted row, each product rounded to float32, and gate^2, to its expert's sums: by
    the kernel that adds up outputs, in its order, some experts at a time."""
    slot, offsets = seen.routed.order, seen.routed.offsets
    gates = torch.ones_like(seen.gates) if seen.gates_applied else seen.gates
    square = gates.float().square()
    found = kernels.expert_sums(sums.num_experts, seen.y.shape[1], seen.y.device)
    for rows in pieces(offsets.tolist(), ROWS):
        own = torch.full_like(seen.ids, -1).flatten()
        own[slot[rows]] = seen.ids.flatten()[slot[rows]]
        kernels.combine_and_measure(
            seen.y[rows].float() * square.flatten()[slot[rows], None],
            torch.zeros_like(square), own.view_as(seen.ids), slot[rows],
            offsets.clamp(rows.start, rows.stop) - rows.start, context.mask, found, backend=backend,
        )  # fmt: skip
    sums.gated_value_sum.add_(found.value_sum)
    routed = kernels.router_sums(sums.num_experts, seen.y.device)
    kernels.router_stats(None, seen.ids, gates, context.mask, routed, backend=backend)
    sums.gated_value_weight.add_(routed.gate_square_sum)


def add_stream(seen: Seen, context: BatchContext, sums: LayerStatistics, backend: str | None) -> None:
    """Add the energy of the residual stream in front of the experts: by the kernel that adds up norms of outputs."""
    if seen.residual is None:
        return
    T, device = len(seen.residual), seen.residual.device
    ids, found = torch.zeros(T, 1, dtype=torch.int64, device=device), kernels.expert_sums(1, device=device)
    kernels.combine_and_measure(
        seen.residual, torch.zeros(T, 1, device=device), ids, torch.arange(T, device=device),
        torch.tensor([0, T], device=device), context.mask, found, backend=backend,
    )  # fmt: skip
    sums.stream_square_sum.add_(found.norm_square_sum)


def add_vocabulary(seen: Seen, context: BatchContext, sums: LayerStatistics, backend: str | None) -> None:
    """Mark the token ids that each expert saw."""
    token_ids = _token_ids(seen, context, "vocabulary")
    kernels.vocabulary(token_ids, seen.ids, context.mask, sums.vocabulary, backend=backend)


def add_token_counts(seen: Seen, context: BatchContext, sums: LayerStatistics, backend: str | None) -> None:
    """Count the tokens of each id that each expert saw."""
    token_ids = _token_ids(seen, context, "token_counts")
    E, V = sums.token_count.shape
    routed = (seen.ids >= 0) & (seen.ids < E)
    routed = routed if context.mask is None else routed & context.mask[:, None]
    place = (seen.ids.long() * V + token_ids.long()[:, None])[routed]
    sums.token_count.view(-1).scatter_add_(0, place, torch.ones_like(place))


def _token_ids(seen: Seen, context: BatchContext, tier: str) -> Tensor:
    if context.token_ids is None or len(context.token_ids) != len(seen.ids):
        raise InputError(f"--tier {tier}: the model was not given input_ids, one for each token")
    return context.token_ids


def chosen_sets(ids: Tensor, mask: Tensor | None, num_experts: int) -> Tensor:
    """Distinct sets of the counted tokens' ids [T, K], as [C, K + 1] int64: rising ids, then how many tokens.

    A token with an empty slot chose fewer than K experts, and is left out.
    """
    ids = ids if mask is None else ids[mask]
    whole = ids[((ids >= 0) & (ids < num_experts)).all(1)].long().sort(1).values
    sets, counts = whole.unique(dim=0, return_counts=True)
    return torch.cat([sets, counts[:, None]], 1)


def add_reap(seen: Seen, context: BatchContext, sums: LayerStatistics, backend: str | None = None) -> None:
    """Add a batch to the reap tier. seen.logits are [T, E], or None: then compat sums stay as they are.

    Where the K largest logits are not the model's choice, those experts are run too; their outputs go nowhere else.
    """
    E, (T, K) = sums.num_experts, seen.ids.shape
    slot, experts = seen.routed.order, seen.ids.long().reshape(-1)[seen.routed.order]
    norm = norms(seen.y)
    counted = torch.ones(T, dtype=torch.bool, device=norm.device) if context.mask is None else context.mask
    gates = torch.where((seen.ids >= 0) & (seen.ids < E), seen.gates, 0).double()
    total = gates.sum(1)
    share = torch.ones_like(gates) if seen.gates_applied else gates
    share = torch.where(total == 0, 0, 1 / total)[:, None] * share
    dense = torch.full((T, E), torch.nan, dtype=torch.float64, device=norm.device)
    token = slot // K
    dense[token, experts] = norm
    weighed = torch.zeros_like(dense).index_put_((token, experts), share.reshape(-1)[slot] * norm)
    sums.renormalised_norm_sum.add_(weighed[counted].sum(0))
    if seen.logits is None:
        return
    chosen, missing = by_logits(seen.logits, seen.ids, seen.routed, context.mask)
    expert, token = missing.T.nonzero(as_tuple=True)
    if len(token):
        dense[token, expert] = norms(seen.outputs(*rows_of(missing)))
    gate = seen.logits.double().softmax(1)
    sums.compat_count.add_(chosen.sum(0))
    sums.compat_gated_norm_sum.add_(torch.where(chosen, gate * dense, 0).sum(0))


def add_mixture(seen: Seen, context: BatchContext, sums: LayerStatistics, backend: str | None) -> None:
    """Add a batch to what was asked for of the tiers mixture and gram, in one read of its rows."""
    share = seen.gates
    if seen.gain is not None:
        gain = seen.gain.float()[seen.ids.long().clamp(0, seen.num_experts - 1)]
        share = torch.where(gain == 0, 0, share.float() / gain)
    kernels.mixture_stats(
        seen.y,
        torch.ones_like(seen.gates) if seen.gates_applied else seen.gates,
        seen.ids,
        seen.routed.order,
        seen.routed.offsets,
        context.mask,
        sums.views(kernels.MixtureSums) if sums.mixture_norm_sum.numel() else None,
        sums.contribution_gram if sums.contribution_gram.numel() else None,
        share=share,
        backend=backend,
    )


def by_logits(logits: Tensor, ids: Tensor, routed: Routed, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """[T, E] bool, twice: the counted tokens' K largest logits [T, E], and those of them that are not the choice."""
    (T, E), K = logits.shape, ids.shape[1]
    chosen = torch.zeros(T, E, dtype=torch.bool, device=logits.device)
    chosen.scatter_(1, logits.topk(min(K, E), dim=1).indices, True)
    if mask is not None:
        chosen &= mask[:, None]
    missing = chosen.clone()
    missing[routed.order // K, ids.long().reshape(-1)[routed.order]] = False
    return chosen, missing


def rows_of(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and offsets, as `Seen.outputs` takes them, of the places that are set in [T, E]."""
    ends = wanted.sum(0).cumsum(0)
    return wanted.T.nonzero(as_tuple=True)[1], torch.cat([ends.new_zeros(1), ends])


def add_outliers(seen: Seen, mask: Tensor | None, first: LayerStatistics, total: Tensor) -> None:
    """total[e] += entries of e's counted rows beyond 3 sigma, by the mean and sigma of `first`, a first pass's sums."""
    entries = (first.count * first.dimensions).clamp(min=1)
    mean = first.value_sum.sum(1) / entries
    sigma = (first.square_sum.sum(1) / entries - mean.square()).clamp(min=0).sqrt()
    slot = seen.routed.order
    experts = seen.ids.long().reshape(-1)[slot]
    for start in range(0, len(seen.y), ROWS):
        e = experts[start : start + ROWS]
        far = (seen.y[start : start + ROWS].double() - mean[e, None]).abs() > 3 * sigma[e, None]
        found = far.sum(1)
        if mask is not None:
            found *= mask[slot[start : start + ROWS] // seen.ids.shape[1]]
        total.index_add_(0, e, found)


def norms(y: Tensor) -> Tensor:
    """‖y‖₂ of each row, [N] float64."""
    return torch.cat([rows.double().norm(dim=1) for rows in y.split(ROWS)])


TABLE: Mapping[str, Tier] = {
    "dimensions": Tier("batch"),
    "constants": Tier("batch", add=add_constants),
    "stream": Tier("batch", add=add_stream),
    "vocabulary": Tier("batch", ops=("vocabulary",), add=add_vocabulary),
    "token_counts": Tier("batch", add=add_token_counts),
    "coalitions": Tier("batch"),
    "outliers": Tier("second pass", implies=("dimensions",)),
    "reap": Tier("batch", add=add_reap),
    "mixture": Tier("batch", ops=("mixture_stats",), add=add_mixture),
    "gram": Tier("batch", ops=("mixture_stats",), add=add_mixture),
    "replay": Tier("replay", ops=("similarity",)),
    "gradient": Tier("backward"),
    "weights": Tier("weights", ops=("weight_stats", "similarity", "dequantize")),
}
BY_BATCH = tuple(name for name in TIERS if TABLE[name].by == "batch")  # what one forward pass can measure

"""The sums of one MoE layer. A field says its dtype, shape, tier and how two merge; all else follows from that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache, partial
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

from moekern.kernels.sums import ExpertSums, MixtureSums, RouterSums, declared
from moekern.statistics.contradictions import contradiction
from moekern.statistics.merges import IN_PLACE, MERGES, ONE_SIDED, merge_rows

Views = TypeVar("Views")
Made = Tensor | tuple[tuple[int, ...], dict[str, Any]]  # the tensor itself, or its shape, and type and device by name

# What calibration may be asked to measure beside the routed tier, which is always there.
TIERS = (
    "dimensions", "constants", "stream", "vocabulary", "token_counts", "coalitions", "outliers", "reap", "mixture",
    "gram", "replay", "gradient", "weights",
)  # fmt: skip
HALVES = "halves"  # a tier of its own to whoever reads: what is kept by halves of the text, always measured
SUBSETS = 10  # experts of a layer whose every subset is replayed, at most


def _sum(
    shape: str, tier: str = "routed", *, dtype: torch.dtype = torch.float64, negative: bool = False, merge: str = "add"
) -> Any:
    """`shape` names sizes; "E?" is E or, where its tier was not measured, 0. A named size is one for all fields."""
    return field(metadata={"dtype": dtype, "shape": shape, "negative": negative, "merge": merge, "tier": tier})


def _integers(shape: str, tier: str = "routed", *, merge: str = "add", negative: bool = False) -> Any:
    return _sum(shape, tier, dtype=torch.int64, merge=merge, negative=negative)


def _signed(shape: str, tier: str = "routed", *, merge: str = "add") -> Any:
    return _sum(shape, tier, negative=True, merge=merge)


def _added_by(kind: type[Any], name: str, *, tier: str = "routed", negative: bool = False, merge: str = "add") -> Any:
    """A sum that an op adds to: `kind` of kernels.sums declares its type and shape."""
    sum = declared(kind)[name]
    return _sum(sum.shape, tier, dtype=sum.dtype, negative=negative, merge=merge)


_router, _experts = partial(_added_by, RouterSums), partial(_added_by, ExpertSums)
_mixture = partial(_added_by, MixtureSums, tier="mixture")


def _halves(name: str, *, negative: bool = False, merge: str = "halves") -> Any:
    """A sum of the routed tier over the even and over the odd segments of the text; see `statistics.folding`."""
    sum = {**declared(RouterSums), **declared(ExpertSums)}[name]
    return _sum(f"2? {sum.shape}", HALVES, dtype=sum.dtype, negative=negative, merge=merge)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums over the counted tokens of one MoE layer: E experts, H output dimensions, int64 and float64.

    y is an expert's output row before the gate, a = gate * ‖y‖₂. What a tier measures is empty where it was not asked
    for. A domain's gradient G of an expert is the sum over that domain's tokens in one run: gradient sums count these.
    The joint G is the sum over all domains of a run. Each of its domains holds the same numbers of it, and sums of
    domains of one run hold them still; no number of it is known of several runs together, so it is 0 there.
    """

    # What router_stats and combine_and_measure add to: kernels.sums says what each is, and how it lies in memory.
    tokens: Tensor = _router("tokens")
    logit_tokens: Tensor = _router("logit_tokens")
    count: Tensor = _router("count")
    top1_count: Tensor = _router("top1_count")
    gate_sum: Tensor = _router("gate_sum", negative=True)
    gate_square_sum: Tensor = _router("gate_square_sum")
    score_sum: Tensor = _router("score_sum", negative=True)
    entropy_sum: Tensor = _router("entropy_sum", negative=True)
    margin_sum: Tensor = _router("margin_sum", negative=True)
    coactivation: Tensor = _router("coactivation")
    logit_gram: Tensor = _router("logit_gram", negative=True)
    norm_sum: Tensor = _experts("norm_sum")
    norm_square_sum: Tensor = _experts("norm_square_sum")
    gated_norm_sum: Tensor = _experts("gated_norm_sum", negative=True)
    gated_norm_square_sum: Tensor = _experts("gated_norm_square_sum")
    max_abs: Tensor = _experts("max_abs", merge="max")
    pair_sum: Tensor = _experts("pair_sum", negative=True)
    residual_sum: Tensor = _experts("residual_sum", negative=True)
    residual_tokens: Tensor = _experts("residual_tokens")

    # What of these has a number an expert, or one in all, for each half of the text apart: empty where it is not known.
    half_tokens: Tensor = _halves("tokens")
    half_logit_tokens: Tensor = _halves("logit_tokens")
    half_count: Tensor = _halves("count")
    half_top1_count: Tensor = _halves("top1_count")
    half_gate_sum: Tensor = _halves("gate_sum", negative=True)
    half_gate_square_sum: Tensor = _halves("gate_square_sum")
    half_score_sum: Tensor = _halves("score_sum", negative=True)
    half_entropy_sum: Tensor = _halves("entropy_sum", negative=True)
    half_margin_sum: Tensor = _halves("margin_sum", negative=True)
    half_norm_sum: Tensor = _halves("norm_sum")
    half_norm_square_sum: Tensor = _halves("norm_square_sum")
    half_gated_norm_sum: Tensor = _halves("gated_norm_sum", negative=True)
    half_gated_norm_square_sum: Tensor = _halves("gated_norm_square_sum")
    half_max_abs: Tensor = _halves("max_abs", merge="half maxima")
    half_residual_sum: Tensor = _halves("residual_sum", negative=True)
    half_residual_tokens: Tensor = _halves("residual_tokens")

    square_sum: Tensor = _experts("square_sum", tier="dimensions")
    value_sum: Tensor = _experts("value_sum", negative=True, tier="dimensions")
    unit_sum: Tensor = _experts("unit_sum", negative=True, tier="dimensions")

    gated_value_sum: Tensor = _signed("E? H?", "constants")  # Σ gate² x y; a gate counts 1 where outputs are gated
    gated_value_weight: Tensor = _sum("E?", "constants")  # Σ gate² of the same rows
    stream_square_sum: Tensor = _sum("1?", "stream")  # Σ ‖h‖₂² of the tokens that residual_tokens counts
    vocabulary: Tensor = _integers("E W?", "vocabulary", merge="or", negative=True)  # token ids seen, one bit each
    token_count: Tensor = _integers("E V?", "token_counts")  # tokens of each id, V a multiple of 64
    coalitions: Tensor = _integers("C? M?", "coalitions", merge="rows")  # distinct top-k sets: rising ids, then count
    outlier_sum: Tensor = _integers("E?", "outliers")  # entries of y beyond 3 sigma of the expert's mean entry

    renormalised_norm_sum: Tensor = _signed("E?", "reap")  # Σ (gate / the token's Σ gate) x norm
    # As REAP's code has it: the top-k of the raw logits, and their softmax over all experts as gates.
    compat_count: Tensor = _integers("E?", "reap")
    compat_gated_norm_sum: Tensor = _sum("E?", "reap")

    # What mixture_stats adds to. shares are a token's gates, without the gain of each expert where the model has one.
    mixture_norm_sum: Tensor = _mixture("mixture_norm_sum")
    mixture_square_sum: Tensor = _mixture("mixture_square_sum")
    left_out_norm_sum: Tensor = _mixture("left_out_norm_sum")
    left_out_square_sum: Tensor = _mixture("left_out_square_sum")
    share_sum: Tensor = _mixture("share_sum", negative=True)
    share_square_sum: Tensor = _mixture("share_square_sum")
    contribution_gram: Tensor = _signed("E? E?", "gram")  # Σ <gateᵢ yᵢ, gateⱼ yⱼ> over tokens

    # Over sampled tokens on which every expert was run. Δe is what the block's output loses when e is dropped and the
    # router chooses again without it; 0 for a token that did not choose e.
    replay_tokens: Tensor = _integers("1", "replay")
    output_sum: Tensor = _signed("E? H?", "replay")  # Σ y
    scored_output_sum: Tensor = _signed("E? H?", "replay")  # Σ softmax of all logits x y
    output_gram: Tensor = _signed("E? E?", "replay")  # Σ <yᵢ, yⱼ>
    output_cosine: Tensor = _signed("E? E?", "replay")  # Σ cos(yᵢ, yⱼ)
    deletion_norm_sum: Tensor = _sum("E?", "replay")  # Σ ‖Δe‖₂
    deletion_gram: Tensor = _signed("E? E?", "replay")  # Σ <Δᵢ, Δⱼ>; the diagonal is Σ ‖Δe‖₂²
    deletion_sum: Tensor = _signed("E? H?", "replay")  # Σ Δe
    # Files of before do not know these two. Of the second, the other gates are as they were where none sum to 1.
    deletion_count: Tensor = _integers("E?", "replay", merge="halves")  # tokens that chose e
    refill_square_sum: Tensor = _sum("E?", "replay", merge="halves")  # Σ ‖Δe‖₂²
    subset_loss: Tensor = _sum("S?", "replay")  # Σ ‖all - kept‖₂², by the kept set's bits; where E <= SUBSETS

    gradients: Tensor = _integers("1", "gradient")  # how many G were added up
    gradient_norm_sum: Tensor = _sum("E?", "gradient")  # Σ ‖G‖₂
    gradient_cosine_sum: Tensor = _signed("E? E?", "gradient")  # Σ cos(Gᵢ, Gⱼ)
    gradient_log_std_sum: Tensor = _signed("E?", "gradient")  # Σ over G and hidden dimensions of log std
    gradient_outlier_sum: Tensor = _integers("E?", "gradient")  # entries of G beyond 3 sigma of its mean entry
    joint_gradients: Tensor = _integers("1?", "gradient", merge="alike")  # how many G make up the joint one
    joint_gradient_norm: Tensor = _sum("E?", "gradient", merge="alike")  # ‖joint G‖₂, and so on as above
    joint_gradient_cosine: Tensor = _signed("E? E?", "gradient", merge="alike")
    joint_gradient_log_std: Tensor = _signed("E?", "gradient", merge="alike")
    joint_gradient_outlier: Tensor = _integers("E?", "gradient", merge="alike")
    taylor_sum: Tensor = _signed("E?", "gradient")  # Σ <W, G>
    gate_gradient_sum: Tensor = _signed("E?", "gradient")  # Σ over tokens of gate x ∂loss/∂gate

    # Of the weights W, all matrices of an expert taken together; the same in every domain and run.
    weight_count: Tensor = _integers("E?", "weights", merge="same")
    weight_abs_sum: Tensor = _sum("E?", "weights", merge="same")  # Σ |w|
    weight_square_sum: Tensor = _sum("E?", "weights", merge="same")  # Σ w²
    weight_stable_rank: Tensor = _sum("E?", "weights", merge="same")  # mean over gate, up, down of Σ σ² / σ₁²
    weight_gram: Tensor = _signed("E? E?", "weights", merge="same")  # <Wᵢ, Wⱼ>
    router_gram: Tensor = _signed("E? E?", "weights", merge="same")  # <rᵢ, rⱼ>, r the rows of the router's matrix

    @property
    def num_experts(self) -> int:
        """E."""
        return self.count.shape[0]

    @property
    def halved(self) -> tuple[str, ...]:
        """The fields that are kept by halves of the text too."""
        return HALVED

    @property
    def dimensions(self) -> int:
        """H, or 0 when per-dimension sums were not taken."""
        return self.square_sum.shape[1]

    @property
    def hidden(self) -> int:
        """H, or 0 when no sum was taken that has it."""
        return max(sums.shape[1] for sums in (self.square_sum, self.gated_value_sum, self.output_sum))

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that were measured, without the routed one."""
        found = {f.metadata["tier"] for f in fields(self) if _optional(f) and getattr(self, f.name).numel()}
        return tuple(tier for tier in TIERS if tier in found)

    @classmethod
    def zeros(
        cls,
        num_experts: int,
        dimensions: int = 0,
        device: str | torch.device = "cpu",
        *,
        tiers: Collection[str] = (),
        hidden: int = 0,
        words: int = 0,
    ) -> LayerStatistics:
        """Nothing seen yet. `dimensions` = H asks for that tier; the others are named in `tiers`.

        `words` is the 64-bit words of a vocabulary of V = 64 x words ids, `hidden` the H of the replay tier where
        `dimensions` is 0. Halves of the text are not known unless HALVES is named.
        """
        subsets = 1 << num_experts if num_experts <= SUBSETS else 0
        size = {"1": 1, "E": num_experts, "H": dimensions or hidden, "S": subsets, "C": 0, "M": 0}
        size |= {"W": words, "V": 64 * words, "2": 2}
        wanted = frozenset(("routed", *tiers, *(["dimensions"] if dimensions else [])))
        made = _kinds(wanted, tuple(size.items()), device)
        return cls(*(each if isinstance(each, Tensor) else torch.zeros(each[0], **each[1]) for each in made))

    def like(self) -> LayerStatistics:
        """No token seen yet, of the same sizes and weights."""

        def empty(f: Field[Any]) -> Tensor:
            value: Tensor = getattr(self, f.name)
            merge = f.metadata["merge"]
            if merge == "same" or not value.numel():
                return value
            return value[:0] if merge == "rows" else torch.zeros_like(value)

        return LayerStatistics(*(empty(f) for f in fields(self)))

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def views(self, cls: type[Views]) -> Views:
        """The fields that the named tuple `cls` asks for, sharing memory with this object."""
        return cls(*(getattr(self, name) for name in cls._fields))  # type: ignore[attr-defined]

    def to(self, device: str | torch.device) -> LayerStatistics:
        """The same sums on another device."""
        return LayerStatistics(*(value.to(device) for value in self.tensors().values()))

    def permuted(self, perm: Tensor) -> LayerStatistics:
        """Experts renamed: the result's expert i is this object's expert perm[i]."""
        changed = {}
        for f in fields(self):
            value = getattr(self, f.name)
            for axis, name in enumerate(f.metadata["shape"].split()):
                if name.rstrip("?") == "E" and value.shape[axis]:
                    value = value.index_select(axis, perm)
            changed[f.name] = value
        if self.coalitions.numel():
            ids = perm.argsort()[self.coalitions[:, :-1]].sort(1).values
            changed["coalitions"] = merge_rows(torch.cat([ids, self.coalitions[:, -1:]], 1), self.coalitions[:0])
        if self.subset_loss.numel():
            masks = torch.arange(len(self.subset_loss))
            bits = (masks[:, None] >> torch.arange(self.num_experts)) & 1  # of new experts
            changed["subset_loss"] = self.subset_loss[(bits << perm).sum(1)]
        return LayerStatistics(**changed)

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """Sums of both; maxima by maximum, bits by or. Raises ValueError when sizes or measured tiers differ."""
        return self._united(other, ())

    def absorb(self, other: LayerStatistics) -> LayerStatistics:
        """The same as `+`, in this object's memory where that is possible: it must not be used any longer."""
        return self._united(other, IN_PLACE)

    def _united(self, other: LayerStatistics, in_place: Collection[str]) -> LayerStatistics:
        """in_place: ways of merging whose results are written over this object's numbers."""
        problem = self.differs(other) or self.other_weights(other)
        if problem:
            raise ValueError(f"[LayerStatistics] add: {problem}")
        united = {}
        for name, mine, theirs in self._beside(other):
            merge = MERGE_OF[name]
            if merge in in_place and mine.numel():
                MERGES[merge](mine, theirs, out=mine)
            elif mine.numel() or theirs.numel():
                united[name] = MERGES[merge](mine, theirs)
        return LayerStatistics(**{**vars(self), **united}) if united else self

    def _beside(self, other: LayerStatistics) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name and both tensors of each field; not of those that are one and the same, without numbers."""
        theirs = vars(other)
        return ((n, mine, theirs[n]) for n, mine in vars(self).items() if mine is not theirs[n] or mine.numel())

    def differs(self, other: LayerStatistics) -> str | None:
        """Why the two cannot be added, by their shapes (the sums may lie on the meta device); None when they can."""
        for name, mine, theirs in self._beside(other):
            if mine.shape == theirs.shape:
                continue
            merge = MERGE_OF[name]
            if merge == "rows" or (merge in ONE_SIDED and not (mine.numel() and theirs.numel())):
                continue
            if bool(mine.numel()) != bool(theirs.numel()):
                (tier,) = (f.metadata["tier"] for f in FIELDS if f.name == name)
                return f"{tier} ({name}) is measured on one side only"
            return f"{name}: expected {list(mine.shape)}, got {list(theirs.shape)}"
        return None

    def other_weights(self, other: LayerStatistics) -> str | None:
        """Why the two are not of the same weights; None when they are, or one side did not look at them."""
        for name in OF_WEIGHTS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine.numel() and theirs.numel() and not torch.equal(mine, theirs):
                return f"{name}: the two sides are of different weights"
        return None

    def shape_problem(self) -> str | None:
        """The first field whose type or shape is not what it should be, with the reason; None when all is well."""
        size = {"1": 1, "2": 2, "E": self.num_experts if self.count.ndim == 1 else -1}
        for f in fields(self):
            problem = _shape_problem(f, getattr(self, f.name), size)
            if problem:
                return f"{f.name}: {problem}"
        if self.subset_loss.numel() not in (0, 1 << min(size["E"], SUBSETS)):
            return f"subset_loss: {self.subset_loss.numel()} subsets of {size['E']} experts"
        return None

    def problem(self, top_k: int) -> str | None:
        """The first field that cannot be what it claims, with the reason; None when all is well."""
        wrong = self.shape_problem()
        if wrong:
            return wrong
        for f in fields(self):
            value = getattr(self, f.name)
            if not value.numel():
                continue
            low, high = (each.item() for each in value.aminmax())  # NaN where there is one; no copy of the values
            if not (isfinite(low) and isfinite(high)):
                return f"{f.name}: not finite"
            if not f.metadata["negative"] and low < 0:
                return f"{f.name}: negative"
        ids = self.coalitions[:, :-1]
        if ids.numel() and (ids >= self.num_experts).any():
            return f"coalitions: an id of {self.num_experts} or above"
        return contradiction(self, top_k)


FIELDS = fields(LayerStatistics)
MERGE_OF = {f.name: f.metadata["merge"] for f in FIELDS}
OF_WEIGHTS = tuple(name for name, merge in MERGE_OF.items() if merge == "same")


@cache
def _kinds(tiers: frozenset[str], sizes: tuple[tuple[str, int], ...], device: str | torch.device) -> tuple[Made, ...]:
    """How each field is made. Where its tier is not among these, sizes that may be missing are 0, and it is a tensor
    without numbers, one for all: most fields are of tiers that are not measured."""
    found: list[Made] = []
    for f in FIELDS:
        named, dims = f.metadata["tier"] in tiers, f.metadata["shape"].split()
        shape = tuple(dict(sizes)[d.rstrip("?")] if named or d[-1] != "?" else 0 for d in dims)
        how = {"dtype": f.metadata["dtype"], "device": device}
        found.append((shape, how) if all(shape) else _nothing(shape, **how))
    return tuple(found)


_nothing = cache(torch.zeros)


def _optional(f: Field[Any]) -> bool:
    return "?" in f.metadata["shape"] and f.metadata["tier"] != "routed"


def unmeasured(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file may leave out, beside the fields it holds: fields of a tier, or of a later version."""
    E = len(sums["count"])
    size = {"1": 1, "E": E}
    return {
        f.name: torch.zeros(
            [0 if d[-1] == "?" else size[d] for d in f.metadata["shape"].split()], dtype=f.metadata["dtype"]
        )
        for f in fields(LayerStatistics)
        if f.name not in sums and (f.metadata["tier"] != "routed" or f.name in LATER)
    }


LATER = ("logit_gram", "residual_sum", "residual_tokens")  # routed fields that files of version 1 do not have


def _shape_problem(f: Field[Any], value: Tensor, size: dict[str, int]) -> str | None:
    if value.dtype != f.metadata["dtype"]:
        return f"expected dtype {f.metadata['dtype']}, got {value.dtype}"
    names = f.metadata["shape"].split()
    if value.ndim != len(names) or any(
        n != size.setdefault(d.rstrip("?"), n) for d, n in zip(names, value.shape, strict=True) if n or d[-1] != "?"
    ):
        return f"expected shape [{', '.join(names)}] with E={size['E']}, got {list(value.shape)}"
    return None


HALVED = tuple(f.name.removeprefix("half_") for f in fields(LayerStatistics) if f.metadata["tier"] == HALVES)

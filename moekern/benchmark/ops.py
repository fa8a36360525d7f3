"""One job an op and layer: every backend and rival of it, each of which gives what the reference gives before it is
timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moekern import kernels
from moekern.benchmark import rivals
from moekern.benchmark.inputs import Layer, Routing, normal, routing
from moekern.benchmark.timing import DEVICE

Results = Sequence[Tensor]
Make = Callable[[], Callable[[], Results]]  # new sums, and a call that adds to them and gives them


@dataclass(frozen=True)
class Scale:
    """How much a job computes: enough that nothing fits a cache, or little, for tests."""

    tokens: int = (1 << 20) if DEVICE == "cuda" else 32768
    row_bytes: int = (8 if DEVICE == "cuda" else 1) << 27  # of expert outputs
    tile_bytes: int = 1 << 26  # of all-expert outputs, and of weights
    vocabulary: int = 151936


@dataclass(frozen=True)
class Job:
    """What to time. `moved` is bytes that must move, from the shapes; `flops` counts a multiply and an add as two."""

    op: str
    size: str
    backends: Mapping[str, Make]
    rivals: Mapping[str, Make]  # "eager" is what a user would write; others are bare parts of it
    moved: int = 0
    flops: int = 0
    exact: bool = False
    compiled: Callable[[Callable[..., Any]], Make] | None = None  # the rival with its function compiled


def jobs(layer: Layer, scale: Scale) -> Iterator[Job]:
    """All jobs of one layer; inputs live as long as their job."""
    yield from router_jobs(layer, scale)
    yield from row_jobs(layer, scale)
    yield similarity_job(layer, scale)
    yield from vocabulary_jobs(layer, scale)
    yield from weight_jobs(layer, scale)
    yield from refit_jobs(layer, scale)


def names(op: str) -> tuple[str, ...]:
    """The backends that serve the op on the device that is timed, the default first."""
    return kernels.available()[op][DEVICE]


def router_jobs(layer: Layer, scale: Scale) -> Iterator[Job]:
    """kernels.router_stats on float32 [T, E], with and without the Gram; kernels.sort_by_expert on int64 [T, K]."""
    args = routing(scale.tokens, layer, DEVICE)
    logits, idx, weight, _, _ = args
    moved = logits.nbytes + idx.nbytes + weight.nbytes
    for more in ("", "+gram"):

        def native(backend: str, gram: bool = more != "") -> Callable[[], Results]:
            sums = kernels.router_sums(layer.E, DEVICE, gram=gram)

            def run() -> Results:
                kernels.router_stats(logits, idx, weight, None, sums, score=layer.score, backend=backend)
                return sums

            return run

        def rival(function: Callable[..., None], gram: bool = more != "") -> Callable[[], Results]:
            sums = kernels.router_sums(layer.E, DEVICE, gram=gram)

            def run() -> Results:
                function(logits, idx, weight, sums, layer.score)
                return sums

            return run

        yield Job(
            f"router_stats{more}", f"T={scale.tokens} f32", {b: partial(native, b) for b in names("router_stats")},
            {"eager": partial(rival, rivals.router_stats)}, moved,
            compiled=lambda compiled, rival=rival: partial(rival, compiled(rivals.router_stats)),  # type: ignore[misc]
        )  # fmt: skip
    yield Job(
        "sort_by_expert",
        f"T={scale.tokens} i64",
        {b: partial(_call, partial(kernels.sort_by_expert, idx, layer.E, backend=b)) for b in names("sort_by_expert")},
        {"eager": partial(_call, partial(rivals.sort_by_expert, idx, layer.E))},
        2 * idx.nbytes,
        exact=True,
        compiled=lambda compiled: partial(_call, partial(compiled(rivals.sort_by_expert), idx, layer.E)),
    )


def _call(run: Callable[[], Results]) -> Callable[[], Results]:
    return run


def row_jobs(layer: Layer, scale: Scale) -> Iterator[Job]:
    """kernels.combine_and_measure on bfloat16 rows [T·K, H]: bare, with a residual, with sums of each dimension."""
    T = max(1, min(scale.row_bytes // (2 * layer.K * layer.H), scale.row_bytes // 8 // (2 * layer.H)))
    args = routing(T, layer, DEVICE)
    y = normal(T * layer.K, layer.H, device=DEVICE)
    for more in ("", "+residual", "+dimensions"):
        residual = normal(T, layer.H, device=DEVICE, seed=2) if more == "+residual" else None
        yield _row_job(layer, args, y, residual, more)
    yield _mixture_job(layer, args, y)


def _mixture_job(layer: Layer, args: Routing, y: Tensor) -> Job:
    """kernels.mixture_stats on the same rows: distances and Gram matrix."""
    _, idx, weight, order, offsets = args

    def measuring(function: Callable[..., None]) -> Callable[[], Results]:
        sums = kernels.mixture_sums(layer.E, DEVICE)
        gram = torch.zeros(layer.E, layer.E, dtype=torch.float64, device=DEVICE)

        def run() -> Results:
            function(sums, gram)
            return [*sums, gram]

        return run

    def native(backend: str) -> Callable[[], Results]:
        return measuring(
            lambda sums, gram: kernels.mixture_stats(y, weight, idx, order, offsets, None, sums, gram, backend=backend)
        )

    def rival(function: Callable[..., None]) -> Callable[[], Results]:
        return measuring(lambda sums, gram: function(y, weight, idx, order, sums, gram))

    return Job(
        "mixture_stats", f"T={len(idx)} bf16", {b: partial(native, b) for b in names("mixture_stats")},
        {"eager": partial(rival, rivals.mixture_stats)}, y.nbytes,
        compiled=lambda compiled: partial(rival, compiled(rivals.mixture_stats)),
    )  # fmt: skip


def _row_job(layer: Layer, args: Routing, y: Tensor, residual: Tensor | None, more: str) -> Job:
    T, H = len(args.topk_idx), layer.H
    dimensions = H if more == "+dimensions" else 0

    def native(backend: str) -> Callable[[], Results]:
        sums = kernels.expert_sums(layer.E, dimensions, DEVICE)

        def run() -> Results:
            out = kernels.combine_and_measure(
                y, args.topk_weight, args.topk_idx, args.order, args.offsets, None, sums, residual=residual,
                backend=backend,
            )  # fmt: skip
            return [*sums, out]

        return run

    def rival(function: Callable[..., Tensor]) -> Callable[[], Results]:
        sums = kernels.expert_sums(layer.E, dimensions, DEVICE)

        def run() -> Results:
            return [*sums, function(y, args.topk_weight, args.topk_idx, args.order, residual, sums)]

        return run

    return Job(
        f"combine_and_measure{more}", f"T={T} bf16", {b: partial(native, b) for b in names("combine_and_measure")},
        {"eager": partial(rival, rivals.combine_and_measure)},
        y.nbytes + T * H * (2 if residual is None else 4),
        compiled=lambda compiled: partial(rival, compiled(rivals.combine_and_measure)),
    )  # fmt: skip


def similarity_job(layer: Layer, scale: Scale) -> Job:
    """kernels.similarity on a bfloat16 tile [E, T, H], against einsum and the bare matrix product."""
    E, H = layer.E, layer.H
    T = max(1, min(64, scale.tile_bytes // (2 * E * H)))
    y = normal(E, T, H, device=DEVICE) + normal(1, T, H, device=DEVICE, seed=2)
    flat = y.float().view(E, T * H)

    def native(backend: str) -> Callable[[], Results]:
        sums = kernels.similarity_sums(E, DEVICE)

        def run() -> Results:
            kernels.similarity(y, None, sums, backend=backend)
            return sums

        return run

    def rival(function: Callable[..., None]) -> Callable[[], Results]:
        sums = kernels.similarity_sums(E, DEVICE)

        def run() -> Results:
            function(y, sums)
            return sums

        return run

    return Job(
        "similarity", f"T={T} bf16", {b: partial(native, b) for b in names("similarity")},
        {"eager": partial(rival, rivals.similarity), "gemm": lambda: lambda: [flat @ flat.T]},
        flops=2 * E * E * T * H, compiled=lambda compiled: partial(rival, compiled(rivals.similarity)),
    )  # fmt: skip


def vocabulary_jobs(layer: Layer, scale: Scale) -> Iterator[Job]:
    """kernels.vocabulary on T tokens, and kernels.pair_popcount of what they set."""
    idx = routing(scale.tokens, layer, DEVICE).topk_idx
    V, E = scale.vocabulary, layer.E
    ids = torch.randint(V, (scale.tokens,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bits = kernels.vocabulary_bits(E, V, DEVICE)
    kernels.vocabulary(ids, idx, None, bits)
    seen = torch.zeros(E, V, dtype=torch.bool, device=DEVICE)
    rivals.vocabulary(ids, idx, seen)

    def native(backend: str) -> Callable[[], Results]:
        mine = torch.zeros_like(bits)

        def run() -> Results:
            kernels.vocabulary(ids, idx, None, mine, backend=backend)
            return [mine]

        return run

    def rival() -> Callable[[], Results]:
        mine = torch.zeros_like(seen)

        def run() -> Results:
            rivals.vocabulary(ids, idx, mine)
            return [mine]

        return run

    size = f"T={scale.tokens} V={V}"
    yield Job("vocabulary", size, {b: partial(native, b) for b in names("vocabulary")}, {"eager": rival}, exact=True,
              moved=ids.nbytes + idx.nbytes)  # fmt: skip
    yield Job(
        "pair_popcount", f"V={V}",
        {b: partial(_call, lambda b=b: [kernels.pair_popcount(bits, backend=b)]) for b in names("pair_popcount")},  # type: ignore[misc]
        {"eager": lambda: lambda: [(seen.float() @ seen.float().T).long()]},
        moved=bits.nbytes, exact=True,
    )  # fmt: skip


def weight_jobs(layer: Layer, scale: Scale) -> Iterator[Job]:
    """kernels.weight_stats on bfloat16 [E, R, C] and on FP8 in blocks of 128 x 128; kernels.dequantize of these."""
    R, C = layer.H, layer.I
    E = max(1, min(layer.E, scale.tile_bytes // (R * C)))
    dense = normal(E, R, C, device=DEVICE)
    codes = torch.randint(120, (E, R, C), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    grid = normal(E, -(-R // 128), -(-C // 128), device=DEVICE, dtype=torch.float32).abs()
    fp8 = kernels.quantised.scaled(codes, grid, (128, 128))
    stored = codes.numel() + grid.nbytes

    def stats(weight: Any, run: Callable[..., None]) -> Callable[[], Results]:
        sums = kernels.weight_sums(E, DEVICE)

        def call() -> Results:
            run(weight, sums)
            return sums

        return call

    def by(weight: Any) -> dict[str, Make]:
        return {b: partial(stats, weight, partial(kernels.weight_stats, backend=b)) for b in names("weight_stats")}

    size = f"{E}x{R}x{C}"
    yield Job("weight_stats bf16", size, by(dense), {"eager": partial(stats, dense, rivals.weight_stats)}, dense.nbytes)

    def of_fp8(weight: Any, sums: kernels.WeightSums) -> None:
        rivals.weight_stats(rivals.fp8_blocks(codes, grid, 128, torch.float32), sums)

    def dense_of(function: Callable[..., Tensor]) -> Callable[[], Results]:
        return lambda: [function(codes, grid, 128)]

    yield Job("weight_stats fp8", size, by(fp8), {"eager": partial(stats, None, of_fp8)}, stored)
    yield Job(
        "dequantize fp8", size,
        {b: partial(_call, lambda b=b: [kernels.dequantize(fp8, backend=b)]) for b in names("dequantize")},  # type: ignore[misc]
        {"eager": partial(dense_of, rivals.fp8_blocks)},
        stored + 2 * codes.numel(), exact=True,
        compiled=lambda compiled: partial(dense_of, compiled(rivals.fp8_blocks)),
    )  # fmt: skip


def refit_jobs(layer: Layer, scale: Scale) -> Iterator[Job]:
    """Experts that keep half of their channels, M, and have equally many rows: Gram matrices, activations, residuals.

    As many operations as the kernel does are counted: half of them for A'A, which is symmetric. "gemm" does as many.
    """
    M, H, R = max(1, layer.I // 2), layer.H, max(4, scale.tokens // 64)
    E = max(1, min(layer.E, scale.tile_bytes // (8 * M * H)))
    a, r = (normal(n, m, device=DEVICE, dtype=torch.float32, seed=m) for n, m in ((E * R, M), (2 * R, H)))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.randperm(2 * R, generator=generator)[:R] for _ in range(E)]).to(DEVICE)
    offsets, size = torch.arange(0, E * R + 1, R, device=DEVICE), f"{E}x{R}x{M}x{H} f32"
    other = torch.cat([a[:, : M // 2], r.repeat_interleave(E, 0)[: E * R]], 1)  # as wide as there are operations

    def gram(run: Callable[..., None]) -> Callable[[], Results]:
        sums = kernels.gram_sums(E, M, H, DEVICE)

        def call() -> Results:
            run(sums)
            return sums

        return call

    yield Job(
        "expert_gram", size,
        {b: partial(gram, partial(kernels.expert_gram, a, r, offsets, None, tokens=tokens, backend=b))
         for b in names("expert_gram")},
        {"eager": partial(gram, partial(rivals.expert_gram, a, r, tokens, R)),
         "gemm": lambda: lambda: [x.T @ y for x, y in zip(a.split(R), other.split(R), strict=True)]},
        flops=E * R * (M * M + 2 * M * H),
    )  # fmt: skip
    delta = normal(E, M, H, device=DEVICE, dtype=torch.float32)

    def scatter(run: Callable[..., None]) -> Callable[[], Results]:
        mine = r.clone()

        def call() -> Results:
            run(mine)
            return [mine]

        return call

    yield Job(
        "scatter_residual", size,
        {b: partial(scatter, lambda r, b=b: kernels.scatter_residual(r, a, delta, tokens, offsets, backend=b))  # type: ignore[misc]
         for b in names("scatter_residual")},
        {"eager": partial(scatter, lambda r: rivals.scatter_residual(r, a, delta, tokens, R)),
         "gemm": lambda: lambda: [x @ y for x, y in zip(a.split(R), delta, strict=True)]},
        flops=2 * E * R * M * H,
    )  # fmt: skip
    yield _energy_job(a, R, offsets)


def _energy_job(a: Tensor, R: int, offsets: Tensor) -> Job:
    (N, M), E = a.shape, len(offsets) - 1
    rows, gates = normal(N, M, device=DEVICE), torch.rand(N, device=DEVICE)

    def run(function: Callable[..., Tensor]) -> Callable[[], Results]:
        energy = torch.zeros(E, M, dtype=torch.float64, device=DEVICE)
        return lambda: [energy, function(energy)]

    def native(backend: str) -> Callable[[], Results]:
        return run(lambda energy: kernels.gated_energy(rows, gates, offsets, None, energy, backend=backend))

    def rival(function: Callable[..., Tensor]) -> Callable[[], Results]:
        return run(lambda energy: function(rows, gates, R, energy))

    return Job(
        "gated_energy", f"{E}x{R}x{M} bf16", {b: partial(native, b) for b in names("gated_energy")},
        {"eager": partial(rival, rivals.gated_energy)}, rows.nbytes + a.nbytes,
        compiled=lambda compiled: partial(rival, compiled(rivals.gated_energy)),
    )  # fmt: skip

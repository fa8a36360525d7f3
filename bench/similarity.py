"""Time the ops over pairs of experts on the layers people prune:  python -m bench.similarity [--out results.jsonl]

`gemm` is torch.matmul of the same float32 Gram, (E x TH)(TH x E): the yardstick, it gives no cosines. `eager` is what a
user would write in torch: normalise, einsum, and distances by broadcasting. Rates count the whole product, 2·E²·T·H
operations, of which a symmetric kernel needs half. Each backend must first agree with the reference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.kernels import DEVICE, SCRUB, machine, seconds
from moekern import kernels
from tests.cases import MODELS, Case, router

TILE_BYTES = 1 << 26  # of bfloat16 outputs in one call
VOCABULARY = 151936
ROUTED_TOKENS = 32768
SKETCH = 256


def eager_similarity(y: Tensor, sums: kernels.SimilaritySums) -> Tensor:
    rows = y.float()
    unit = torch.nn.functional.normalize(rows, dim=2)
    sums.tokens.add_(y.shape[1])
    sums.gram_sum.add_(torch.einsum("ith,jth->ij", rows, rows))
    sums.cosine_sum.add_(torch.einsum("ith,jth->ij", unit, unit))
    return torch.stack([(rows - row).square().sum((1, 2)) for row in rows])  # one expert a time: all pairs do not fit


def similarity_lines(case: str, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    E, _, H, _ = MODELS[case]
    T = max(1, min(64, TILE_BYTES // (2 * E * H)))
    g = torch.Generator().manual_seed(0)
    y = (torch.randn(1, T, H, generator=g) + torch.randn(E, T, H, generator=g)).to(dtype).to(DEVICE)
    flat, sums = y.float().view(E, T * H), kernels.similarity_sums(E, DEVICE)
    runs: dict[str, Callable[[], object]] = {
        "gemm": lambda: flat @ flat.T,
        "eager": lambda: eager_similarity(y, sums),
    }
    want = kernels.similarity_sums(E, DEVICE)
    kernels.similarity(y, None, want, backend="reference")
    for backend in kernels.available()["similarity"][DEVICE][:-1]:
        got = kernels.similarity_sums(E, DEVICE)
        kernels.similarity(y, None, got, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.gram_sum.max()))
        runs[backend] = lambda backend=backend: kernels.similarity(y, None, sums, backend=backend)
    times = {name: seconds(run, repeats if name != "eager" else min(repeats, 3), 1) for name, run in runs.items()}
    size = f"T={T} {str(dtype).removeprefix('torch.')}"
    return [
        line("similarity", case, size, name, t, times, gflop_s=round(2 * E * E * T * H / t / 1e9, 1))
        for name, t in times.items()
    ] + sketch_lines(case, y, size, repeats)


def sketch_lines(case: str, y: Tensor, size: str, repeats: int) -> list[dict[str, object]]:
    """One expert at a time is how sketches are made; here all at once. `gemm` is the product with a given matrix."""
    E, T, H = y.shape
    rows, projection = y.float().view(E * T, H), torch.randn(SKETCH, H, device=DEVICE)
    runs: dict[str, Callable[[], object]] = {"gemm": lambda: rows @ projection.T}
    for backend in kernels.available()["sketch"][DEVICE][:-1]:
        runs[backend] = lambda backend=backend: kernels.sketch(y, SKETCH, backend=backend)
    times = {name: seconds(run, repeats, 1) for name, run in runs.items()}
    return [
        line("sketch", case, f"{size} m={SKETCH}", name, t, times, gflop_s=round(2 * E * T * H * SKETCH / t / 1e9, 1))
        for name, t in times.items()
    ]


def vocabulary_lines(case: str, repeats: int) -> list[dict[str, object]]:
    E, K, _, _ = MODELS[case]
    idx = router(Case(ROUTED_TOKENS, E, K, 1)).topk_idx.to(DEVICE)
    ids = torch.randint(VOCABULARY, (ROUTED_TOKENS,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bits = kernels.vocabulary_bits(E, VOCABULARY, DEVICE)
    kernels.vocabulary(ids, idx, None, bits)
    seen = torch.zeros(E, VOCABULARY, dtype=torch.bool, device=DEVICE)

    def eager() -> None:
        seen[idx.reshape(-1), ids.repeat_interleave(K)] = True

    runs: dict[str, dict[str, Callable[[], object]]] = {
        "vocabulary": {"eager": eager},
        "pair_popcount": {"eager": lambda: seen.float() @ seen.float().T},
    }
    runs["vocabulary"]["eager"]()
    assert torch.equal(kernels.pair_popcount(bits), (seen.float() @ seen.float().T).long())
    for op, row in runs.items():
        for backend in kernels.available()[op][DEVICE][:-1]:
            row[backend] = {
                "vocabulary": lambda backend=backend: kernels.vocabulary(ids, idx, None, bits, backend=backend),
                "pair_popcount": lambda backend=backend: kernels.pair_popcount(bits, backend=backend),
            }[op]
    found = {op: {name: seconds(run, repeats, 1) for name, run in row.items()} for op, row in runs.items()}
    return [
        line(op, case, f"T={ROUTED_TOKENS} V={VOCABULARY}", name, t, times)
        for op, times in found.items()
        for name, t in times.items()
    ]


def line(
    op: str, case: str, size: str, backend: str, t: float, times: dict[str, float], gflop_s: float | None = None
) -> dict[str, object]:
    over = {f"over_{name}": round(times[name] / t, 2) if name in times else None for name in ("gemm", "eager")}
    print(f"{op} {case} {size} {backend} {t * 1e3:.1f} ms", file=sys.stderr)
    return {"op": op, "case": case, "size": size, "backend": backend, "us": round(t * 1e6), "gflop_s": gflop_s, **over}


def show(lines: list[dict[str, object]], title: str) -> None:
    table = Table(title=title)
    columns = ("op", "case", "size", "backend", "us", "gflop_s", "over_gemm", "over_eager")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:4] else "right")
    for row in lines:
        table.add_row(*("" if row[c] is None else str(row[c]) for c in columns))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append one JSON line a case to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, default=9, help="calls a median is taken of")
    parser.add_argument("--case", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    read = SCRUB.nbytes / seconds(SCRUB.sum, options.repeats)
    base = {**machine(), "threads": options.threads, "read_gb_s": round(read / 1e9, 1)}
    lines: list[dict[str, object]] = []
    for case in options.case:
        for dtype in (torch.float32, torch.bfloat16):
            lines += similarity_lines(case, dtype, options.repeats)
        lines += vocabulary_lines(case, options.repeats)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.writelines(json.dumps({**base, **row}) + "\n" for row in lines)
    show(lines, f"{base['device']}, {options.threads} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()

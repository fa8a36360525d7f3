"""Time every backend of every kernel on the layers people prune:  python -m bench.kernels [--out results.jsonl]

Each backend must first agree with the reference: a wrong kernel is never timed. `eager` is what a user would write in
torch. Bytes are those that must move, from the shapes: logits, ids or expert rows read once, the output written once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.machine import append, machine
from moekern import _C, kernels
from tests.cases import MODELS, Case, Layer, Router, Rows, router, rows, stream

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTER_TOKENS = 1 << 20 if DEVICE == "cuda" else 32768
ROW_BYTES = (8 if DEVICE == "cuda" else 1) << 27  # of expert outputs in one call: far more than any last-level cache
OUT_BYTES = ROW_BYTES // 8  # outputs that a CPU allocator reuses: fresh pages cost more than the kernel
SCRUB = torch.zeros(64 << 20, device=DEVICE)  # 256 MiB


def seconds(run: Callable[[], object], repeats: int, warm_up: int = 2) -> float:
    """Median time of one call with cold caches; the calls to warm up are not counted."""
    times = []
    for _ in range(repeats + warm_up):
        SCRUB.add_(1)
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def on_device(args: Any) -> Any:
    return type(args)(*(None if a is None else a.to(DEVICE) for a in args))


def eager_router_stats(args: Router, sums: kernels.RouterSums, score: str) -> None:
    E, K = len(sums.count), args.topk_idx.shape[1]
    flat, gate = args.topk_idx.reshape(-1), args.topk_weight.reshape(-1).double()
    s = args.logits.float().softmax(1) if score == "softmax" else args.logits.float().sigmoid()
    p = s / s.sum(1, keepdim=True)
    largest = s.topk(K + 1, dim=1).values
    chosen = torch.zeros_like(s).scatter_(1, args.topk_idx, 1.0)
    sums.tokens.add_(len(s))
    sums.logit_tokens.add_(len(s))
    sums.count.add_(torch.bincount(flat, minlength=E))
    sums.top1_count.add_(torch.bincount(args.topk_idx.gather(1, args.topk_weight.argmax(1, True))[:, 0], minlength=E))
    sums.gate_sum.index_add_(0, flat, gate)
    sums.gate_square_sum.index_add_(0, flat, gate.square())
    sums.score_sum.add_(s.sum(0))
    sums.entropy_sum.sub_((p * p.clamp(min=1e-30).log()).sum())
    sums.margin_sum.add_((largest[:, K - 1] - largest[:, K]).sum())
    sums.coactivation.add_((chosen.T @ chosen).long())
    if sums.logit_gram.numel():
        sums.logit_gram.add_(args.logits.float().T @ args.logits.float())


def eager_combine_and_measure(args: Rows, sums: kernels.ExpertSums, residual: Tensor | None) -> Tensor:
    y, weight, idx, order, offsets, _ = args
    T, K = idx.shape
    gate, expert, token = weight.reshape(-1)[order], idx.reshape(-1)[order], order // K
    out = torch.zeros(T, y.shape[1], device=y.device).index_add_(0, token, gate[:, None].float() * y.float())
    norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float32).double()
    a = gate * norm
    sums.norm_sum.index_add_(0, expert, norm)
    sums.norm_square_sum.index_add_(0, expert, norm.square())
    sums.gated_norm_sum.index_add_(0, expert, a)
    sums.gated_norm_square_sum.index_add_(0, expert, a.square())
    sums.max_abs.copy_(sums.max_abs.scatter_reduce(0, expert, y.abs().amax(1).double(), "amax"))
    spread = torch.zeros(T, len(offsets) - 1, dtype=torch.float64, device=y.device).index_put_((token, expert), a)
    sums.pair_sum.add_(spread.T @ spread)
    if sums.square_sum.shape[1]:
        sums.square_sum.index_add_(0, expert, y.double().square())
        sums.value_sum.index_add_(0, expert, y.double())
        sums.unit_sum.index_add_(0, expert, y.double() / norm[:, None])
    if residual is not None:
        h = residual.float()
        turn = 1 - torch.cosine_similarity(h, h + out.to(y.dtype).float(), dim=1).double()
        sums.residual_sum.index_add_(0, expert, a * turn[token])
        sums.residual_tokens.add_(T)
    return out.to(y.dtype)


def eager_sort_by_expert(topk_idx: Tensor, E: int) -> tuple[Tensor, Tensor]:
    flat = topk_idx.reshape(-1)
    return flat.argsort(stable=True), torch.nn.functional.pad(torch.bincount(flat, minlength=E).cumsum(0), (1, 0))


def timed(op: str, layer: Layer, backend: str, more: str) -> tuple[Callable[[], object], Tensor, float, str]:
    """A call to time, what to compare of its result, and the bytes it must move."""
    E, K, H, score = layer
    if op == "router_stats":
        args = on_device(router(Case(ROUTER_TOKENS, E, K, 1)))
        sums: Any = kernels.router_sums(E, DEVICE, gram=more == "+gram")
        moved, size = args.logits.nbytes + args.topk_idx.nbytes + args.topk_weight.nbytes, f"T={ROUTER_TOKENS} f32"
        run: Callable[[], object] = lambda: kernels.router_stats(*args, sums, score=score, backend=backend)  # noqa: E731
        if backend == "eager":
            run = lambda: eager_router_stats(args, sums, score)  # noqa: E731
    elif op == "sort_by_expert":
        idx = on_device(router(Case(ROUTER_TOKENS, E, K, 1))).topk_idx
        found: list[Tensor] = []
        moved, size, sums = 2 * idx.nbytes, f"T={ROUTER_TOKENS} i64", found
        sort = eager_sort_by_expert if backend == "eager" else partial(kernels.sort_by_expert, backend=backend)
        run = lambda: found.__setitem__(slice(None), sort(idx, E))  # noqa: E731
    else:
        T = min(ROW_BYTES // (2 * K * H), OUT_BYTES // (2 * H))
        args = on_device(rows(Case(T, E, K, H), torch.bfloat16))
        sums = kernels.expert_sums(E, H if more == "+dimensions" else 0, DEVICE)
        residual = stream(args).to(DEVICE) if more == "+residual" else None
        moved, size = args.y.nbytes + T * H * (2 if residual is None else 4), f"T={T} bf16"
        run = lambda: kernels.combine_and_measure(*args, sums, residual=residual, backend=backend)  # noqa: E731
        if backend == "eager":
            run = lambda: eager_combine_and_measure(args, sums, residual)  # noqa: E731
    run()
    result = torch.cat([s.double().reshape(-1).cpu() for s in sums])
    return run, result, moved, size


def facts() -> dict[str, object]:
    gpu = {"device": torch.cuda.get_device_name()} if DEVICE == "cuda" else {}
    code = {"instruction_set": _C.levels()[-1], "cuda_code": _C.cuda_architectures()}
    return {**machine(), **gpu, **code, "torch": torch.__version__}


def measure(cases: list[str], threads: int, repeats: int) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    read = SCRUB.nbytes / seconds(SCRUB.sum, repeats)  # what this machine reads at, not what its datasheet says
    base = {**facts(), "threads": threads, "read_gb_s": round(read / 1e9, 1)}
    lines: list[dict[str, object]] = []
    kinds = [("router_stats", ""), ("router_stats", "+gram"), ("sort_by_expert", "")]
    kinds += [("combine_and_measure", more) for more in ("", "+residual", "+dimensions")]
    for case in cases:
        layer = MODELS[case]
        for op, more in kinds:
            want, eager = None, 0.0
            for backend in ("reference", "eager", *(b for b in kernels.available()[op][DEVICE] if b != "reference")):
                run, got, moved, size = timed(op, layer, backend, more)
                want = got if want is None else want
                exact = op == "sort_by_expert"
                tolerance = (0.0, 0.0) if exact else (1e-4, 1e-5 * float(want.abs().max()))
                torch.testing.assert_close(got, want, rtol=tolerance[0], atol=tolerance[1])
                t = seconds(run, 1, 0) if backend == "reference" else seconds(run, repeats)
                eager = t if backend == "eager" else eager
                line = {"op": op + more, "case": case, "size": size, "backend": backend}
                line |= {"us": round(t * 1e6), "gb_s": round(moved / t / 1e9, 2)}
                line |= {"of_read_bandwidth": round(moved / t / read, 3)}
                lines.append({**base, **line, "over_eager": round(eager / t, 2) if eager else None})
                print(f"{op} {case} {backend} {t * 1e3:.1f} ms", file=sys.stderr)
    return lines


def show(lines: list[dict[str, object]]) -> None:
    first = lines[0]
    title = f"{first['device']}, {first['threads']} threads, reads {first['read_gb_s']} GB/s, torch {first['torch']}"
    table = Table(title=title)
    columns = ("op", "case", "size", "backend", "us", "gb_s", "of_read_bandwidth", "over_eager")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:4] else "right")
    for line in lines:
        table.add_row(*("" if line[c] is None else str(line[c]) for c in columns))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append one JSON line a case to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, default=9, help="calls a median is taken of")
    parser.add_argument("--case", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    options = parser.parse_args()
    lines = measure(options.case, options.threads, options.repeats)
    append(options.out, lines)
    show(lines)


if __name__ == "__main__":
    main()

"""Time `weight_stats` and `dequantize` on down projections people prune:  python -m bench.weights [--out results.jsonl]

Each backend must first agree with the reference. `eager` is what a user would write in torch: the dense weight in
float32, one expert at a time, and three reductions; for FP8 the scales repeated over their blocks, for MXFP4 the
conversion of transformers. Bytes are those that must move: codes, scales and zero points read once, a result written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bench.kernels import DEVICE, SCRUB, machine, seconds, show
from moekern import kernels
from moekern.kernels.quantised import Quantised, awq, dequantize, gptq, mxfp4, pack_quantized, scaled
from tests.cases import MODELS

INTERMEDIATE = {"mixtral-8x7b": 14336, "qwen3-30b-a3b": 768, "gpt-oss-120b": 2880, "deepseek-v3": 2048}
ELEMENTS = 1 << 26  # about as many weights in one call: 128 MiB of bfloat16
Weight = Tensor | Quantised


def packed(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=DEVICE).int()


def real(*shape: int) -> Tensor:
    return torch.rand(shape, device=DEVICE) * 0.01


def make(layout: str, E: int, R: int, C: int) -> tuple[Weight, Callable[[int], Tensor] | None]:
    """A random weight, and how a user would make expert e dense in float32."""
    if layout == "bf16":
        w = real(E, R, C).bfloat16()
        return w, lambda e: w[e].float()
    if layout == "fp8":
        codes = torch.randint(120, (E, R, C), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
        scale = real(E, -(-R // 128), -(-C // 128))
        wide = lambda e: scale[e].repeat_interleave(128, 0)[:R].repeat_interleave(128, 1)[:, :C]  # noqa: E731
        return scaled(codes, scale, (128, 128)), lambda e: codes[e].float() * wide(e)
    if layout == "mxfp4":
        blocks = torch.randint(256, (E, R, C // 32, 16), dtype=torch.uint8, device=DEVICE)
        scales = torch.randint(115, 122, (E, R, C // 32), dtype=torch.uint8, device=DEVICE)
        both = lambda e: (blocks[e : e + 1], scales[e : e + 1])  # noqa: E731
        return mxfp4(blocks, scales), lambda e: convert_moe_packed_tensors(*both(e), dtype=torch.float32)[0].T
    if layout == "packed-g32":
        return pack_quantized(packed(E, R, C // 8), real(E, R, C // 32).bfloat16(), C), None
    arrays = packed(E, C // 128, R // 8), real(E, C // 128, R).half()
    return (gptq(packed(E, C // 8, R), *arrays) if layout == "gptq-g128" else awq(packed(E, C, R // 8), *arrays)), None


LAYOUTS = ("bf16", "fp8", "mxfp4", "packed-g32", "gptq-g128", "awq-g128")


def stored_bytes(weight: Weight) -> int:
    if isinstance(weight, Tensor):
        return weight.nbytes
    return sum(t.nbytes for t in (weight.codes, weight.scale, weight.zero, weight.group) if t is not None)


def eager_stats(dense: Callable[[int], Tensor], sums: kernels.WeightSums) -> None:
    for e in range(len(sums.count)):
        w = dense(e)
        sums.count[e] += w.numel()
        sums.abs_sum[e] += w.abs().sum()
        sums.square_sum[e] += w.square().sum()
        sums.max_abs[e] = sums.max_abs[e].maximum(w.abs().max())


def timed(op: str, weight: Weight, dense: Callable[[int], Tensor] | None, backend: str) -> Callable[[], Tensor]:
    """The call to time, which returns what to compare."""
    E = len(weight.codes if isinstance(weight, Quantised) else weight)

    def stats() -> Tensor:
        sums = kernels.weight_sums(E, DEVICE)
        if backend == "eager":
            assert dense is not None
            eager_stats(dense, sums)
        else:
            kernels.weight_stats(weight, sums, backend=backend)
        return torch.stack([s.double() for s in sums])

    def whole() -> Tensor:
        if backend == "eager":
            assert dense is not None
            return torch.stack([dense(e).bfloat16() for e in range(E)])
        assert isinstance(weight, Quantised)
        return dequantize(weight, backend=backend)

    return stats if op == "weight_stats" else whole


def measure(cases: list[str], threads: int, repeats: int) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    read = SCRUB.nbytes / seconds(SCRUB.sum, repeats)
    base = {**machine(), "threads": threads, "read_gb_s": round(read / 1e9, 1)}
    lines: list[dict[str, object]] = []
    for case, layout in ((case, layout) for case in cases for layout in LAYOUTS):
        R, C = MODELS[case].H, INTERMEDIATE[case]
        E = max(1, min(MODELS[case].E, ELEMENTS // (R * C)))
        if layout in ("gptq-g128", "awq-g128") and C % 128:
            continue
        weight, dense = make(layout, E, R, C)
        for op in ("weight_stats", "dequantize")[: 1 if layout == "bf16" else 2]:
            want, eager = None, None
            moved = stored_bytes(weight) + (2 * E * R * C if op == "dequantize" else 0)
            for backend in ("reference", *(["eager"] if dense else []), *kernels.available()[op][DEVICE][:-1]):
                run = timed(op, weight, dense, backend)
                got = run()
                want = got if want is None else want
                torch.testing.assert_close(got, want, rtol=1e-5 if op == "weight_stats" else 0, atol=0)
                t = seconds(run, 1, 0) if backend == "reference" else seconds(run, repeats)
                eager = t if backend == "eager" else eager
                line = {"op": f"{op} {layout}", "case": case, "size": f"{E}x{R}x{C}", "backend": backend}
                line |= {"us": round(t * 1e6), "gb_s": round(moved / t / 1e9, 2)}
                line |= {"of_read_bandwidth": round(moved / t / read, 3)}
                lines.append({**base, **line, "over_eager": round(eager / t, 2) if eager else None})
                print(f"{op} {layout} {case} {backend} {t * 1e3:.1f} ms", file=sys.stderr)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append one JSON line a case to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, default=9, help="calls a median is taken of")
    parser.add_argument("--case", nargs="+", choices=INTERMEDIATE, default=list(INTERMEDIATE), help="default: all")
    options = parser.parse_args()
    lines = measure(options.case, options.threads, options.repeats)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    show(lines)


if __name__ == "__main__":
    main()

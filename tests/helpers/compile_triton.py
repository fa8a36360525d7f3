"""Compile every Triton kernel for GPUs that are not here:  python -m tests.helpers.compile_triton [mlp] [few] [80 90]

The ops run on meta tensors, which have no values: a read on the host raises. Each launch is compiled instead of run.
"few": each kernel, of fewer shapes, types and tiles. One JSON line a kernel: name, architecture, and what of its PTX
the tests look at.
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import import_module
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton import JITFunction, compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moekern import kernels
from moekern.kernels import triton as backend
from tests.helpers.cases import Case, mlp, moved, router, rows, stream
from tests.helpers.grouped import Size, grouped
from tests.helpers.grouped import moved as moved_rows

mlp_kernels = import_module("moekern.kernels.triton.grouped_mlp")  # the package's name of it is the op's function

TYPES = {
    torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
}  # fmt: skip
ARCHITECTURES = [int(name) for name in sys.argv[1:] if name.isdigit()] or [80, 90]
FEW = "few" in sys.argv
seen: set[tuple[object, ...]] = set()


def compiled(fn: JITFunction, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
    names = fn.arg_names
    values = {**dict(zip(names, args, strict=False)), **{n: options.pop(n) for n in names if n in options}}
    constants = {n: v for n, v in values.items() if v is None or fn.params[names.index(n)].is_constexpr}
    signature = {
        n: "constexpr" if n in constants else TYPES[v.dtype] if isinstance(v, torch.Tensor) else "i32"
        for n, v in ((n, values[n]) for n in names)
    }
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
        if n not in constants and not fn.params[i].do_not_specialize and aligned(values[n])
    }  # fmt: skip
    key = (fn.__name__, *signature.values(), *constants.values(), *attributes)
    if key in seen:
        return
    seen.add(key)
    for architecture in ARCHITECTURES:
        source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
        binary = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        ptx = binary.asm["ptx"]
        found = {
            "kernel": fn.__name__,
            "architecture": architecture,
            "shared": binary.metadata.shared,
            "fused": len(re.findall(r"\bfma\.", ptx)),
            "float_atomics": len(re.findall(r"\b(?:atom|red)\.\S*\.b?f\d+", ptx)),
            "flushed": len(re.findall(r"\b(?:add|mul|sub)\S*\.ftz\.", ptx)),
        }
        print(json.dumps(found), flush=True)


def aligned(value: Any) -> bool:
    """What a launch makes the compiler assume of a number or of an address."""
    return (value.storage_offset() * value.itemsize if isinstance(value, torch.Tensor) else value) % 16 == 0


def meta(args: Any) -> list[Any]:
    return [None if a is None else a.to("meta") for a in args]


def main() -> None:
    JITFunction.run = compiled
    if "mlp" not in sys.argv:
        compile_statistics()
        compile_refit()
    compile_mlp()


def compile_statistics() -> None:
    few = [(Case(300, 8, 2, 45, ids=torch.int32, masked=True), torch.bfloat16, "sqrtsoftplus", [True])]
    every = [
        (Case(300, 513, 22, 600, masked=True), torch.bfloat16, "sqrtsoftplus", [True]),  # 22 slots take seconds
        (Case(300, 8, 2, 45, ids=torch.int32), torch.float16, "softmax", [False, True]),
    ]
    for case, dtype, score, residuals in few if FEW else every:
        backend.sort_by_expert(router(case).topk_idx.to("meta"), case.E, None)
        router_sums = kernels.router_sums(case.E, "meta", gram=True)
        backend.router_stats(*meta(router(case, dtype)), router_sums, score=score)
        sums, args = kernels.expert_sums(case.E, case.H, "meta"), rows(case, dtype)
        for residual in residuals:
            backend.combine_and_measure(*meta((*args, stream(args) if residual else None)), sums)
        mixture, gram = kernels.mixture_sums(case.E, "meta"), torch.empty(case.E, case.E, dtype=torch.float64)
        share, on = args.topk_weight.float(), meta(args)
        backend.mixture_stats(*on[:2], *meta([share]), *on[2:], mixture, gram.to("meta"))


def compile_refit() -> None:
    sizes = [Size((30, 300), 45, 64, 300), *([] if FEW else [Size((30, 300), 512, 77, 300)])]
    dtypes = [torch.float32, *([] if FEW else [torch.float16, torch.bfloat16])]
    for args in map(grouped, sizes):
        on, (E, M, H) = moved_rows(args, "meta"), args.delta.shape
        every = (on.mask, on.tokens, on.r), (None, None, torch.empty(len(on.a), H, device="meta"))
        for mask, tokens, r in every[:1] if FEW else every:
            backend.expert_gram(on.a, r, on.offsets, mask, kernels.gram_sums(E, M, H, "meta"), tokens=tokens)
        backend.scatter_residual(on.r, on.a, on.delta, on.tokens, on.offsets)
        for dtype in dtypes:
            rows = torch.empty(len(on.a), M, dtype=dtype, device="meta")
            energy, gates = torch.empty(E, M, dtype=torch.float64, device="meta"), rows.new_empty(len(rows))
            for mask in (on.mask,) if FEW else (None, on.mask):
                backend.gated_energy(rows, gates, on.offsets, mask, energy)


def compile_mlp() -> None:
    """Every dtype, scale and activation, with the tiles of every chip that has the shared memory."""
    odd, even = Case(40, 8, 2, 45, masked=True), Case(40, 8, 2, 512)
    for sums in () if FEW else (None, kernels.expert_sums(odd.E, odd.H, "meta")):
        backend.grouped_mlp(*moved(mlp(odd, 16), "meta"), None, sums, activation="silu")
    every = (
        (even, torch.float32, None, torch.float32, "gelu", mlp_kernels.FLOAT32),
        (odd, torch.bfloat16, None, torch.float32, "gelu_pytorch_tanh", mlp_kernels.SMALL),
        (odd, torch.float16, (8, 24), torch.float8_e8m0fnu, "silu", mlp_kernels.SMALL),
        (even, torch.bfloat16, (128, 128), torch.float32, "silu", mlp_kernels.SMALL),
        (even, torch.bfloat16, None, torch.float32, "silu", mlp_kernels.BIG),
        (even, torch.bfloat16, (128, 128), torch.bfloat16, "silu", mlp_kernels.BIG),
    )
    for case, dtype, fp8, scales, activation, tiles in (every[0], every[-1]) if FEW else every:
        if tiles == mlp_kernels.BIG:
            ARCHITECTURES[:] = [name for name in ARCHITECTURES if name >= 90]
        mlp_kernels.tiles_for = lambda *_, tiles=tiles: tiles
        args = moved(mlp(case, case.H // 2, dtype, fp8, scales=scales), "meta")
        mlp_kernels.expert_outputs(*args[:3], *args[4:7], activation, measure=True)


if __name__ == "__main__":
    main()

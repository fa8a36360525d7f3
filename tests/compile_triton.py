"""Compile every Triton kernel for GPUs that are not here:  python -m tests.compile_triton [80 90]

The ops run on meta tensors, which have no values: a read on the host raises. Each launch is compiled instead of run.
One JSON line a kernel: name, architecture, and what of its PTX the tests look at.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton import JITFunction, compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moekern import kernels
from moekern.kernels import triton as backend
from tests.cases import Case, router, rows, stream

TYPES = {
    torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
}  # fmt: skip
ARCHITECTURES = [int(name) for name in sys.argv[1:]] or [80, 90]
seen: set[tuple[object, ...]] = set()


def compiled(fn: JITFunction, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
    names = fn.arg_names
    values = {**dict(zip(names, args, strict=False)), **{n: options.pop(n) for n in names if n in options}}
    constants = {n: v for n, v in values.items() if v is None or fn.params[names.index(n)].is_constexpr}
    signature = {
        n: "constexpr" if n in constants else TYPES[v.dtype] if isinstance(v, torch.Tensor) else "i32"
        for n, v in ((n, values[n]) for n in names)
    }
    key = (fn.__name__, *signature.values(), *constants.values())
    if key in seen:
        return
    seen.add(key)
    for architecture in ARCHITECTURES:
        source = ASTSource(fn=fn, signature=signature, constexprs=constants)
        ptx = compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]
        found = {
            "kernel": fn.__name__,
            "architecture": architecture,
            "fused": len(re.findall(r"\bfma\.", ptx)),
            "float_atomics": len(re.findall(r"\b(?:atom|red)\.\S*\.b?f\d+", ptx)),
            "flushed": len(re.findall(r"\b(?:add|mul|sub)\S*\.ftz\.", ptx)),
        }
        print(json.dumps(found), flush=True)


def meta(args: Any) -> list[Any]:
    return [None if a is None else a.to("meta") for a in args]


def main() -> None:
    JITFunction.run = compiled
    for case, dtype, score in (
        (Case(300, 513, 22, 600, masked=True), torch.bfloat16, "sqrtsoftplus"),
        (Case(300, 8, 2, 45, ids=torch.int32), torch.float16, "softmax"),
    ):
        backend.sort_by_expert(router(case).topk_idx.to("meta"), case.E, None)
        router_sums = kernels.router_sums(case.E, "meta", gram=True)
        backend.router_stats(*meta(router(case, dtype)), router_sums, score=score)
        sums, args = kernels.expert_sums(case.E, case.H, "meta"), rows(case, dtype)
        for residual in (None, stream(args)):
            backend.combine_and_measure(*meta((*args, residual)), sums)


if __name__ == "__main__":
    main()

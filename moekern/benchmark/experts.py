"""The whole experts block, as transformers computes it and as moekern measures it: what measuring costs.

Plain is transformers' `grouped_mm` experts function on a real experts module; measured is the function that calibration
puts in its place, router statistics included. All run in turn on the same tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moekern import kernels
from moekern.benchmark.inputs import MODELS, Layer, Routing, normal, routing
from moekern.benchmark.records import Line
from moekern.benchmark.timing import DEVICE, interleaved
from moekern.measurement.batch import BatchContext, InFlight
from moekern.measurement.probe import Probe
from moekern.measurement.recorder import Recorder
from moekern.model.experts import watched_experts
from moekern.model.transformers_api import EXPERTS_FUNCTIONS

# model -> transformers' module and experts class
CLASSES = {
    "mixtral-8x7b": ("mixtral", "MixtralExperts"),
    "qwen3-30b-a3b": ("qwen3_moe", "Qwen3MoeExperts"),
    "gpt-oss-120b": ("gpt_oss", "GptOssExperts"),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3Experts"),
}
FLOPS = 4e14 if DEVICE == "cuda" else 8e10  # of one call, at most
WEIGHTS = 24e9 if DEVICE == "cuda" else 2.5e9  # bytes of one block, at most
VARIANTS = {"measured": False, "measured+dimensions": True}


def lines(model: str, repeats: int, flops: float = FLOPS, weights: float = WEIGHTS) -> list[Line]:
    """One line a variant: seconds, and the ratio to the plain block. Sizes that do not fit are made smaller, and said.

    Raises AssertionError when a measured block gives other outputs than the plain one, or not the same bits again.
    """
    real = MODELS[model]
    layer = real._replace(E=max(real.K, min(real.E, int(weights / (6 * real.H * real.I)))))
    T = max(64, min(1 << 16, int(flops / (6 * layer.K * layer.H * layer.I)))) // 64 * 64
    block = experts_block(model, layer)
    args = routing(T, layer, DEVICE)
    hidden, gates = normal(T, layer.H, device=DEVICE), args.topk_weight.bfloat16()
    plain = partial(EXPERTS_FUNCTIONS["grouped_mm"], block, hidden, args.topk_idx, gates)
    runs: dict[str, Callable[[], Tensor]] = {"plain": plain}
    for name, dimensions in VARIANTS.items():
        runs[name] = measured(block, hidden, args.topk_idx, gates, args.logits, layer, dimensions)
    if not getattr(block, "is_transposed", False):
        for backend in kernels.available()["grouped_mlp"][DEVICE]:
            if backend != "reference" and (backend, DEVICE) != ("triton", "cpu"):  # there only its interpreter
                runs[f"grouped_mlp {backend}"] = one_op(block, hidden, gates, args, layer, backend)
    with torch.no_grad():
        want = plain()
        for name in [name for name in runs if name != "plain"]:
            got = runs[name]()
            # grouped_mm rounds gate x y to bfloat16 (2^-9) before it adds K of them; both round once at the end.
            largest = float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=2.0**-7, atol=2.0**-8 * layer.K * largest)
            assert torch.equal(got, runs[name]()), f"{model}: {name} does not give the same bits again"
        times = interleaved(runs, repeats)
    size = f"T={T} E={layer.E} K={layer.K} H={layer.H} I={layer.I} bf16"
    if layer.E < real.E:
        size += f" (of E={real.E})"
    base: Line = {"op": "experts block", "case": model, "size": size}
    work = 6 * T * layer.K * layer.H * layer.I / 1e9
    return [
        {**base, "backend": name, "us": round(t * 1e6), "gflop_s": round(work / t, 1), "over_plain": ratio(t, times)}
        for name, t in times.items()
    ]


def ratio(t: float, times: Mapping[str, float]) -> float:
    return round(t / times["plain"], 3)


def one_op(
    block: Any, hidden: Tensor, gates: Tensor, args: Routing, layer: Layer, backend: str
) -> Callable[[], Tensor]:
    """The block as one op, measured, on the module's weights; the sort is not counted."""
    sums = kernels.expert_sums(layer.E, 0, DEVICE)

    def run() -> Tensor:
        return kernels.grouped_mlp(
            hidden, block.gate_up_proj, block.down_proj, gates, args.topk_idx, args.order, args.offsets, None, sums,
            backend=backend,
        )  # fmt: skip

    return run


def experts_block(model: str, layer: Layer) -> nn.Module:
    """transformers' experts module with random bfloat16 weights."""
    package, name = CLASSES[model]
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    configs = vars(importlib.import_module(f"transformers.models.{package}.configuration_{package}"))
    config_class = next(
        value
        for key, value in configs.items()
        if key.endswith("Config") and getattr(value, "model_type", None) == package
    )
    config: Any = config_class(
        hidden_size=layer.H, intermediate_size=layer.I, moe_intermediate_size=layer.I, num_experts_per_tok=layer.K,
        **{key: layer.E for key in ("num_experts", "num_local_experts", "n_routed_experts")},
    )  # fmt: skip
    with torch.device("meta"):
        block: nn.Module = getattr(module, name)(config)
    for key, value in list(block.named_parameters()):
        shape = tuple(value.shape)
        weight = normal(*shape, device=DEVICE) if len(shape) == 3 else torch.zeros(shape, device=DEVICE).bfloat16()
        owner, _, leaf = key.rpartition(".")
        setattr(block.get_submodule(owner), leaf, nn.Parameter(weight.mul_(shape[-1] ** -0.5), requires_grad=False))
    return block


def measured(
    block: nn.Module, hidden: Tensor, ids: Tensor, gates: Tensor, logits: Tensor, layer: Layer, dimensions: bool
) -> Callable[[], Tensor]:
    recorder = Recorder(layer.score, ("dimensions",) if dimensions else ())
    probe = Probe("0", False, recorder, InFlight(BatchContext("bench", (1, len(ids)))))

    def run() -> Tensor:
        block._moekern_probe = probe  # type: ignore[assignment]
        probe.logits = logits
        return watched_experts(block, hidden, ids, gates)

    return run

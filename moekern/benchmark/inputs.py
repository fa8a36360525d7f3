"""Layers of models people prune, and random inputs of their shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekern import kernels


class Layer(NamedTuple):
    """One MoE layer: experts, top-k, hidden and intermediate size, and how its router scores."""

    E: int
    K: int
    H: int
    I: int  # noqa: E741
    score: str


MODELS = {
    "mixtral-8x7b": Layer(8, 2, 4096, 14336, "softmax"),
    "qwen3-30b-a3b": Layer(128, 8, 2048, 768, "softmax"),
    "qwen3-235b-a22b": Layer(128, 8, 4096, 1536, "softmax"),
    "glm-4.5-air": Layer(128, 8, 4096, 1408, "sigmoid"),
    "gpt-oss-120b": Layer(128, 4, 2880, 2880, "softmax"),
    "deepseek-v3": Layer(256, 8, 7168, 2048, "sigmoid"),
    "kimi-k2": Layer(384, 8, 7168, 2048, "sigmoid"),
    "qwen3-next-80b-a3b": Layer(512, 10, 2048, 512, "softmax"),
}


class Routing(NamedTuple):
    """T tokens routed by random logits."""

    logits: Tensor  # [T, E] float32
    topk_idx: Tensor  # [T, K] int64
    topk_weight: Tensor  # [T, K] float32, of each token summing to 1
    order: Tensor  # [T * K] int64
    offsets: Tensor  # [E + 1] int64


def routing(T: int, layer: Layer, device: str, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(T, layer.E, generator=generator) * 3).to(device)
    weight, idx = logits.softmax(1).topk(layer.K, dim=1)
    order, offsets = kernels.sort_by_expert(idx, layer.E)
    return Routing(logits, idx, weight / weight.sum(1, keepdim=True), order, offsets)


def normal(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    """Standard normal numbers, drawn in blocks so that no float32 copy of them all is held."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(shape, device=device, dtype=dtype)
    for part in out.view(-1).split(1 << 22):
        part.copy_(torch.randn(len(part), device=device, generator=generator))
    return out

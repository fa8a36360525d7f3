"""One layer of experts on plain tensors, for what is fitted to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Layer:
    """n experts of m channels, H wide, on N tokens that each choose K; float32 numbers, weights rounded to `dtype`."""

    inputs_: Tensor  # [N, H]; features are computed in its type
    chosen: Tensor  # [N, K] int64
    gates: Tensor  # [N, K]
    gate: Tensor  # [n, m, H]
    up: Tensor  # [n, m, H]
    downs: Tensor  # [n, H, m]
    asked: list[tuple[int, int]] = field(default_factory=list)  # (expert, rows) of calls of features

    @property
    def count(self) -> int:
        return len(self.downs)

    @property
    def hidden(self) -> int:
        return self.downs.shape[1]

    @property
    def width(self) -> int:
        return self.downs.shape[2]

    def tokens(self, expert: int) -> Tensor:
        return (self.chosen == expert).any(1).nonzero().flatten()

    def gates_of(self, expert: int, tokens: Tensor) -> Tensor:
        return (self.gates[tokens] * (self.chosen[tokens] == expert)).sum(1)

    def features(self, expert: int, tokens: Tensor) -> Tensor:
        self.asked.append((expert, len(tokens)))
        rows = self.inputs_[tokens]
        features = inner(rows, self.gate[expert].to(rows), self.up[expert].to(rows))
        return (self.gates_of(expert, tokens)[:, None] * features).float()

    def down(self, expert: int) -> Tensor:
        return self.downs[expert].float()

    def set_down(self, expert: int, weight: Tensor) -> Tensor:
        self.downs[expert] = weight
        return self.down(expert)

    def output(self) -> Tensor:
        """[N, H] float64."""
        out = torch.zeros(len(self.inputs_), self.hidden, dtype=torch.float64)
        for expert in range(self.count):
            tokens = self.tokens(expert)
            if len(tokens):
                out[tokens] += self.features(expert, tokens).double() @ self.down(expert).double().T
        self.asked.clear()
        return out

    def inputs(self, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs_[tokens], self.gates_of(expert, tokens)

    def trainable(self, expert: int) -> Trained:
        return Trained([w[expert].float().clone().requires_grad_() for w in (self.gate, self.up, self.downs)])

    def store(self, expert: int, trained: Trained) -> None:
        with torch.no_grad():
            for weights, parameter in zip((self.gate, self.up, self.downs), trained.parameters, strict=True):
                weights[expert] = parameter
                parameter.copy_(weights[expert])


@dataclass
class Trained:
    """An expert of it in float32."""

    parameters: Sequence[Tensor]

    def forward(self, rows: Tensor, gates: Tensor) -> Tensor:
        gate, up, down = self.parameters
        return (gates[:, None] * inner(rows, gate, up)) @ down.T


def inner(rows: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)


def layer_of(
    tokens: int = 300,
    experts: int = 4,
    width: int = 6,
    hidden: int = 10,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rank: int | None = None,
) -> Layer:
    """A random layer; with `rank` its inputs lie near that many directions."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    inputs = normal(tokens, hidden) if rank is None else normal(tokens, rank) @ normal(rank, hidden) / rank**0.5
    logits = normal(tokens, experts) + inputs @ normal(hidden, experts) / hidden**0.5
    gates, chosen = logits.softmax(1).topk(top_k)
    gate, up, down = normal(experts, width, hidden), normal(experts, width, hidden), normal(experts, hidden, width)
    weights = [w.div(w.shape[2] ** 0.5).to(dtype) for w in (gate, up, down)]
    return Layer(inputs, chosen, gates / gates.sum(1, keepdim=True), *weights)

"""The entropy of what routers choose from, made smaller together with the loss (SEER-MoE, arXiv:2404.05089).

Of the paper it is known that the gate is tuned with an entropy term while the experts that a token chooses become
fewer. Reconstructed: H = -sum p log p over softmax of the router's logits, its mean over tokens and layers times a
weight, which is added to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.model.expert_lists import blocks_with_lists
from moekern.model.layerwise import LayerwiseModel
from moekern.model.transformers_api import router_modules


def check_entropy(layerwise: LayerwiseModel) -> None:
    """Raise InputError, naming --entropy, for a model whose routers' logits are not known."""
    family = layerwise.layout.family
    if family.score == "identity":
        raise InputError(f"--entropy: {family.name}: its routers put out scores, and no logits that could be measured")
    if any(True for _ in blocks_with_lists(layerwise.model)):
        raise InputError(f"--entropy: {family.name}: its own code does not say which output of a router are its logits")
    if not layers_with_routers(layerwise):
        raise InputError(f"--entropy: {family.name}: no router that puts out logits was found")


def layers_with_routers(layerwise: LayerwiseModel) -> list[int]:
    return [i for i, layer in enumerate(layerwise.layers) if router_modules(layer, layerwise.model)]


@dataclass
class Entropy:
    """weight times the mean over `tokens` and the decoder layers with routers from the `first` on that something trains
    in: those before it are as they are. sum: of what was met, over both."""

    layerwise: LayerwiseModel
    weight: float
    tokens: int
    first: int = 0
    sum: float = 0.0
    seen: list[Tensor] = field(default_factory=list)  # logits [T, E] of the layer that runs, of each of its routers
    layers: int = field(init=False)

    def __post_init__(self) -> None:
        self.layers = max(1, sum(i >= self.first for i in layers_with_routers(self.layerwise)))

    @contextmanager
    def watching(self, i: int) -> Iterator[None]:
        """Look at the routers of decoder layer i."""
        layer = self.layerwise.layers[i]
        with ExitStack() as stack:
            for name, index in router_modules(layer, self.layerwise.model).items():
                stack.callback(layer.get_submodule(name).register_forward_hook(self._keep(index)).remove)
            yield

    def _keep(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            logits = output[index] if isinstance(output, tuple) else output
            if not any(logits is other for other in self.seen):  # a block may hand on what its router put out
                self.seen.append(logits)

        return hook

    def term(self) -> Tensor | None:
        """What is added to the loss for the task that has just run through a layer; None where no router has run."""
        if not self.seen:
            return None
        with torch.enable_grad():
            found = torch.stack([entropy(logits).sum() for logits in self.seen]).mean()
            self.seen.clear()
            self.sum += float(found.detach())
            return found * (self.weight / self.layers / self.tokens)

    @property
    def mean(self) -> float:
        """Over tokens and layers, in nats."""
        return self.sum / self.layers / self.tokens


def entropy(logits: Tensor) -> Tensor:
    """Of softmax(logits [..., E]) in nats, float32; a logit of -inf has no part in it."""
    logp = logits.float().log_softmax(-1)
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0)).sum(-1)

"""In which way a parameter trains: itself, by a factor for each expert, or by a product of two thin matrices.

Each form has float32 values of its own. `made` is the parameter that they make, `gradients` are those by its values, of
G, the gradient by the parameter: a form adds nothing to the model, whose forward pass is always its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Values = Mapping[str, Tensor]  # by the part's name


class Form(Protocol):
    """`based`: what it makes depends on the parameter as the checkpoint has it, beyond what it begins with."""

    @property
    def based(self) -> bool: ...

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Of its values, for a parameter of this shape."""
        ...

    def begun(self, base: Tensor, seed: int) -> dict[str, Tensor]:
        """The values that make the parameter what it is."""
        ...

    def made(self, base: Tensor, values: Values) -> Tensor:
        """The parameter, float32."""
        ...

    def gradients(self, base: Tensor, values: Values, G: Tensor) -> dict[str, Tensor]:
        """By its values; G is float32, of the parameter's shape."""
        ...


@dataclass(frozen=True)
class Direct:
    """The parameter itself."""

    based: ClassVar[bool] = False

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {"": tuple(shape)}

    def begun(self, base: Tensor, seed: int) -> dict[str, Tensor]:
        return {"": base.float()}

    def made(self, base: Tensor, values: Values) -> Tensor:
        return values[""]

    def gradients(self, base: Tensor, values: Values, G: Tensor) -> dict[str, Tensor]:
        return {"": G}


@dataclass(frozen=True)
class Scale:
    """A factor for each of E experts, whose rows follow one another along the first axis."""

    experts: int
    based: ClassVar[bool] = True

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {"scale": (self.experts,)}

    def begun(self, base: Tensor, seed: int) -> dict[str, Tensor]:
        return {"scale": torch.ones(self.experts)}

    def made(self, base: Tensor, values: Values) -> Tensor:
        scaled = base.float().view(self.experts, -1) * values["scale"][:, None].to(base.device)
        return scaled.view(base.shape)

    def gradients(self, base: Tensor, values: Values, G: Tensor) -> dict[str, Tensor]:
        own = base.view(self.experts, -1)
        pairs = zip(own, G.view(self.experts, -1), strict=True)
        return {"scale": torch.stack([(mine.float() * theirs).sum() for mine, theirs in pairs])}


@dataclass(frozen=True)
class Lora:
    """alpha / rank times B A is added, A [..., rank, in] and B [..., out, rank], zeros at first (arXiv:2106.09685)."""

    rank: int
    alpha: float
    based: ClassVar[bool] = True

    @property
    def factor(self) -> float:
        return self.alpha / self.rank

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        *stack, rows, columns = shape
        return {"lora_A": (*stack, self.rank, columns), "lora_B": (*stack, rows, self.rank)}

    def begun(self, base: Tensor, seed: int) -> dict[str, Tensor]:
        shapes, bound = self.shapes(base.shape), 1 / sqrt(base.shape[-1])
        drawn = torch.rand(prod(shapes["lora_A"]), generator=torch.Generator().manual_seed(seed))
        return {"lora_A": ((2 * drawn - 1) * bound).view(shapes["lora_A"]), "lora_B": torch.zeros(shapes["lora_B"])}

    def made(self, base: Tensor, values: Values) -> Tensor:
        A, B = (values[name].to(base.device) for name in ("lora_A", "lora_B"))
        return base.float() + self.factor * (B @ A)

    def gradients(self, base: Tensor, values: Values, G: Tensor) -> dict[str, Tensor]:
        A, B = (values[name].to(G.device) for name in ("lora_A", "lora_B"))
        return {"lora_A": self.factor * (B.mT @ G), "lora_B": self.factor * (G @ A.mT)}

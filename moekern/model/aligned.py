"""Which matrices torch's grouped product takes: those whose rows are whole 16 bytes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel

ROW = 16  # bytes


def aligned(numbers: int, of: Tensor) -> bool:
    """Whether rows of so many numbers, of the type of a tensor, are taken."""
    return numbers * of.element_size() % ROW == 0


def eager_where_odd(model: PreTrainedModel, blocks: Iterable[nn.Module]) -> PreTrainedModel:
    """The model, whose experts transformers runs by its own loop where a stack [E, R, C] of theirs is not taken."""
    stacks = (value for block in blocks for value in block.parameters(recurse=False) if value.ndim == 3)
    if not all(aligned(size, value) for value in stacks for size in value.shape[1:]):
        model.set_experts_implementation("eager")
    return model

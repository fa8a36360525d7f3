"""MoE blocks whose experts are modules of their own, one after another in a list, as in code that comes with models."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

LIST = "experts"
NO_GRADIENT = "its experts are in a list, one module each"
ROUTER = re.compile(r"gate|router")


def expert_modules(block: nn.Module) -> nn.ModuleList | None:
    """The experts of a MoE block; None where the module is no such block.

    Such a block has a list of that name, and beside it one part, the router, with a matrix of a row for each expert.
    """
    experts = block._modules.get(LIST)
    if not isinstance(experts, nn.ModuleList) or len(experts) < 2 or not _routers(block, len(experts)):
        return None
    return experts if all(next(expert.parameters(), None) is not None for expert in experts) else None


def list_router(block: nn.Module) -> str:
    """The name, within such a block, of its router."""
    experts = expert_modules(block)
    assert experts is not None
    return _routers(block, len(experts))[0]


def blocks_with_lists(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of such blocks within `part`."""
    return ((name, module) for name, module in part.named_modules() if expert_modules(module) is not None)


def _routers(block: nn.Module, experts: int) -> list[str]:
    """The parts that may be the router: the one with its name where there are several, none where that leaves more."""
    found = [
        name
        for name, part in block.named_children()
        if name != LIST and any(p.ndim == 2 and len(p) == experts for p in part.parameters())
    ]
    named = [name for name in found if ROUTER.search(name)]
    return named if len(named) == 1 else found if len(found) == 1 else []

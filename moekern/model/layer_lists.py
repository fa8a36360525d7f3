"""Where a model keeps its decoder layers, and which of its modules are experts."""

from __future__ import annotations

import re

from torch import nn


def is_experts_module(module: nn.Module) -> bool:
    """Whether the module calls the function registered in ALL_EXPERTS_FUNCTIONS."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def layer_index(layers_name: str, model_key: str | None) -> int | None:
    """Which decoder layer a model key lies in; None for the skeleton and for keys the model does not know."""
    match = re.match(re.escape(layers_name) + r"\.(\d+)\.", model_key or "")
    return int(match[1]) if match else None


def module_list(model: nn.Module, name: str) -> nn.ModuleList:
    """The list of modules of this name."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.ModuleList):
        raise TypeError(f"{name} is a {type(module).__name__}, not a list of decoder layers")
    return module


def outermost_list(model: nn.Module, name: str) -> str | None:
    """The name of the first list of modules on the way to this one."""
    prefixes = (".".join(parts[:n]) for parts in [name.split(".")] for n in range(1, len(parts)))
    return next((p for p in prefixes if isinstance(model.get_submodule(p), nn.ModuleList)), None)

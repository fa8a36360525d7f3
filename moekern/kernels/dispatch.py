"""Which backend serves which op on which device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch

OPS = (
    "router_stats", "combine_and_measure", "sort_by_expert", "similarity", "sketch", "vocabulary", "popcount",
    "pair_popcount", "weight_stats", "dequantize", "grouped_mlp",
)  # fmt: skip
BACKENDS = ("native", "grouped_mm", "triton", "reference")  # modules beside this one
# Every backend that may serve a device, the default first. On a CPU Triton only runs in its interpreter.
PREFERENCE = {
    "cpu": ("native", "grouped_mm", "reference", "triton"),
    "cuda": ("native", "grouped_mm", "triton", "reference"),
}
# What a backend cannot do yet on a device: this table only shrinks. grouped_mm is a road for grouped_mlp alone.
NOT_IN_TRITON = frozenset(OPS) - {"router_stats", "combine_and_measure", "sort_by_expert", "grouped_mlp"}
ONLY_MLP = frozenset(OPS) - {"grouped_mlp"}
MISSING = {
    ("native", "cpu"): frozenset({"grouped_mlp"}),
    ("native", "cuda"): frozenset({"grouped_mlp"}),
    ("grouped_mm", "cpu"): ONLY_MLP,
    ("grouped_mm", "cuda"): ONLY_MLP,
    ("triton", "cpu"): NOT_IN_TRITON,
    ("triton", "cuda"): NOT_IN_TRITON,
}


def backend_for(op: str, device: str, backend: str | None = None) -> str:
    """The named backend, or the device's first that has the op. A named backend never falls back."""
    for name in [backend] if backend else PREFERENCE.get(device, ()):
        if serves(name, op, device):
            return name
    have = [name for name in BACKENDS if serves(name, op, device)]
    raise NotImplementedError(f"[{op}] backend: expected one of {have} on {device}, got {backend}")


def available() -> dict[str, dict[str, tuple[str, ...]]]:
    """Op -> device -> the backends that serve it here, the default first."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {op: {device: tuple(b for b in PREFERENCE[device] if serves(b, op, device)) for device in devices}
            for op in OPS}  # fmt: skip


def serves(backend: str, op: str, device: str) -> bool:
    if backend not in PREFERENCE.get(device, ()) or op in MISSING.get((backend, device), ()):
        return False
    module = backend_module(backend)
    return module is not None and hasattr(module, op) and module.runs_on(device)


@cache
def backend_module(backend: str) -> ModuleType | None:
    """A backend is imported when it is first asked for; None where Triton is not installed."""
    try:
        return import_module(f"moekern.kernels.{backend}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None


def implementation(backend: str, op: str) -> Callable[..., Any]:
    """The op's function in a backend that backend_for has named."""
    module = backend_module(backend)
    assert module is not None
    return cast("Callable[..., Any]", getattr(module, op))

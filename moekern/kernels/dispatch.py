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
    "pair_popcount", "weight_stats", "dequantize", "grouped_mlp", "expert_gram", "gated_energy", "scatter_residual",
    "mixture_stats",
)  # fmt: skip
BACKENDS = ("native", "grouped_mm", "triton", "reference")  # modules beside this one
# Every backend that may serve a device, the default first. On a CPU Triton only runs in its interpreter.
PREFERENCE = {
    "cpu": ("native", "grouped_mm", "reference", "triton"),
    "cuda": ("native", "grouped_mm", "triton", "reference"),
}
# What a backend cannot do yet on a device: this table only shrinks. grouped_mm is a road for grouped_mlp alone.
NOT_IN_TRITON = frozenset({
    "similarity", "sketch", "vocabulary", "popcount", "pair_popcount", "weight_stats", "dequantize",
})  # fmt: skip
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
    """The named backend, or the device's first that has the op. A named backend never falls back.

    `device` is a torch device's type. Raises NotImplementedError, in one line with the reason for each that was asked.
    """
    reasons: dict[str, str] = {}
    for name in [backend] if backend else PREFERENCE.get(device, BACKENDS):
        why = obstacle(name, op, device)
        if why is None:
            return name
        reasons[name] = why
    have = [name for name in BACKENDS if serves(name, op, device)]
    said = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    raise NotImplementedError(f"[{op}] backend: expected one of {have} on {device}, got {backend} ({said})")


def available() -> dict[str, dict[str, tuple[str, ...]]]:
    """Op -> device -> the backends that serve it here, the default first."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {op: {device: tuple(b for b in PREFERENCE[device] if serves(b, op, device)) for device in devices}
            for op in OPS}  # fmt: skip


def serves(backend: str, op: str, device: str) -> bool:
    """Whether the backend has the op on a device of this type, here and now."""
    return obstacle(backend, op, device) is None


def obstacle(backend: str, op: str, device: str) -> str | None:
    """Why the backend does not serve the op on a device of this type; None where it does."""
    if backend not in BACKENDS:
        return "no such backend"
    if backend not in PREFERENCE.get(device, ()):
        return f"does not run on {device}"
    if op in MISSING.get((backend, device), ()):
        return "lacks the op"
    module = backend_module(backend)
    if isinstance(module, str):
        return module
    return module.obstacle(device) if hasattr(module, op) else "lacks the op"


@cache
def backend_module(backend: str) -> ModuleType | str:
    """A backend is imported when it is first asked for; where Triton is not installed, what the import has to say."""
    try:
        return import_module(f"moekern.kernels.{backend}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return f"Triton is not installed: {error}"


def implementation(backend: str, op: str) -> Callable[..., Any]:
    """The op's function in a backend that backend_for has named."""
    module = backend_module(backend)
    assert not isinstance(module, str)
    return cast("Callable[..., Any]", getattr(module, op))

"""Where and in what type layers are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError


@dataclass(frozen=True)
class Compute:
    """Where and in what type layers are computed."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    backend: str | None = None
    trust_remote_code: bool = False


def dtype_hint(checkpoint: Checkpoint, device: str, dtype: str | None) -> str | None:
    """bfloat16 products are emulated on CPUs without AVX-512: what is faster there, in a sentence."""
    config = checkpoint.config
    names = {
        section.get(key) for section in (config, config.get("text_config") or {}) for key in ("dtype", "torch_dtype")
    }
    slow = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    if dtype is None and device == "cpu" and slow and "bfloat16" in names:
        return "this CPU computes bfloat16 slowly: --dtype float32 is several times faster for twice the memory"
    return None


def check_device(device: str) -> None:
    """Raise InputError for a device torch does not know or does not have."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: not usable here ({reason})") from error

"""Where and in what type layers are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError, first_line

FEW = 32  # tokens


@dataclass(frozen=True)
class Compute:
    """Where, in what type and by which kernels layers are computed, from the command line to the core."""

    device: str = "cpu"
    dtype: str | torch.dtype | None = None  # a name such as "float32", or torch's; None: the checkpoint's
    backend: str | None = None  # of kernels; None: the best
    trust_remote_code: bool = False

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Raises InputError for a name that is none of torch's types."""
        if not isinstance(self.dtype, str):
            return self.dtype
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise InputError(f"--dtype {self.dtype}: no such type; expected a name such as float32 or bfloat16")
        return found

    @property
    def dtype_name(self) -> str | None:
        """As artefacts name it."""
        return None if self.dtype is None else str(self.dtype).removeprefix("torch.")


def dtype_hint(checkpoint: Checkpoint, compute: Compute) -> str | None:
    """bfloat16 products are emulated on CPUs without AVX-512: what is faster there, in a sentence."""
    config = checkpoint.config
    names = [
        section.get(key) for section in (config, config.get("text_config") or {}) for key in ("dtype", "torch_dtype")
    ]
    slow = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    if compute.dtype is None and compute.device == "cpu" and slow and "bfloat16" in names:
        return "this CPU computes bfloat16 slowly: --dtype float32 is several times faster for twice the memory"
    return None


def check_device(device: str) -> None:
    """Raise InputError for a device torch does not know or does not have."""
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each of torch's devices raises its own
        raise InputError(f"--device {device}: not usable here ({first_line(error)})") from error
    if torch.device(device).type == "meta":
        raise InputError(f"--device {device}: holds no numbers")


@contextmanager
def few_tokens(tokens: int, device: torch.device) -> Iterator[None]:
    """Compute with one thread while the context is open, where a CPU is given fewer tokens than FEW.

    With several threads a matrix product of so few rows is divided otherwise, and rounds otherwise.
    """
    threads = torch.get_num_threads()
    if tokens >= FEW or device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

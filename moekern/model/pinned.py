"""Memory of the host that a GPU copies from and to by itself, while the host goes on."""

from __future__ import annotations

import torch
from torch import Tensor

PORTABLE = 1  # pinned for every CUDA context


def pin(memory: Tensor) -> None:
    """Pin the whole pages that a uint8 tensor lies in. Raises torch's error where the system refuses."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))


def unpin(address: int) -> None:
    """Give up what was pinned at this address; nothing may be under way from or to it."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))

"""Float32 numbers that are changed in place: in memory, or in a file that the system pages."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.files import reserve


def paged_zeros(path: Path, shape: Sequence[int], what: str) -> Tensor:
    """Zeros in a new file, float32. Raises InputError where the disk has no room for `what`."""
    n = prod(shape)
    try:
        with open(path, "wb") as file:  # with its blocks: a page that found none would end the process
            reserve(file.fileno(), 4 * n)
    except OSError as error:
        raise InputError(f"{path.parent}: no room for {what} beyond --memory: {error.strerror}") from error
    return torch.from_file(str(path), shared=True, size=n, dtype=torch.float32).view(*shape)

"""What training leaves, of chosen bytes: a folder with the tensors that take the places of a pruned checkpoint's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.helpers.refitted import finite
from tests.helpers.synthetic import Tensors, data, read, shard_bytes

RECORD = {"trained": ["router"], "recipe": {"steps": 10}}


def train(pruned: Path, folder: Path, *parts: str, seed: int = 3, files: int = 1) -> Tensors:
    """Write other bytes for what has one of `parts` in its name, dealt out to so many files; these tensors."""
    rng = np.random.default_rng(seed)
    new = {
        name: finite(data(rng, dtype, shape))
        for name, (dtype, shape, _) in read(pruned).items()
        if any(part in name for part in parts)
    }
    folder.mkdir(exist_ok=True)
    for number in range(files):
        some = {name: new[name] for name in list(new)[number::files]}
        (folder / f"{number}.safetensors").write_bytes(shard_bytes(some))
    return new

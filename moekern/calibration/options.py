"""Which tokens go through the model, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moekern.calibration.calibrate import REPLAY_TOKENS
from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import TokenData
from moekern.data.read import read_data


@dataclass(frozen=True)
class Calibration:
    """The options that say which tokens go through the model, and how."""

    data: tuple[str, ...]
    tokens: int | None = None
    sequence_length: int = 2048
    batch_size: int = 1
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    tiers: tuple[str, ...] = ("dimensions",)
    backend: str | None = None
    trust_remote_code: bool = False
    replay_tokens: int = REPLAY_TOKENS
    spill: Path | None = None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, self.dtype)


def read_tokens(checkpoint: Checkpoint, options: Calibration) -> TokenData:
    """The token batches that the options name."""
    config = checkpoint.config
    nested = config.get("text_config")
    vocab = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    return read_data(
        options.data,
        checkpoint.folder,
        vocab_size=vocab if isinstance(vocab, int) else None,
        tokens=options.tokens,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )

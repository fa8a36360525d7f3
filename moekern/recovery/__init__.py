"""Training what a pruned model has left, a decoder layer in memory."""

from moekern.recovery.recover import Recovery, recover
from moekern.recovery.settings import Training

__all__ = ["Recovery", "Training", "recover"]

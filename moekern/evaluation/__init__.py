"""What plans cost, on text that was held out."""

from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL, Evaluation, Loss

__all__ = ["Evaluation", "Loss", "ORIGINAL", "evaluate"]

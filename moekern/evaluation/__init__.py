"""What plans cost, on text that was held out."""

from moekern.evaluation.losses import ORIGINAL, Evaluation, Loss, evaluate

__all__ = ["Evaluation", "Loss", "ORIGINAL", "evaluate"]

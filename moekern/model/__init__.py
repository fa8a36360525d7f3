"""One decoder layer at a time: the model's own forward pass, suspended at every decoder layer."""

from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.suspended import run_suspended

__all__ = ["LayerwiseModel", "open_layerwise", "run_suspended"]

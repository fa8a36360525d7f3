"""One decoder layer at a time: the model's own forward pass, suspended at every decoder layer."""

from moekern.decoder.layerwise import LayerwiseModel, open_layerwise
from moekern.decoder.suspended import run_suspended

__all__ = ["LayerwiseModel", "open_layerwise", "run_suspended"]

"""One decoder layer at a time: the model's own forward pass, from the door of each decoder layer to the next."""

from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.walk import walk

__all__ = ["LayerwiseModel", "open_layerwise", "walk"]

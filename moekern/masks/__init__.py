"""Which experts stay, chosen by gradient steps through the whole model, a decoder layer in memory."""

from moekern.masks.optimise import Optimised, optimise
from moekern.masks.settings import Search

__all__ = ["Optimised", "Search", "optimise"]

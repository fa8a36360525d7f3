"""A smaller checkpoint by copying byte ranges. Needs no torch."""

from moekern.pruning.cuts import MTP_MODES, Mtp
from moekern.pruning.prune import PruneReport, prune

__all__ = ["MTP_MODES", "Mtp", "PruneReport", "prune"]

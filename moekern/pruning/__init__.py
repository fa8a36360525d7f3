"""A smaller checkpoint by copying byte ranges. Needs no torch."""

from moekern.plan.document import MTP_MODES, Mtp
from moekern.pruning.prune import PruneReport, prune

__all__ = ["MTP_MODES", "Mtp", "PruneReport", "prune"]

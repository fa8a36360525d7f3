"""What calibration measures: sums per layer, domain and expert. Batches, domains and machines merge by adding."""

from moekern.statistics.file import Statistics, merge
from moekern.statistics.header import Source, make_header
from moekern.statistics.layer import TIERS, LayerStatistics

__all__ = ["LayerStatistics", "Source", "Statistics", "TIERS", "make_header", "merge"]

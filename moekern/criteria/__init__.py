"""Every criterion by name. A score is a function of statistics; a selector chooses the kept set as a whole."""

from moekern.criteria.named import criterion_named, score_layer
from moekern.criteria.selectors import Selection
from moekern.criteria.table import CRITERIA, Criterion

__all__ = ["CRITERIA", "Criterion", "Selection", "criterion_named", "score_layer"]

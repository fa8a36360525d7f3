"""Every criterion by name. A score is a function of statistics; a selector chooses the kept set as a whole.

The table is here without torch; what computes is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moekern.criteria.table import CRITERIA, Criterion

if TYPE_CHECKING:
    from moekern.criteria.named import criterion_named as criterion_named
    from moekern.criteria.named import score_layer as score_layer
    from moekern.criteria.selectors import Selection as Selection

HOMES = {"criterion_named": "named", "score_layer": "named", "Selection": "selectors"}

__all__ = ["CRITERIA", "Criterion", "Selection", "criterion_named", "score_layer"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'moekern.criteria' has no attribute {name!r}")
    return getattr(import_module(f"moekern.criteria.{HOMES[name]}"), name)

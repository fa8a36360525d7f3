"""Which experts stay: the plan document, what a router can work with and the choice by scores. Needs no torch."""

from moekern.plan.choose import TIE, check_protected, choose_top, super_experts
from moekern.plan.document import FORMAT, NONUNIFORM, LayerPlan, Plan
from moekern.plan.fits_model import check_plan
from moekern.router import Router, check_keep, count_problem, kept_count, parse_keep

__all__ = [
    "FORMAT",
    "LayerPlan",
    "NONUNIFORM",
    "Plan",
    "Router",
    "TIE",
    "check_keep",
    "check_plan",
    "check_protected",
    "choose_top",
    "count_problem",
    "kept_count",
    "parse_keep",
    "super_experts",
]

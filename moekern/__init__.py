"""Prune experts from Mixture-of-Experts language models of any size on one machine.

    from moekern import calibrate, make_plan, prune, read_data, verify

    data = read_data(["code=src", "prose=book.txt"], "Qwen3-30B-A3B", tokens=500_000)
    statistics = calibrate("Qwen3-30B-A3B", data)
    plan = make_plan(statistics, "gated_norm", keep=0.5)
    prune("Qwen3-30B-A3B", plan, "Qwen3-30B-A3B-pruned")
    assert not verify("Qwen3-30B-A3B", plan, "Qwen3-30B-A3B-pruned").problems

Names are imported on first use, so that `moekern.kernels` or a plan can be used without loading transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moekern.version import __version__ as __version__

if TYPE_CHECKING:
    from moekern.calibration.calibrate import calibrate as calibrate
    from moekern.calibration.observe import observe as observe
    from moekern.checkpoint.folder import Checkpoint as Checkpoint
    from moekern.checkpoint.folder import open_checkpoint as open_checkpoint
    from moekern.criteria import CRITERIA as CRITERIA
    from moekern.data.read import read_data as read_data
    from moekern.data.text import Text as Text
    from moekern.errors import InputError as InputError
    from moekern.evaluation.evaluate import evaluate as evaluate
    from moekern.judging.live import masked as masked
    from moekern.judging.live import steered as steered
    from moekern.model.compute import Compute as Compute
    from moekern.plan.budgets import Budget as Budget
    from moekern.plan.contrast import Contrast as Contrast
    from moekern.plan.document import Plan as Plan
    from moekern.plan.guards import Guards as Guards
    from moekern.plan.make import make_plan as make_plan
    from moekern.plan.scores import Scores as Scores
    from moekern.plan.scores import score as score
    from moekern.pruning.prune import prune as prune
    from moekern.statistics.file import Statistics as Statistics
    from moekern.statistics.file import merge as merge
    from moekern.statistics.layer import LayerStatistics as LayerStatistics
    from moekern.verification.logits import compare_forward as compare_forward
    from moekern.verification.tensors import verify as verify

HOMES = {
    "Budget": "plan.budgets",
    "CRITERIA": "criteria",
    "Checkpoint": "checkpoint.folder",
    "Compute": "model.compute",
    "Contrast": "plan.contrast",
    "Guards": "plan.guards",
    "InputError": "errors",
    "LayerStatistics": "statistics.layer",
    "Plan": "plan.document",
    "Scores": "plan.scores",
    "Statistics": "statistics.file",
    "Text": "data.text",
    "calibrate": "calibration.calibrate",
    "compare_forward": "verification.logits",
    "evaluate": "evaluation.evaluate",
    "make_plan": "plan.make",
    "masked": "judging.live",
    "merge": "statistics.file",
    "observe": "calibration.observe",
    "open_checkpoint": "checkpoint.folder",
    "prune": "pruning.prune",
    "read_data": "data.read",
    "score": "plan.scores",
    "steered": "judging.live",
    "verify": "verification.tensors",
}

__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'moekern' has no attribute {name!r}")
    value = getattr(import_module(f"moekern.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})

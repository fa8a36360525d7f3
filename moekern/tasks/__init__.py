"""Tasks of lm-evaluation-harness, asked of a model and of plans."""

from moekern.tasks.scores import task_scores
from moekern.tasks.settings import Asked, Score

__all__ = ["Asked", "Score", "task_scores"]

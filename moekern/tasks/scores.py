"""Scores of a model and of plans at tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from moekern.architectures import find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.text import config_number
from moekern.data.tokenizer import Tokenizer
from moekern.errors import InputError, check_type
from moekern.evaluation.losses import ORIGINAL
from moekern.evaluation.under_plans import all_pruned, check_plans
from moekern.model.compute import Compute
from moekern.model.journal import Resume
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.precision import settled
from moekern.plan.document import Plan
from moekern.recovery.loaded import all_staying
from moekern.tasks import harness
from moekern.tasks.harness import Tasks
from moekern.tasks.questions import answers
from moekern.tasks.settings import Asked, Score

LONGEST = 2048  # ids that a model takes, where its config does not say


def task_scores(
    source: str | Path | Checkpoint,
    plans: Mapping[str, Plan],
    asked: Asked,
    compute: Compute = Compute(),
    *,
    resume: Resume | None = None,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> tuple[Score, ...]:
    """Of the original, and of every plan with the bits of the checkpoint that it makes.

    All questions about given answers are put in one pass over the weights, whatever memory there is. Answers that are
    written token by token need all layers in memory, and one process. Raises InputError for a harness that is not
    installed and for tasks that cannot be made; see `harness.opened`.
    """
    check_type("plans", plans, Mapping)
    check_type("asked", asked, Asked)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    check_plans(plans, layout, checkpoint)
    with harness.opened(asked, tell) as tasks:
        return _scored(tasks, checkpoint, plans, settled(compute, checkpoint, layout), resume, tell, progress)


def _scored(
    tasks: Tasks,
    checkpoint: Checkpoint,
    plans: Mapping[str, Plan],
    compute: Compute,
    resume: Resume | None,
    tell: Callable[[str], None],
    progress: Callable[[float, int], None],
) -> tuple[Score, ...]:
    every = tasks.asked.shots or (None,)
    tokenizer = Tokenizer(checkpoint.folder, compute.trust_remote_code)
    with closing(tokenizer), ExitStack() as stack:
        longest = config_number(checkpoint, "max_position_embeddings") or LONGEST
        book = harness.book(tokenizer, longest)
        for shots in every:
            tasks.questions(shots, book)
        if book.cut:
            tell(f"{len(book.cut)} of {len(book.asked)} questions are longer than {longest} tokens: cut at the front")
        found = answers(checkpoint, book.asked, plans, compute, resume=resume, progress=progress) if book.asked else {}
        wanted, scores = tuple(book.wanted), list[Score]()
        layerwise = stack.enter_context(_all_layers(checkpoint, compute)) if wanted else None
        for name, plan in {ORIGINAL: None, **plans}.items():
            book.answers = found.get(name, {})
            if layerwise is not None:
                with nullcontext() if plan is None else all_pruned(layerwise, plan):
                    book.texts = harness.written(layerwise.model, tokenizer.get(), longest, wanted)
            for shots in every:
                scores += tasks.scores(shots, book, name)
    return tuple(scores)


@contextmanager
def _all_layers(checkpoint: Checkpoint, compute: Compute) -> Iterator[LayerwiseModel]:
    """The model with all its layers in memory, which are read once for all models that write."""
    what = "a task has answers written, token by token"
    if compute.team.size > 1:
        raise InputError(f"--tasks: {what}, which one process does: start it without torchrun")
    with open_layerwise(checkpoint, find_layout(checkpoint), compute) as opened:
        layerwise = all_staying(opened, what)
        for _ in layerwise.visit(range(len(layerwise.layers))):
            pass
        yield layerwise


def named(scores: tuple[Score, ...], model: str) -> tuple[Score, ...]:
    """The same with a model's name in the place of "original"."""
    return tuple(replace(score, model=model) if score.model == ORIGINAL else score for score in scores)

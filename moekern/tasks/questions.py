"""What tasks ask of a model as token ids, answered of the original and of plans in one pass over the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern.architectures import find_layout
from moekern.calibration.sharing import facts_of
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import CHUNK_TOKENS, Batch, TokenData
from moekern.data.text import check_data
from moekern.errors import InputError
from moekern.evaluation.losses import ORIGINAL
from moekern.evaluation.under_plans import Task, UnderPlans, check_plans
from moekern.model.compute import Compute
from moekern.model.finite import NotFinite
from moekern.model.journal import Resume, opened
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.position import digest, text_key
from moekern.model.precision import settled
from moekern.model.state_folder import removed
from moekern.plan.document import Plan
from moekern.version import versions

STATE, ANSWERING = "moekern-tasks-", "answering"  # the folder of a run that is not done, with a digest; its stage
Answer = tuple[float, bool]  # the sum of log probabilities, in nats; whether each token was the likeliest


@dataclass(frozen=True)
class Question:
    """How likely do the last `scored` of some token ids follow the others? One id at least stands before them."""

    ids: tuple[int, ...]
    scored: int

    @property
    def given(self) -> tuple[int, ...]:
        """What goes through the model: the last id is only predicted."""
        return self.ids[:-1]


Rows = tuple[tuple[tuple[Question, ...], ...], ...]  # of each batch, of each of its sequences: what is asked of it


def arranged(questions: Iterable[Question]) -> tuple[TokenData, Rows]:
    """Sequences that questions share, the longest first, in batches of one length and up to CHUNK_TOKENS tokens."""
    asked: dict[tuple[int, ...], list[Question]] = {}
    for question in dict.fromkeys(questions):
        asked.setdefault(question.given, []).append(question)
    batches, rows = list[Batch](), list[tuple[tuple[Question, ...], ...]]()
    for length, group in groupby(sorted(asked, key=lambda ids: (-len(ids), ids)), len):
        some, size = list(group), max(1, CHUNK_TOKENS // length)
        for start in range(0, len(some), size):
            part = some[start : start + size]
            batches.append(Batch("tasks", torch.tensor(part)))
            rows.append(tuple(tuple(asked[ids]) for ids in part))
    return TokenData(tuple(batches), {"tasks": len(asked)}), tuple(rows)


def answers(
    source: str | Path | Checkpoint,
    questions: Iterable[Question],
    plans: Mapping[str, Plan],
    compute: Compute = Compute(),
    *,
    resume: Resume | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> dict[str, dict[Question, Answer]]:
    """Plan name (or "original") -> question -> answer, by the bits of the checkpoint that the plan makes.

    A sequence that several questions share is computed once. With `resume` the same call goes on where it was stopped.
    Several processes (`compute.team`) share the sequences, and rank 0 has the answers.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    questions = tuple(dict.fromkeys(questions))
    data, rows = arranged(questions)
    check_data(data, checkpoint)
    layout = find_layout(checkpoint)
    check_plans(plans, layout, checkpoint)
    compute = settled(compute, checkpoint, layout)
    team = compute.team
    team.together(answers, checkpoint.folder, questions, plans, compute)
    team.check_alike(facts_of(checkpoint, compute))
    key = {
        "model": checkpoint.fingerprint,
        "config.json": checkpoint.config_sha256,
        "text": text_key(data),
        "questions": digest({"scored": [[[q.scored for q in row] for row in batch] for batch in rows]}),
        "plans": [(name, plan.digest) for name, plan in plans.items()],
        "--dtype": compute.dtype_name,
        "--device": compute.place.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    resume = None if resume is None else resume.keyed(STATE, key)
    with (
        opened(resume, key, (ANSWERING,), team) as journal,
        open_layerwise(checkpoint, layout, compute, team) as layerwise,
    ):
        stage = None if journal is None else journal.stage(ANSWERING)
        found = _Asking(layerwise, data.batches, plans, rows, progress).run(stage)
    if journal is not None and team.first:
        removed(journal.folder)
    return {
        name: {
            question: answer
            for place, batch in enumerate(rows if team.first else ())
            for question, answer in zip([q for row in batch for q in row], found[place, number], strict=True)
        }
        for number, name in enumerate((ORIGINAL, *plans))
    }


class _Asking(UnderPlans[list[Answer]]):
    """Answers of every batch under every plan, in the order of its questions."""

    def __init__(
        self,
        layerwise: LayerwiseModel,
        batches: Sequence[Batch],
        plans: Mapping[str, Plan],
        rows: Rows,
        progress: Callable[[float, int], None],
    ) -> None:
        super().__init__(layerwise, batches, plans, progress)
        self.rows = rows

    def written(self, found: list[Answer]) -> Any:
        return found

    def read(self, written: Any) -> list[Answer]:
        return [(float(p), bool(g)) for p, g in written]

    def forward(self, task: Task) -> None:
        logits = self.layerwise.compute(task.batch).logits
        pairs = zip(logits, self.rows[task.place], strict=True)
        found = [answered(row, question) for row, asked in pairs for question in asked]
        if any(p != p for p, _ in found):
            raise NotFinite(len(self.layerwise.layers))
        self.found[task.place, task.number] = found

    def name(self, task: Task) -> str:
        return "the original" if task.plan is None else f"plan {task.name}"


def answered(logits: Tensor, question: Question) -> Answer:
    """By the logits [S, V] of what it gives."""
    wanted = torch.tensor(question.ids[-question.scored :], device=logits.device)
    if logits.shape[-1] <= int(wanted.max()):
        raise InputError(f"its head predicts {logits.shape[-1]} classes, and a task asks for token {int(wanted.max())}")
    logp = logits[-question.scored :].float().log_softmax(-1)
    own = logp.gather(1, wanted[:, None])[:, 0]
    return float(own.double().sum()), bool((logp.argmax(1) == wanted).all())


def asked_of(context: Sequence[int], continuation: Sequence[int], most: int) -> Question:
    """The question of a context and what follows it, where a model takes `most` ids: the first ones go."""
    ids = (*context, *continuation)[-(most + 1) :]
    return Question(ids, min(len(continuation), len(ids) - 1))

"""What the original predicts of text that a model trains on: made by one pass over it, or left by an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moekern.architectures import find_layout
from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.model.compute import Compute
from moekern.model.journal import Resume, opened
from moekern.model.layerwise import open_layerwise
from moekern.model.position import digest, text_key
from moekern.model.state_folder import removed
from moekern.recovery.course import Sample
from moekern.recovery.settings import VOCABULARY
from moekern.recovery.teacher import Teacher, Teaching
from moekern.version import versions

TEACHING = "the original's predictions"
Progress = Callable[[str, float, int], None]  # what is being done, how much of it is done, of how much


def taught(
    original: Checkpoint,
    samples: Sequence[Sample],
    folder: Path,
    top: int | str,
    compute: Compute,
    classes: int,
    *,
    restart: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Teacher:
    """What the original predicts of some text, from a file in `folder`, which is made where it is not there.

    Raises InputError for an original whose vocabulary has not so many `classes`.
    """
    if compute.team.first:
        folder.mkdir(parents=True, exist_ok=True)
    team, batches = compute.team, [sample.batch for sample in samples]
    key = {
        "original": original.fingerprint,
        "config.json": original.config_sha256,
        "text": text_key(TokenData(tuple(batches), {})),
        "--top": top,
        "--dtype": compute.dtype_name,
        "--device": compute.place.type,
        "versions": versions(),
    }
    resume = Resume(folder / f"teaching-{digest(key)[:16]}", restart, tell)
    with open_layerwise(original, find_layout(original), compute, team) as layerwise:
        if layerwise.vocab_size != classes:
            what = f"its vocabulary has {layerwise.vocab_size} tokens, and that of the model that trains {classes}"
            raise InputError(f"--original {original.folder}: {what}; name the model that it was pruned from")
        path = folder / f"predictions-{digest(key)[:16]}.safetensors"
        teacher = Teacher(path, batches, None if top == VOCABULARY else int(top), classes)
        if team.broadcast(team.first and teacher.open(digest(key), anew=restart)):
            team.meet()
            teacher.open(digest(key))
            return teacher
        with opened(resume, key, (TEACHING,), team) as journal:
            team.meet()
            if not team.first:
                teacher.share()
            stage = None if journal is None else journal.stage(TEACHING)
            Teaching(layerwise, batches, teacher, lambda done, of: progress(TEACHING, done, of)).run(stage)
            teacher.flush()
            team.meet()
            if team.first:
                teacher.finished()
        if journal is not None and team.first:
            removed(journal.folder)
    return teacher

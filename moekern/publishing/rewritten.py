"""The card of a folder with more in it: an evaluation, the text's sources, the model that it is made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moekern.checkpoint.contents import MODEL_CARD
from moekern.checkpoint.folder import PLAN_FILE, open_checkpoint
from moekern.checkpoint.recovery import read_recovery
from moekern.checkpoint.strict_json import read_file, read_json, short
from moekern.errors import InputError
from moekern.files import write_bytes
from moekern.plan.document import Plan, plan_of
from moekern.publishing.card import (
    BASE,
    CARD_CAP,
    EVALUATION,
    NAME,
    TEXT,
    base_section,
    evaluations,
    measured_text,
    with_evaluation,
    with_section,
)
from moekern.publishing.evaluation import ORIGINAL, figures_of, is_of, models_of, other_original, row_of
from moekern.publishing.front_matter import HUB_ID, with_values
from moekern.publishing.text import text_section


def card_of(folder: Path) -> str:
    """The text of a folder's card. Raises InputError where it has none that can be read."""
    path = _of_pruned(folder, MODEL_CARD)
    try:
        return read_file(path, CARD_CAP).decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None


def made_by(folder: Path) -> Plan:
    """The plan that a pruned folder was made by. Raises InputError for any other folder."""
    path = _of_pruned(folder, PLAN_FILE)
    return plan_of(read_json(path).get("plan"), f"{path}: plan")


def _of_pruned(folder: Path, name: str) -> Path:
    """A file that pruned folders have. Raises InputError where it is not there."""
    path = folder / name
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; name the folder of a checkpoint that moekern has pruned")
    return path


def rewrite_card(
    folder: Path,
    *,
    base: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    row: str | None = None,
    name: str | None = None,
    source: str = "evaluation",
    header: Mapping[str, Any] | None = None,
    statistics: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Write what is given into the card, the rest stays byte for byte; names of what was written.

    base: id on the hub. evaluation: a document of `evaluate` from the file `source`, of which `row` is the model's;
    with a `name` it stands beside others. header, statistics: of a statistics file, and its sha256, which must be the
    plan's. Raises InputError for what does not fit, for figures of another model, and for a card that has no place for
    it; nothing is written then. `tell` is given a line where a file does not say of which model its figures are.
    """
    plan, before, where = made_by(folder), card_of(folder), str(folder / MODEL_CARD)
    card = before
    written, values = list[str](), dict[str, Any]()
    if base is not None:
        if not HUB_ID.fullmatch(base):
            raise InputError(f"--base-model {base}: expected the id of a model on the hub, OWNER/NAME")
        values |= {"base_model": base, "base_model_relation": "finetune"}
        card = with_section(card, BASE, base_section(base), where)
        written.append("base_model")
    if header is not None:
        made_of = plan.provenance.get("statistics")
        if statistics != made_of:
            what = "not those that the plan was made of" if made_of else "the plan does not name those it was made of"
            raise InputError(f"--statistics: {what} (sha256 {made_of or 'not told'})")
        text, datasets = text_section(plan, header)
        card = with_section(card, TEXT, text, where)
        values |= {"datasets": datasets} if datasets else {}
        written.append(TEXT)
    if evaluation is not None:
        if name is not None and not NAME.fullmatch(name):
            raise InputError(f"--name {name:.80}: expected up to 60 letters, digits, blanks and . , - _")
        text, known = _measured(folder, plan, evaluation, row, source, tell), evaluations(card, where)
        own = EVALUATION if name is None else f"{EVALUATION} {name}"
        if own in known and text not in known[own]:
            beside = "; with --name NAME both stand" if name is None else ""
            tell(f"{where}: what stood under {own.capitalize()} is replaced{beside}")
        card = with_evaluation(card, name, text, where)
        written.append(EVALUATION)
    if values:
        card = with_values(card, values, where)
    if written and card_of(folder) != before:
        raise InputError(f"{where}: another process has written it meanwhile; give the same command again")
    if written:
        write_bytes(folder / MODEL_CARD, card.encode())
    return written


def _measured(
    folder: Path, plan: Plan, document: Mapping[str, Any], row: str | None, source: str, tell: Callable[[str], None]
) -> str:
    """The table of a document of `evaluate`: of the row that is named, or that is this model's. That of an original is,
    where the folder itself was evaluated."""
    figures, models = figures_of(document, source), models_of(document)
    names = dict.fromkeys(each.model for each in figures)
    own = next((name for name in names if _is_of(models.get(name), folder, plan)), None)
    if row is None and own == ORIGINAL:
        row = str(folder)
        return measured_text([replace(each, model=row) for each in figures if each.model == ORIGINAL], row)
    row = row_of(figures, row or own, source)
    told = models.get(row)
    if told is None:
        tell(f"{source}: does not tell which model its row {short(row)} is of; it is written as this one's")
    elif not _is_of(told, folder, plan):
        trained = read_recovery(folder) is not None and is_of(told, plan)
        before = "this one before it was trained: evaluate the folder itself"
        what = before if trained else "another model than this one"
        raise InputError(f"--evaluation {source}: its row {short(row)} is of {what}; nothing was written")
    line = None if is_of(told, plan) else other_original(models, plan.provenance.get("fingerprint"), source)
    if line is not None:
        tell(line)
    return measured_text(figures, row)


def _is_of(told: Mapping[str, str] | None, folder: Path, plan: Plan) -> bool:
    """Whether a row is of the folder, or of its plan, where no tensor was trained since."""
    if told is None:
        return False
    if "plan" in told:
        return is_of(told, plan) and read_recovery(folder) is None
    return told.get("fingerprint") == open_checkpoint(folder).fingerprint

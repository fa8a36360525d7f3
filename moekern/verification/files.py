"""Side files of a pruned checkpoint against its source's, and what must not be there."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moekern.checkpoint.contents import MODEL_CARD, kept_card
from moekern.checkpoint.folder import CONFIG, INDEX, MANIFEST, PLAN_FILE, Checkpoint
from moekern.checkpoint.recovery import RECOVERY
from moekern.checkpoint.strict_json import read_file, read_json, regular_size
from moekern.errors import InputError
from moekern.verification.record import without_folder
from moekern.verification.settings import Modules, same_settings

QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json", "quantization_config.json")
RECIPE = "moekern_recipe.yaml"
CARD_CAP, CHUNK = 16 << 20, 4 << 20  # bytes of a card; of a file compared at a time


def file_problems(
    checkpoint: Checkpoint,
    folder: Path,
    shards: set[str],
    modules: Modules,
    cut: Callable[[Any], Any],
    plan_sha256: str | None,
) -> Iterator[str]:
    """Side files must be there with the same bytes, and nothing else. Settings of quantisers name the pruned model's
    experts, and lists in them are `cut`. Where moekern made the checkpoint (plan_sha256), the original's card has
    another name, and the card names the plan: it is there to be added to, so no more is asked of it."""
    own = {PLAN_FILE, MANIFEST, RECOVERY, RECIPE}
    renamed = {} if plan_sha256 is None else {MODEL_CARD: kept_card(checkpoint.side_files)}
    places = {name: str(renamed.get(name, name)) for name in checkpoint.side_files if name not in own}
    for name, place in places.items():
        before, after = checkpoint.folder / name, folder / place
        if not os.path.lexists(after):
            yield f"{place}: missing"
            continue
        try:
            if name in QUANTIZATION_FILES:
                same = same_settings(cut(read_json(before)), read_json(after), modules)
            else:
                same = _same(before, after)
        except InputError as error:
            yield without_folder(folder, error)
            continue
        if not same:
            yield f"{place}: differs from the source's"
    if plan_sha256 is not None:
        yield from _card_problems(folder, plan_sha256)
    known = {*places.values(), *shards, *own, INDEX, CONFIG, *([MODEL_CARD] if plan_sha256 else [])}
    for path in sorted(folder.rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in known:
            yield f"{path.relative_to(folder).as_posix()}: should not be there"


def _card_problems(folder: Path, plan_sha256: str) -> Iterator[str]:
    path = folder / MODEL_CARD
    if not os.path.lexists(path):
        yield f"{MODEL_CARD}: missing"
        return
    try:
        card = read_file(path, CARD_CAP)
    except InputError as error:
        yield without_folder(folder, error)
        return
    if plan_sha256.encode() not in card:
        yield f"{MODEL_CARD}: does not name the plan (sha256 {plan_sha256})"


def _same(before: Path, after: Path) -> bool:
    """Whether two files have the same bytes; chunks are held."""
    if regular_size(before) != regular_size(after):
        return False
    with before.open("rb") as old, after.open("rb") as new:
        while chunk := old.read(CHUNK):
            if new.read(len(chunk)) != chunk:
                return False
        return not new.read(1)

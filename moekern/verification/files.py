"""Side files of a pruned checkpoint against its source's, and what must not be there."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moekern.checkpoint.folder import CONFIG, INDEX, Checkpoint
from moekern.checkpoint.recovery import RECOVERY
from moekern.checkpoint.strict_json import read_json, read_start, regular_size
from moekern.errors import InputError
from moekern.verification.record import MANIFEST, PLAN_FILE, without_folder
from moekern.verification.settings import Modules, same_settings

QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json", "quantization_config.json")
MODEL_CARD, NOTICE = "README.md", b"> **Pruned by moekern**"
START, CHUNK = 2 << 20, 4 << 20  # bytes of a card in which the notice stands; of a file compared at a time


def file_problems(
    checkpoint: Checkpoint,
    folder: Path,
    shards: set[str],
    modules: Modules,
    cut: Callable[[Any], Any],
    plan_sha256: str | None,
) -> Iterator[str]:
    """Side files must be there with the same bytes, and nothing else. Settings of quantisers name the pruned model's
    experts, and lists in them are `cut`; a model card has a notice in it, which names the plan, where moekern made the
    checkpoint (plan_sha256)."""
    for name in checkpoint.side_files:
        if name in (PLAN_FILE, MANIFEST, RECOVERY):
            continue
        before, after = checkpoint.folder / name, folder / name
        if not os.path.lexists(after):
            yield f"{name}: missing"
            continue
        try:
            size = regular_size(after)
            if name in QUANTIZATION_FILES:
                same = same_settings(cut(read_json(before)), read_json(after), modules)
            else:
                told = name == MODEL_CARD and plan_sha256 is not None
                notice = _notice(read_start(after, min(size, START))[0], str(plan_sha256)) if told else (0, 0)
                same = notice is not None and _same_around(before, after, size, *notice)
        except InputError as error:
            yield without_folder(folder, error)
            continue
        if not same:
            yield f"{name}: differs from the source's"
    known = {*checkpoint.side_files, *shards, PLAN_FILE, MANIFEST, RECOVERY, INDEX, CONFIG}
    for path in sorted(folder.rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in known:
            yield f"{path.relative_to(folder).as_posix()}: should not be there"


def _notice(card: bytes, plan_sha256: str) -> tuple[int, int] | None:
    """First and last byte of a card's first paragraph that is moekern's; None where none of it names the plan."""
    start = card.find(NOTICE)
    stop = card.find(b"\n\n", start) + 2
    return (start, stop) if start >= 0 and plan_sha256.encode() in card[start:stop] else None


def _same_around(before: Path, after: Path, size: int, start: int, stop: int) -> bool:
    """Whether a file of `size` bytes without those from `start` to `stop` is the source's; chunks are held."""
    if regular_size(before) != size - (stop - start):
        return False
    with before.open("rb") as old, after.open("rb") as new:
        if old.read(start) != new.read(start):
            return False
        new.seek(stop)
        while chunk := old.read(CHUNK):
            if new.read(len(chunk)) != chunk:
                return False
        return not new.read(1)

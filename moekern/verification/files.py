"""Side files of a pruned checkpoint against its source's, and what must not be there."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moekern.checkpoint.folder import CONFIG, INDEX, Checkpoint
from moekern.verification.record import MANIFEST, PLAN_FILE, parsed
from moekern.verification.settings import Modules, same_settings

CHUNK = 1 << 20
QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json", "quantization_config.json")
MODEL_CARD, NOTICE = "README.md", b"> **Pruned by moekern**"


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
        if name in (PLAN_FILE, MANIFEST):
            continue
        if not (folder / name).is_file():
            yield f"{name}: missing"
            continue
        before, after = checkpoint.folder / name, folder / name
        if name in QUANTIZATION_FILES:
            same = same_settings(cut(_json(before)), _json(after), modules)
        elif name == MODEL_CARD and plan_sha256:
            same = _without_notice(after.read_bytes(), plan_sha256) == before.read_bytes()
        else:
            same = _same_bytes(before, after)
        if not same:
            yield f"{name}: differs from the source's"
    known = {*checkpoint.side_files, *shards, PLAN_FILE, MANIFEST, INDEX, CONFIG}
    for path in sorted(folder.rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in known:
            yield f"{path.relative_to(folder).as_posix()}: should not be there"


def _without_notice(card: bytes, plan_sha256: str) -> bytes | None:
    """The card without the first paragraph that is moekern's; None where there is none that names the plan."""
    start = card.find(NOTICE)
    stop = card.find(b"\n\n", start) + 2
    if start < 0 or plan_sha256.encode() not in card[start:stop]:
        return None
    return card[:start] + card[stop:]


def _same_bytes(before: Path, after: Path) -> bool:
    """Read in pieces of 1 MiB."""
    if before.stat().st_size != after.stat().st_size:
        return False
    with before.open("rb") as old, after.open("rb") as new:
        return all(piece == new.read(len(piece)) for piece in iter(lambda: old.read(CHUNK), b""))


def _json(path: Path) -> Any:
    """What the file holds, or the bytes themselves, which equal nothing else."""
    data = path.read_bytes()
    try:
        return parsed(data)
    except ValueError:
        return {"": [data.hex()]}

"""Side files of a pruned checkpoint against its source's, and what must not be there."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moekern.checkpoint.folder import CONFIG, INDEX, Checkpoint
from moekern.verification.settings import Modules, same_settings

PLAN_FILE, MANIFEST = "moekern_plan.json", "moekern_manifest.jsonl"
QUANTIZATION_FILES = ("hf_quant_config.json", "quant_config.json", "quantize_config.json", "quantization_config.json")
MODEL_CARD, NOTICE = "README.md", b"> **Pruned by moekern**"


def file_problems(
    checkpoint: Checkpoint,
    folder: Path,
    shards: set[str],
    modules: Modules,
    cut: Callable[[Any], Any],
    plan_sha256: str,
) -> Iterator[str]:
    """Side files must be there with the same bytes, and nothing else. Settings of quantisers name the pruned model's
    experts, and lists in them are `cut`; a model card has a notice in it, which names the plan."""
    for name in checkpoint.side_files:
        if name in (PLAN_FILE, MANIFEST):
            continue
        if not (folder / name).is_file():
            yield f"{name}: missing"
            continue
        want, got = (checkpoint.folder / name).read_bytes(), (folder / name).read_bytes()
        if name == MODEL_CARD:
            got = _without_notice(got, plan_sha256)
        renamed = name in QUANTIZATION_FILES
        if not (same_settings(cut(_json(want)), _json(got), modules) if renamed else want == got):
            yield f"{name}: differs from the source's"
    known = {*checkpoint.side_files, *shards, PLAN_FILE, MANIFEST, INDEX, CONFIG}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in known:
            yield f"{path.relative_to(folder).as_posix()}: should not be there"


def _without_notice(card: bytes, plan_sha256: str) -> bytes:
    """The card without the first paragraph that is moekern's and names the plan; a card that another tool copied has
    none."""
    start = card.find(NOTICE)
    stop = card.find(b"\n\n", start) + 2
    if start < 0 or plan_sha256.encode() not in card[start:stop]:
        return card
    return card[:start] + card[stop:]


def _json(data: bytes) -> Any:
    """What the file holds, or the bytes themselves, which equal nothing else."""
    try:
        return json.loads(data)
    except ValueError:
        return {"": [data.hex()]}

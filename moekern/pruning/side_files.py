"""The files of a pruned checkpoint that hold no weights, and the words on what was done."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moekern.architectures import Layout
from moekern.architectures.config_keys import mtp_counts
from moekern.architectures.substitution import APPROXIMATE, with_replaced
from moekern.checkpoint.contents import MODEL_CARD, kept_card
from moekern.checkpoint.folder import CONFIG, INDEX, MANIFEST, PLAN_FILE, Checkpoint
from moekern.checkpoint.recovery import RECOVERY, read_recovery
from moekern.checkpoint.strict_json import read_json, regular_size
from moekern.errors import InputError
from moekern.plan.document import Mtp, Plan, planned_mtp
from moekern.pruning.config import QUANTIZATION_FILES, dumped_like, pruned_config, renamed
from moekern.pruning.constants import Replaced
from moekern.pruning.expert_lists import expert_lists
from moekern.pruning.expert_names import Renamer
from moekern.pruning.model_card import facts_of
from moekern.pruning.pieces import Range, made_from
from moekern.pruning.shards import OutputShard
from moekern.pruning.stale import stale
from moekern.publishing.card import RECIPE, About, card
from moekern.publishing.front_matter import LICENSE

FORMAT = "moekern.pruned/1"
OWN = (PLAN_FILE, MANIFEST, RECOVERY, RECIPE)  # files that speak of the checkpoint that they lie in, and of no other


@dataclass(frozen=True)
class SideFile:
    """A file of the output: literal bytes and ranges of source files. origin is all that decided its bytes when it was
    looked at (`made_from`); notes are lines for the user where it is no plain copy, or no longer true."""

    name: str
    pieces: tuple[bytes | Range, ...]
    origin: str
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(len(piece) if isinstance(piece, bytes) else piece[2] for piece in self.pieces)

    @property
    def text(self) -> str:
        """Of a file that is literal bytes alone."""
        return b"".join(piece for piece in self.pieces if isinstance(piece, bytes)).decode()


def side_file(name: str, *pieces: bytes | Range, notes: Iterable[str] = ()) -> SideFile:
    return SideFile(name, pieces, made_from(pieces), tuple(notes))


def check_side_files(checkpoint: Checkpoint) -> None:
    """Raise InputError for a file that would bring another than the checkpoint's into the result, and for settings of a
    quantiser that cannot be read: what can be known before there is a plan."""
    for name, wrong in checkpoint.contents.refused.items():
        raise InputError(f"{checkpoint.folder}: {name!r}: {wrong}")
    for name in QUANTIZATION_FILES:
        if name in checkpoint.side_files:
            read_json(checkpoint.folder / name)


def side_files(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    kept: Mapping[str, tuple[int, ...]],
    shards: Sequence[OutputShard],
    mtp: Mtp,
    replaced: Replaced | None = None,
    about: About = About(),
) -> list[SideFile]:
    """In the order of writing: what is copied, card and recipe, the plan, then index and config. With `replaced` all
    experts count and keep their numbers, and config.json names those that are constants. The original's card gets
    another name, and stays as it is.

    Raises InputError as check_side_files does, and for settings that name experts in a form that cannot be renumbered.
    """
    check_side_files(checkpoint)
    left = kept
    if replaced is not None:
        kept = {key: tuple(range(layer.num_experts)) for key, layer in layout.layers.items()}
    settings = Settings(checkpoint, layout, kept, drop_mtp=mtp == "drop", width=plan.width, replaced=replaced)
    files = []
    for name in checkpoint.side_files:
        path = checkpoint.folder / name
        if name in QUANTIZATION_FILES:
            files.append(settings.quantiser(name))
        elif name == MODEL_CARD:
            files.append(side_file(str(kept_card(checkpoint.side_files)), whole_file(path)))
        elif name not in OWN:
            notes = stale(path, name, checkpoint.config, layout, kept, plan.width)
            files.append(side_file(name, whole_file(path), notes=notes))
    config = settings.config()
    told = mtp_line(layout, left, plan, mtp)
    flags: tuple[str, ...] = () if mtp == planned_mtp(plan) else ("--mtp", mtp)
    flags += () if replaced is None or replaced.form == APPROXIMATE else ("--form", replaced.form)
    facts = facts_of(checkpoint, layout, plan, left, shards, json.loads(config.text), mtp, told, flags)
    before = facts.original_card
    note = f"{MODEL_CARD}: of the pruned model; the original's card, as it was, is {before}"
    note += "" if LICENSE in facts.inherited else ", whose front matter tells no license that is taken over"
    files.append(text_file(MODEL_CARD, card(facts, about), () if before is None else (note,)))
    if about.recipe is not None:
        files.append(text_file(RECIPE, about.recipe))
    files.append(text_file(PLAN_FILE, _provenance(checkpoint, layout, plan, kept, mtp, replaced)))
    if checkpoint.index is not None or len(shards) > 1:
        files.append(text_file(INDEX, _index(checkpoint, shards)))
    return [*files, config]


@dataclass(frozen=True)
class Settings:
    """Makes the files of settings that speak of experts."""

    checkpoint: Checkpoint
    layout: Layout
    kept: Mapping[str, tuple[int, ...]]
    drop_mtp: bool
    width: int | None = None  # channels that experts have left; None: all
    replaced: Replaced | None = None

    def config(self) -> SideFile:
        def change(settings: Any, names: Renamer) -> Any:
            new = pruned_config(settings, self.layout, self.kept, names, drop_mtp=self.drop_mtp, width=self.width)
            replaced = self.replaced
            return new if replaced is None else with_replaced(new, self.layout, replaced.dropped, replaced.form)

        made = self._made(CONFIG, self.checkpoint.config, change)
        left = [path for path, _ in mtp_counts(self.checkpoint.config) if path not in self.layout.mtp_paths]
        if not left or not self.drop_mtp:
            return made
        what = f"{CONFIG}: may count the MTP layers that are gone; left as it is: {', '.join(map('.'.join, left))}"
        return replace(made, notes=(*made.notes, what))

    def quantiser(self, name: str) -> SideFile:
        return self._made(name, read_json(self.checkpoint.folder / name), partial(renamed, inside=True))

    def _made(self, name: str, content: Any, change: Callable[[Any, Renamer], Any]) -> SideFile:
        path = self.checkpoint.folder / name
        names = Renamer(str(path), self.checkpoint.tensors, self.layout, self.kept, drop_mtp=self.drop_mtp)
        lists = expert_lists(str(path), self.checkpoint.config, self.layout, self.kept)
        new = change(lists.cut(content), names)
        notes = (*names.notes(name), *lists.notes(name))
        return text_file(name, dumped_like(new, path.read_text(encoding="utf-8")), notes)


def text_file(name: str, text: str, notes: Iterable[str] = ()) -> SideFile:
    return side_file(name, text.encode(), notes=notes)


def whole_file(path: Path) -> Range:
    return str(path), 0, regular_size(path)


def _provenance(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    kept: Mapping[str, tuple[int, ...]],
    mtp: Mtp,
    replaced: Replaced | None,
) -> str:
    """JSON: the plan and its sha256, the source's fingerprint, what MTP layers keep, in which form and by what dropped
    experts are replaced; under "source" that of the source, if it was pruned itself, with its "recovery" in it, if it
    was trained then."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": checkpoint.fingerprint,
        "mtp": mtp,
        "mtp_keep": {key: list(kept[key]) for key in layout.mtp if key in kept},
        "plan": json.loads(plan.to_json()),
        "plan_sha256": plan.digest,
    }
    if replaced is not None:
        content["replaced"] = {"form": replaced.form, **replaced.made_of(plan).document()}
    earlier, recovery = checkpoint.folder / PLAN_FILE, read_recovery(checkpoint.folder)
    if earlier.is_file():
        content["source"] = read_json(earlier)
    if recovery is not None:
        content["source"] = {**content.get("source", {}), "recovery": recovery}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _index(checkpoint: Checkpoint, shards: Sequence[OutputShard]) -> str:
    """The index in the form that save_pretrained gives it: sorted keys, indent 2. Other keys of the source's stay.

    total_parameters is kept up only where it is the number of elements; for packed weights nothing here can know it.
    """
    metadata = dict((checkpoint.index or {}).get("metadata") or {})
    metadata["total_size"] = sum(shard.data_bytes for shard in shards)
    elements = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    if metadata.pop("total_parameters", None) == elements:
        metadata["total_parameters"] = sum(tensor.elements for shard in shards for tensor in shard.tensors)
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    content = {**(checkpoint.index or {}), "metadata": metadata, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def mtp_line(layout: Layout, kept: Mapping[str, Sequence[int]], plan: Plan, mtp: Mtp) -> str:
    layers = ", ".join(layout.mtp)
    if mtp == "drop" and layout.mtp_prefixes:
        return f"MTP layers removed ({', '.join(layout.mtp_prefixes)})"
    if not layout.mtp:
        return "no MTP layer has experts"
    if plan.replace is not None:
        return f"MTP layer {layers}: all experts kept, which calibration does not run"
    if mtp == "keep":
        return (
            f"MTP layer {layers}: all experts kept; engines size MTP layers by the same count key of config.json, so "
            "run this checkpoint without speculative decoding"
        )
    count = len(kept[next(iter(layout.mtp))])
    if all(key in plan.layers for key in layout.mtp):
        return f"MTP layer {layers}: {count} experts kept, as planned"
    channels = f", and of these the {plan.width} channels with the largest weights" if plan.width else ""
    return (
        f"MTP layer {layers}: {count} experts kept, those with the largest router rows{channels}, since calibration "
        "does not run MTP layers"
    )

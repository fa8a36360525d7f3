"""A pruned checkpoint to the hub: everything is looked at first, and nothing is public unless it is asked for."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.checkpoint.contents import CONFIG, INDEX, MODEL_CARD
from moekern.checkpoint.folder import MANIFEST, PLAN_FILE, Checkpoint, open_checkpoint
from moekern.checkpoint.hub import SIGN_IN
from moekern.checkpoint.strict_json import read_json, read_json_lines, regular_size, shown
from moekern.errors import InputError, first_line
from moekern.publishing.card import RECIPE
from moekern.publishing.front_matter import HUB_ID
from moekern.publishing.rewritten import card_of
from moekern.recipe import read_recipe

VERIFY = "`moekern verify ORIGINAL plan.json FOLDER` says what it is"


@dataclass(frozen=True)
class Upload:
    """What is to be uploaded: path in the repository -> bytes; and what has to be known of it, a line each."""

    folder: Path
    name: str
    files: dict[str, int]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


def check_repository(name: str) -> str:
    """The name. Raises InputError for what is no OWNER/NAME."""
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{name:.80}: expected OWNER/NAME, the id of a repository on the hub", kind="option")
    return name


def checked(folder: Path, name: str) -> Upload:
    """What `folder` would upload. Raises InputError unless it is a finished pruned checkpoint, each of whose shards the
    manifest names with its size, and its card has front matter that the hub reads, with the base model, and names the
    plan."""
    check_repository(name)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for file in (PLAN_FILE, MANIFEST):
        if not os.path.lexists(folder / file):
            what = "no such file; name the folder of a checkpoint that moekern has pruned, and finished"
            raise InputError(f"{folder / file}: {what}")
    checkpoint = open_checkpoint(folder)
    plan = read_json(folder / PLAN_FILE).get("plan_sha256")
    notes = [*_manifest_notes(checkpoint, plan), *_recipe_notes(folder)]
    _check_card(folder, plan)
    contents = checkpoint.contents
    for file, wrong in contents.refused.items():
        raise InputError(f"{folder}: {file!r}: {wrong}")
    notes += [f"not uploaded: {file}: {why}" for file, why in contents.left_out.items()]
    index = [INDEX] if (folder / INDEX).is_file() else []
    names = [*contents.side, CONFIG, *index, *(shard.name for shard in checkpoint.shards)]
    return Upload(folder, name, {file: regular_size(folder / file) for file in sorted(names)}, tuple(notes))


def _manifest_notes(checkpoint: Checkpoint, plan: Any) -> Iterator[str]:
    """That some tensors have no checksum. Raises InputError for a manifest that is not the checkpoint's."""
    path = checkpoint.folder / MANIFEST
    lines = {str(line.get("shard")): line for line in read_json_lines(path)}
    sizes = {shard.name: regular_size(checkpoint.folder / shard.name) for shard in checkpoint.shards}
    if lines.keys() != sizes.keys():
        raise InputError(f"{path}: its lines are not one for each shard; {VERIFY}")
    without = 0
    for name, line in lines.items():
        tensors = line.get("tensors")
        if line.get("size") != sizes[name] or not isinstance(tensors, dict):
            raise InputError(f"{path}: {shown(name)} has another size; {VERIFY}")
        if line.get("plan") != plan:
            raise InputError(f"{path}: {shown(name)} was made by another plan; {VERIFY}")
        without += sum(value is None for value in tensors.values())
    if without:
        yield f"{MANIFEST}: {without} tensors have no checksum (`prune --reread` takes those of all)"


def _recipe_notes(folder: Path) -> Iterator[str]:
    """That a recipe names places on this machine."""
    if os.path.lexists(folder / RECIPE):
        recipe = read_recipe(folder / RECIPE)
        for value in (recipe.model, *(recipe.data or ())):
            if value.rpartition("=")[2].startswith(("/", "~")):
                yield f"{RECIPE}: names a place on this machine, {shown(value)}, which the repository will show"


def _check_card(folder: Path, plan: Any) -> None:
    from huggingface_hub import ModelCard

    path = folder / MODEL_CARD
    text = card_of(folder)
    try:
        values = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    except Exception as error:  # whatever YAML and the library's classes raise
        raise InputError(f"{path}: front matter: {first_line(error)}") from None
    base = values.get("base_model")
    ids = base if isinstance(base, list) and base else [base]
    if not all(isinstance(each, str) and HUB_ID.fullmatch(each) for each in ids):
        said = "is missing" if base is None else f"is {shown(base)}, and no id of the hub"
        command = f"moekern card {shlex.quote(str(folder))} --base-model OWNER/NAME"
        raise InputError(f"{path}: base_model {said}: `{command}` writes it")
    if not isinstance(plan, str) or plan not in text:
        raise InputError(f"{path}: does not name the plan (sha256 {plan}); it is the card of another model")


def upload(asked: Upload, *, public: bool, tell: Callable[[str], None] = lambda line: None) -> str:
    """Make the repository, private unless `public`, where it is not there, and upload in one commit, whose address is
    returned; what the hub has already is not sent again. Raises InputError for a public repository without `public`,
    and for what the hub or the network says."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _asking(asked.name):
        api.create_repo(asked.name, private=not public, exist_ok=True)
        private = api.model_info(asked.name).private
        if private is not True and not public:
            raise InputError(f"{asked.name}: is public on the hub; give --public, or name another repository")
        if private and public:
            tell(f"{asked.name}: is private on the hub, and stays so; its settings there change that")
        operations = [CommitOperationAdd(file, asked.folder / file) for file in asked.files]
        return str(api.create_commit(asked.name, operations, commit_message="Upload of a pruned checkpoint").commit_url)


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """What the hub answers, or the network, becomes one line. Raises InputError."""
    from huggingface_hub import errors

    try:
        yield
    except InputError:
        raise
    except errors.OfflineModeIsEnabled:
        raise InputError(f"{name}: HF_HUB_OFFLINE is set: unset it to upload") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(
                f"{name}: the hub does not let you write there: {SIGN_IN}, with a token that may"
            ) from error
        raise InputError(
            f"{name}: the hub answers {status} ({first_line(error)}); the same command tries again"
        ) from error
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{name}: not uploaded ({first_line(error)}); the same command tries again") from error

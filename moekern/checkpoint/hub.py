"""A model as the user names it: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from moekern.checkpoint.contents import ADAPTER, ADAPTER_WEIGHTS, OTHER_FORMS, OTHER_SETTINGS, SECOND_COPIES
from moekern.errors import InputError, first_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What `checkpoint.contents` leaves out of a folder need not be downloaded. In these patterns "*" matches "/" too.
UNWANTED = [
    *(f"*{suffix}" for form in OTHER_FORMS for suffix in (form, f"{form}.index.json")),
    *(f"{folder}/*" for folder in SECOND_COPIES),
    *(f"{place}.safetensors{suffix}" for place in ("*/*", "consolidated*") for suffix in ("", ".index.json")),
    f"*{ADAPTER}", f"*{ADAPTER_WEIGHTS}*", OTHER_SETTINGS,
]  # fmt: skip


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder of `name`, downloaded (or found in the hub's cache) when it is a hub id and no such folder exists.

    All of the repository but second copies of the weights and adapters. Raises InputError when it is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{name}: is a file; give the checkpoint's folder")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=UNWANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise InputError(f"{name}: no such folder, and not to be had from the hub ({first_line(error)})") from error

"""What the files of a model folder are: those that belong to the model, those that are left out, and why."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moekern.checkpoint.pointers import A_POINTER, is_pointer
from moekern.checkpoint.strict_json import shown
from moekern.errors import InputError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MODEL_CARD = "README.md"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_FORMS = (*PICKLES, ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".nemo", ".tflite")
WEIGHTS = (".safetensors", *OTHER_FORMS)
# Folders that publishers put a second copy of the weights into, with settings of its own.
SECOND_COPIES = ("original", "metal", "onnx", "openvino", "gguf", "coreml", "mlx")
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model."
OTHER_SETTINGS = "params.json"  # stands beside consolidated*.safetensors, and counts experts too

ANOTHER_FORM = "the weights in another form"
AN_ADAPTER = "an adapter, made for all experts"


@dataclass(frozen=True)
class Contents:
    """Names relative to the folder; a folder that is left out whole ends in "/"."""

    side: tuple[str, ...]  # files that belong to the model and hold neither weights nor config
    left_out: Mapping[str, str]  # name -> why
    refused: Mapping[str, str]  # name -> what is wrong with a file that would belong to the model


def contents(folder: Path, shards: Collection[str], strays: Mapping[str, str]) -> Contents:
    """Every file of `folder` but config, index and `shards`. strays: safetensors files that are no shards -> why.

    Raises InputError for a folder that cannot be read.
    """
    try:
        return _contents(folder, shards, strays)
    except OSError as error:
        where = os.path.relpath(error.filename, folder) if error.filename else "."
        raise InputError(f"{folder}: {shown(where)}: {error.strerror or error}") from error


def _contents(folder: Path, shards: Collection[str], strays: Mapping[str, str]) -> Contents:
    side: list[str] = []
    left_out: dict[str, str] = {}
    refused: dict[str, str] = {}
    for root, folders, names in os.walk(folder, onerror=_raised):
        place = Path(root).relative_to(folder)
        for name in sorted(folders):
            if reason := _why_not_entered(Path(root) / name, top=root == os.fspath(folder)):
                left_out[f"{(place / name).as_posix()}/"] = reason
                folders.remove(name)
        for name in sorted(names):
            path = (place / name).as_posix()
            if path in (CONFIG, INDEX) or path in shards:
                continue
            if reason := strays.get(path) or _why_left_out(name) or _why_irregular(folder / path):
                left_out[path] = reason
            elif wrong := _wrong(folder, path):
                refused[path] = wrong
            else:
                side.append(path)
    return Contents(tuple(sorted(side)), dict(sorted(left_out.items())), refused)


def kept_card(names: Collection[str]) -> str | None:
    """The name that a checkpoint's card gets in one that is made of it and has a card of its own: README.original.md,
    or with a number where there is one already. None of a checkpoint without a card. names: its side files."""
    if MODEL_CARD not in names:
        return None
    wanted = ("README.original.md", *(f"README.original-{n}.md" for n in range(2, len(names) + 3)))
    return next(name for name in wanted if name not in names)


def _raised(error: OSError) -> None:
    raise error


def lines_left_out(left_out: Mapping[str, str]) -> str:
    """ "original/, metal/ (a second copy of the weights); x.gguf (...)": reasons in the order of the first name."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name if name.isprintable() else ascii(name))
    return "; ".join(f"{_few(names)} ({reason})" for reason, names in by_reason.items())


def _few(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 8 else [*names[:7], f"and {len(names) - 7} more"])


def _why_not_entered(folder: Path, top: bool) -> str | None:
    if folder.is_symlink():
        return "a link to a folder"
    if folder.name.startswith(".") or folder.name == "__pycache__":
        return "no part of the model"
    if top and folder.name.lower() in SECOND_COPIES:
        return "a second copy of the weights"
    names = {path.name for path in _files(folder)}
    if ADAPTER in names:
        return AN_ADAPTER
    if names & {CONFIG, OTHER_SETTINGS} and any(name.lower().endswith(WEIGHTS) for name in names):
        return "a model of its own"
    return None


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        yield from (entry for entry in found if not entry.is_dir(follow_symlinks=False))


def _why_left_out(name: str) -> str | None:
    lower = name.lower().removesuffix(".index.json")
    if lower == ADAPTER or lower.startswith(ADAPTER_WEIGHTS):
        return AN_ADAPTER
    if lower.endswith(WEIGHTS) or name == OTHER_SETTINGS:
        return ANOTHER_FORM
    return None


def _why_irregular(path: Path) -> str | None:
    return None if path.is_symlink() or stat.S_ISREG(path.lstat().st_mode) else "not a regular file"


def _wrong(folder: Path, name: str) -> str | None:
    """What keeps a side file from being copied: another file than one of the checkpoint's would get into the result."""
    path = folder / name
    if not name.isprintable():
        return "a name that is not printable; rename it"
    if is_pointer(path):
        return A_POINTER
    if not path.is_symlink():
        return None
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if not target.is_file():
        return "a link to nothing; load the file anew or remove the link"
    places = [home]
    if home.parent.name == "snapshots":  # of a hub cache: blobs of the repository, and those that repositories share
        places += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    if any(target.is_relative_to(place) for place in places):
        return None
    return f"a link out of the checkpoint, to {shown(str(target))}; put the file itself there or remove the link"

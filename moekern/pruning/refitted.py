"""Tensors that a refit has computed: a folder with a file for each layer, whose bytes take the place of the source's.

`KEY.safetensors` holds tensors by the name and the shape that they have in the pruned checkpoint. The header's metadata
say of which plan and model they are and by which recipe, and have the checksum of each.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moekern._C as _C
from moekern.architectures.channels import PLAIN
from moekern.checkpoint.header import DTYPE_BITS, Shard, TensorEntry, read_shard
from moekern.checkpoint.strict_json import parse_json, shown
from moekern.checkpoint.writing import Buffer, write_tensors
from moekern.errors import InputError
from moekern.files import is_folder, is_plain
from moekern.plan.document import KEY_CAP, LAYER_CAP, LayerPlan, Plan
from moekern.plan.groups import is_merged
from moekern.plan.refit import check_merged, is_sha256, kept_digest, refit_of
from moekern.plan.router_rows import router_rows

FORMAT = "moekern.refit/1"
METADATA = "moekern"  # the key of a header's metadata
SUFFIX = ".safetensors"
CHECKSUM = re.compile(r"[0-9a-f]{32}")  # XXH3-128


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that takes the place of the source's: the file that holds it, by its path from the source's folder on,
    and XXH3-128 of its bytes as it was computed. layer: the one that a refit computed it for; None: no refit did."""

    layer: str | None
    path: Path
    entry: TensorEntry
    checksum: bytes


@dataclass(frozen=True)
class Refitted:
    """recipe, model: sha256 of all that decides the bytes, and the fingerprint. kept: layer -> `plan.refit.kept_digest`
    of the experts that it was computed for."""

    folder: Path
    recipe: str
    model: str
    kept: Mapping[str, str]
    tensors: Mapping[str, NewTensor]


def write_layer(
    folder: str | Path,
    key: str,
    tensors: Mapping[str, tuple[str, Sequence[int], Buffer]],
    *,
    recipe: str,
    kept: LayerPlan,
    model: str,
) -> Path:
    """Write the tensors of layer `key`, name in the pruned checkpoint -> (safetensors dtype, shape, its bytes).

    The file appears whole or not at all, in the place of an earlier one. recipe: sha256 of all that decides the bytes;
    kept: what stays of the layer; model: the fingerprint. The same arguments give the same bytes. Raises InputError
    where the system refuses, ValueError for arguments that do not fit.
    """
    if not (is_sha256(recipe) and is_sha256(model)):
        raise ValueError("[write_layer] recipe, model: expected sha256")
    if not key or key.startswith(".") or os.sep in key or not tensors:
        raise ValueError(f"[write_layer] key: expected a layer with tensors, got {key!r}")
    order = sorted(tensors, key=lambda name: (-DTYPE_BITS[tensors[name][0]], name))  # wide ones first: all lie aligned
    said = {
        "format": FORMAT,
        "layer": key,
        "recipe": recipe,
        "kept": kept_digest(kept),
        "model": model,
        "checksums": {name: _checksum(tensors[name][2]).hex() for name in order},
    }
    path = Path(folder) / f"{key}{SUFFIX}"
    metadata = {METADATA: json.dumps(said, ensure_ascii=False, separators=(",", ":"))}
    write_tensors(path, {name: tensors[name] for name in order}, metadata)
    return path


def open_refitted(folder: str | Path) -> Refitted:
    """What a refit has left, as far as it has come: headers are read and checked, no tensor is. Files of other kinds,
    and those that are still written, are passed over. Raises InputError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    folder = folder.resolve()
    names = sorted(name for name in os.listdir(folder) if name.endswith(SUFFIX) and not name.startswith("."))
    if not names:
        raise InputError(f"{folder}: no refitted layer is in it; name the folder that the refit wrote")
    if len(names) > LAYER_CAP:
        raise InputError(f"{folder}: {len(names)} layers, more than the limit of {LAYER_CAP}")
    tensors: dict[str, NewTensor] = {}
    kept: dict[str, str] = {}
    first: tuple[str, str] | None = None
    for name in names:
        path = folder / name
        is_plain(path)
        shard = read_shard(path)
        said = _said(shard)
        made_by = said["recipe"], said["model"]
        if first is not None and made_by != first:
            raise InputError(f"{path}: of another refit than {names[0]}; remove the files of one of them")
        first, kept[said["layer"]] = made_by, said["kept"]
        for entry in shard.tensors:
            if entry.name in tensors:
                raise InputError(f"{path}: tensor {shown(entry.name)} is also in {tensors[entry.name].path.name}")
            checksum = bytes.fromhex(said["checksums"][entry.name])
            tensors[entry.name] = NewTensor(said["layer"], path, entry, checksum)
    assert first is not None
    return Refitted(folder, *first, kept, tensors)


def remove_others(folder: Path, recipe: str) -> None:
    """Remove the layers of a work folder that another recipe made, or that something has spoilt."""
    for path in folder.glob(f"*{SUFFIX}") if is_folder(folder) else ():
        try:
            is_plain(path)
            same = _said(read_shard(path))["recipe"] == recipe
        except InputError:
            same = False
        if not same:
            path.unlink()


def check_refitted(refitted: Refitted | None, plan: Plan, fingerprint: str) -> None:
    """Raise InputError unless the plan says of the refit what its files do; where there is none, unless the plan says
    that its layers are as they were; and where merged experts or their router rows are not in it."""
    record = refit_of(plan)
    if refitted is None:
        if record is not None:
            raise InputError(
                "plan: its layers were refitted, and their tensors lie in a folder of their own: name it with "
                "--refitted, or use the plan that the refit was given"
            )
        check_merged(plan)
        return
    folder = refitted.folder
    if record is None:
        raise InputError(f"--refitted {folder}: the plan says nothing of a refit; use the plan that the refit wrote")
    if refitted.recipe != record.recipe:
        raise InputError(f"--refitted {folder}: was computed by another recipe than the one that the plan names")
    if refitted.model != fingerprint:
        raise InputError(f"--refitted {folder}: was computed for another model, whose fingerprint differs")
    for key in sorted({*refitted.kept} ^ {*record.layers}):
        what = "is not there" if key in record.layers else "is there, and the plan does not name it"
        raise InputError(f"--refitted {folder}: {key}{SUFFIX} {what}")
    for key, kept in refitted.kept.items():
        if kept != kept_digest(plan.layers[key]):
            what = "was computed for other experts or channels than the plan keeps"
            raise InputError(f"--refitted {folder}: {key}{SUFFIX} {what}; use the plan that this refit wrote")
    check_merged(plan)
    if router_rows(plan) and not is_merged(plan, fingerprint):
        what = "was computed for other router rows than the plan has (provenance.merge.router)"
        raise InputError(f"--refitted {folder}: {what}; use the plan that merge-experts wrote")


def check_fits(new: NewTensor, layer: str | None, dtype: str, shape: Sequence[int]) -> None:
    """Raise InputError unless it can take the place of a tensor of an expert of `layer` (None: of no expert)."""

    def refuse(what: str) -> InputError:
        return InputError(f"{new.path}: tensor {shown(new.entry.name)}: {what}")

    if layer != new.layer:
        raise refuse(f"is no tensor of an expert of layer {new.layer}")
    if new.entry.shape != tuple(shape):
        raise refuse(f"has shape {list(new.entry.shape)}; in the pruned model it has {list(shape)}")
    if new.entry.dtype != dtype and not {new.entry.dtype, dtype} <= {*PLAIN}:  # plain numbers may become others
        raise refuse(f"is {new.entry.dtype}; in the pruned model it is {dtype}")


def _said(shard: Shard) -> dict[str, Any]:
    """What a file's metadata say, checked."""

    def refuse(what: str) -> InputError:
        return InputError(f"{shard.path}: {what}; it is no refitted layer that moekern wrote")

    if METADATA not in shard.metadata:
        raise refuse(f"its metadata have no {METADATA!r}")
    said = parse_json(shard.metadata[METADATA].encode(errors="surrogatepass"), f"{shard.path}: metadata", strict=True)
    if said.get("format") != FORMAT:
        raise refuse(f'expected "format": "{FORMAT}", got {shown(said.get("format"))}')
    layer, checksums = said.get("layer"), said.get("checksums")
    if not isinstance(layer, str) or f"{layer}{SUFFIX}" != shard.path.name or len(layer) > KEY_CAP:
        raise refuse(f"layer {shown(layer)} is not the one that the file's name says")
    for key in ("recipe", "kept", "model"):
        if not is_sha256(said.get(key)):
            raise refuse(f"{key}: expected a sha256, got {shown(said.get(key))}")
    if not isinstance(checksums, dict) or checksums.keys() != {entry.name for entry in shard.tensors}:
        raise refuse("checksums: expected one for each tensor")
    for name, value in checksums.items():
        if not isinstance(value, str) or not CHECKSUM.fullmatch(value):
            raise refuse(f"checksum of {shown(name)}: expected 32 hexadecimal digits, got {shown(value)}")
    return said


def _checksum(data: Buffer) -> bytes:
    state = _C.Xxh3()
    state.update(memoryview(data).cast("B") if memoryview(data).nbytes else b"")
    return bytes(state.digest())

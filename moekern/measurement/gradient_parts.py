"""G of the segments of a part, kept in its file; and the gradient tier of the whole, made of those of all parts.

What the tier holds of G (norms, cosines, ...) is no sum, so that a part cannot know it. `merge` adds G of all segments
up in the order in which one process does, a layer at a time, and takes it of that.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moekern.errors import InputError
from moekern.files import scratch, sized, standing
from moekern.measurement.gradient_sums import add_to, functionals, joint_fields, matrices
from moekern.model.finite import all_finite
from moekern.model.layerwise import LayerwiseModel
from moekern.model.paged import paged_zeros
from moekern.statistics.disk import GRADIENT, Gradients, made
from moekern.statistics.parts import Finish, Place

IN_MEMORY = 1 << 30  # bytes of one layer's G; more lie in files that the system pages


def kept_of(layerwise: LayerwiseModel) -> Gradients:
    """The experts' matrices of each layer, whose gradients a part keeps."""
    found: dict[str, list[tuple[tuple[int, int, int], int]]] = {}
    for i, key in layerwise.moe_keys.items():
        E = layerwise.layout.layers[key].num_experts
        parts = matrices(layerwise.layers[i], E, layerwise.embedding_size)
        found[key] = [((E, *part.shape), part.hidden_axis) for part in parts]
    return found


def bytes_of(gradients: Gradients, segments: int) -> int:
    """What G of so many segments takes."""
    return segments * sum(4 * prod(shape) for each in gradients.values() for shape, _ in each)


def check_room(out: Path, nbytes: int, segments: int) -> None:
    """Raise InputError where the disk that a part's file goes to has no room for gradients of so many segments."""
    folder = standing(out.parent)
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        takes = f"gradients of {segments} segments take {sized(nbytes)}, and {folder} has {sized(free)} free"
        raise InputError(
            f"--tier gradient: {takes}; make more parts of the text, or name another place (--out)", "system"
        )


def finishing(folder: Path) -> Finish:
    """What makes the gradient tier of a layer of all parts; G beyond IN_MEMORY lies in files in a `folder`."""

    def finish(key: str, places: Mapping[str, Sequence[Place]]) -> dict[str, dict[str, Tensor]]:
        entries = next(iter(places.values()))[0].gradients(key)
        shapes = [entry.shape for entry in entries.values()]
        axes = [int(match[2]) for name in entries if (match := GRADIENT.fullmatch(name))]
        names = ("domain", "joint")[: 1 + (len(places) > 1)]
        fields: dict[str, dict[str, Tensor]] = {}
        with ExitStack() as stack:
            paged = len(names) * sum(4 * prod(shape) for shape in shapes) > IN_MEMORY
            place = stack.enter_context(scratch(folder, "spill")) if paged else None
            sums = {name: [_zeros(place, f"G-{name}-{n}", shape) for n, shape in enumerate(shapes)] for name in names}
            for domain, segments in places.items():
                for total in sums["domain"]:
                    total.zero_()
                for segment in segments:
                    _add_segment(sums["domain"], key, segment)
                fields[domain] = functionals(axes, sums["domain"])
                for total, own in zip(sums.get("joint", []), sums["domain"], strict=False):
                    add_to(total, own)
            joint = functionals(axes, sums["joint"]) if "joint" in sums else next(iter(fields.values()))
            united = joint_fields(joint, len(fields))
        for domain, found in fields.items():
            found |= united
            wrong = next((name for name, value in found.items() if not all_finite(value)), None)
            if wrong is not None:
                raise InputError(
                    f"merge: layer {key}, domain {domain}: {wrong}: gradients of the parts add up to no number"
                )
        return fields

    return finish


def _zeros(folder: Path | None, name: str, shape: Sequence[int]) -> Tensor:
    return torch.zeros(tuple(shape)) if folder is None else paged_zeros(folder / name, shape, "gradients")


def _add_segment(totals: Sequence[Tensor], key: str, segment: Place) -> None:
    """totals [E, rows, columns] += G of a segment, an expert at a time. Raises InputError where it cannot be read."""
    layer = segment.part.layers[key]
    try:
        with segment.part.path.open("rb") as file:
            if made(os.fstat(file.fileno())) != layer.made:
                raise ValueError("the file was changed after it was opened")
            for total, entry in zip(totals, segment.gradients(key).values(), strict=True):
                file.seek(entry.start)
                for own in total:
                    values = np.fromfile(file, "<f4", own.numel())
                    if values.size != own.numel():
                        raise ValueError(f"{entry.name}: the file has shrunk")
                    own += torch.from_numpy(values).view_as(own)
    except (OSError, ValueError) as error:
        raise InputError(f"{segment.part.path}: layer {key}: {error}") from error

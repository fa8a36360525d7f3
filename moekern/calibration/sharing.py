"""What several processes, or calibrations that know nothing of each other, can measure together, and must agree on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import Segment, TokenData, dealt
from moekern.errors import InputError
from moekern.measurement.tiers import TABLE, backends_of, not_by_segments
from moekern.model.compute import Compute
from moekern.model.products import library_of
from moekern.statistics.parts import part_header
from moekern.team import Part
from moekern.version import versions


def check_tiers_of(tiers: Collection[str], part: Part | None, first: Path | None = None) -> None:
    """Raise InputError for a tier that needs all of the text, where a part has a share of it, and for a `first` pass
    that nothing is counted by."""
    if first is not None and (part is None or "outliers" not in tiers):
        raise InputError(f"--first {first}: parts of the tier outliers are counted by it; give --part and that tier")
    for tier in not_by_segments(tiers) if part is not None else ():
        if TABLE[tier].by == "backward":  # G of its segments is kept in the part's file
            continue
        if (of_two := TABLE[tier].by == "second pass") and first is not None:
            continue
        then = "give as --first what parts of the tier dimensions, merged, have measured" if of_two else "leave it out"
        share = "" if part is None else f"--part {part.number}/{part.of}"
        raise InputError(f"--tier {tier}: it needs all of the text, and {share} has a share; {then}")


def deciding_threads(compute: Compute, tiers: Collection[str] = ()) -> int | None:
    """The number of threads where it decides the bits, else None.

    On a CPU, torch's 1, 2, 4, 8, ... threads share the work so that all of them round alike; see `model.products`. That
    is not so for other numbers, nor for gradients, whose sums over tokens are matrix products.
    """
    threads = torch.get_num_threads()
    alike = compute.place.type != "cpu" or threads & (threads - 1) == 0
    return None if alike and "gradient" not in tiers else threads


def deciding_library(compute: Compute) -> str | None:
    """The library that makes the experts' products where it is another than torch's choice, else None."""
    dtype = None if compute.dtype_name is None else getattr(torch, compute.dtype_name, None)
    return library_of(dtype) if compute.place.type == "cpu" and dtype is not None else None


def recipe_of(data: TokenData, compute: Compute, tiers: Collection[str]) -> dict[str, Any]:
    """All that decides the bits of statistics: the recipe of the data, the number of threads where it matters, and the
    library of the experts' products where it is another than torch's choice."""
    deciding = {"threads": deciding_threads(compute, tiers), "products": deciding_library(compute)}
    return dict(data.recipe) | {name: value for name, value in deciding.items() if value is not None}


def facts_of(checkpoint: Checkpoint, compute: Compute, tiers: Collection[str] = ()) -> dict[str, object]:
    """What decides the bits of a process beside text and options, which rank 0 gives to all."""
    place = compute.place
    on_cpu = place.type == "cpu"
    chip = f"a CPU of kind {torch.backends.cpu.get_cpu_capability()}" if on_cpu else str(place.type)
    backends = backends_of(compute.device, compute.backend)
    return {
        "model": checkpoint.fingerprint,
        "config.json": checkpoint.config_sha256,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else chip,
        "kernels": ", ".join(sorted(set(backends.values()))),
        "threads": deciding_threads(compute, tiers) or "1, 2, 4, ...",
        "products": deciding_library(compute) or "torch",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }


def share_of(data: TokenData, part: Part) -> list[Segment]:
    """The segments of one part. Raises InputError where there are fewer segments than parts."""
    units = data.units()
    if part.of > len(units):
        raise InputError(
            f"--part {part.number}/{part.of}: the text has {len(units)} segments; make no more parts of it"
        )
    owners = dealt([unit.tokens for unit in units], part.of)
    return [unit for unit, owner in zip(units, owners, strict=True) if owner == part.number - 1]


def kept_apart(units: Sequence[Segment]) -> dict[str, Segment]:
    """The same by their names in a part's file, each a domain of its own: so its sums are not added to others."""
    return {name: replace(u, domain=name, number=0) for u in units for name in (f"{u.domain}/{u.number}",)}


def header_of_part(
    header: Mapping[str, Any], part: Part, units: Sequence[Segment], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The header of a part's file, from that of the whole calibration, which does not name these `options`."""
    segments = {name: (u.domain, u.number) for name, u in zip(kept_apart(units), units, strict=True)}
    return part_header(header, part, segments, options, {name: u.tokens for name, u in kept_apart(units).items()})

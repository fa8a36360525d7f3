"""Tensors that a refit has computed, or training has changed: what a pruned checkpoint claims of them, and whether that
can be so.

They stand in no source. So they are held against their dtype, their shape and the checksum that they got then, must be
finite, and are compared with the same computation where somebody can make it again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import moekern._C as _C
from moekern.architectures import Layout
from moekern.checkpoint.folder import MANIFEST
from moekern.layer_keys import natural
from moekern.plan.document import Plan
from moekern.plan.refit import check_merged, refit_of
from moekern.plan.router_rows import routers_computed
from moekern.verification.opened import Folder

FLOAT8 = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = {**PLAIN, **FLOAT8}

Described = tuple[str, list[int]]  # dtype and shape
Recompute = Callable[[str], Mapping[str, Any]]  # layer key -> name -> bytes, as a refit made them


@dataclass(frozen=True)
class Claim:
    """What a file of the folder says of a tensor: its checksum, hex, None where it has none; the layer that a refit
    computed it for, None where training has changed it."""

    layer: str | None
    kind: str | None  # of the checksum
    checksum: str | None
    plain: bool = True  # plain numbers may have another dtype than the source's
    words: tuple[str, str, str] = ("refit leaves", "computed", MANIFEST)  # for people; last the file of the checksum


@dataclass
class Found:
    """What became of the tensors that were claimed."""

    problems: list[str] = field(default_factory=list)
    nbytes: int = 0
    unchecked: int = 0  # no checksum to hold them against
    recomputed: int = 0  # the same bytes when they were computed again


def layers_refitted(plan: Plan, layout: Layout, sources: Mapping[str, str]) -> dict[str, str]:
    """Name -> layer, for each tensor of the pruned checkpoint that the plan's refit may have computed. sources: name in
    the pruned checkpoint -> name in the source. Raises InputError for the plan, which must say so of layers whose
    experts are merged."""
    check_merged(plan)
    record = refit_of(plan)
    experts = {t.name: key for key, layer in layout.layers.items() for t in layer.of_role("expert")}
    experts |= routers_computed(plan, layout)
    found = {name: experts.get(source) for name, source in sources.items()}
    return {name: key for name, key in found.items() if key is not None and record is not None and key in record.layers}


def claims_of(
    lines: Sequence[Mapping[str, Any]],
    plan: Plan,
    layers: Mapping[str, str],
    trained: Collection[str],
    problems: list[str],
) -> dict[str, Claim]:
    """Name -> claim, for each tensor that the manifest's lines say was refitted, that is in `layers_refitted`, and was
    not `trained` since. What is wrong is added to `problems`; raises InputError for the plan alone."""
    record, claims = refit_of(plan), dict[str, Claim]()
    for line in lines:
        found, shard = line.get("refit"), line.get("shard")
        if found is None:
            continue
        names, recipe = (found.get(key) if isinstance(found, dict) else None for key in ("tensors", "recipe"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            problems.append(f"{MANIFEST}: {shard}: refit: expected a recipe and names of tensors")
        elif record is None:
            problems.append(f"{MANIFEST}: {shard}: has refitted tensors, and the plan says nothing of a refit")
        elif recipe != record.recipe:
            problems.append(f"{MANIFEST}: {shard}: refitted by another recipe than the plan's")
        else:
            for name in (name for name in names if name not in trained):
                layer = layers.get(name)
                if layer is None:
                    problems.append(f"{MANIFEST}: {name} was refitted, and is of no expert of a layer that was")
                else:
                    checksum = line["tensors"].get(name) if isinstance(line.get("tensors"), dict) else None
                    claims[name] = Claim(layer, line.get("checksum"), checksum)
    there = {layers[name] for name in (*claims, *trained) if name in layers}
    for key in record.layers if record else ():
        if key not in there:
            problems.append(f"{MANIFEST}: names no refitted tensor of layer {key}, which the plan says was refitted")
    return claims


def computed_tensors(
    claims: Mapping[str, tuple[Claim, Described]], new: Folder, plan: Plan, recompute: Recompute | None, *, full: bool
) -> Found:
    """claims: name -> claim, and the dtype and shape that the tensor must have. With `recompute` layers are computed
    again: the first that was refitted, and one that the plan's digest draws; all of them with `full`. Trained tensors
    are not."""
    found, right = Found(), dict[str, str]()
    for name, (claim, expected) in claims.items():
        problem, checked, nbytes = checked_tensor(name, claim, expected, new)
        found.nbytes += nbytes
        if problem:
            found.problems.append(problem)
            continue
        if claim.layer is not None:
            right[name] = claim.layer
            found.unchecked += not checked
    layers = sorted(set(right.values()), key=natural)
    if not full and len(layers) > 2:
        layers = [layers[0], layers[1 + int(plan.digest, 16) % (len(layers) - 1)]]
    for key in layers if recompute else ():
        assert recompute is not None
        made, names = recompute(key), {name for name, layer in right.items() if layer == key}
        known = {name for name, (claim, _) in claims.items() if claim.layer in (key, None)}
        for name in sorted(made.keys() - known):
            found.problems.append(f"{name}: is computed again for layer {key}, and {MANIFEST} does not name it")
        for name in sorted(names):
            if name not in made:
                found.problems.append(f"{name}: is not among what is computed again for layer {key}")
            elif not _same(memoryview(made[name]), new.all_bytes(name)):
                found.problems.append(f"{name}: differs from what is computed again")
            else:
                found.recomputed += 1
    return found


def checked_tensor(name: str, claim: Claim, expected: Described, new: Folder) -> tuple[str | None, bool, int]:
    """What is wrong with a computed tensor, or None; whether it was held against a checksum; its bytes."""
    (dtype, shape), (want, want_shape) = new.described(name), expected
    if dtype != want and not (claim.plain and {dtype, want} <= {*PLAIN}):
        return f"{name}: dtype {dtype}, expected {want}", False, 0
    if shape != want_shape:
        return f"{name}: shape {shape}, expected {want_shape}", False, 0
    state, finite, nbytes = _hash_of(claim.kind), True, 0
    for block in new.all_bytes(name):
        flat = block.reshape(-1)
        nbytes += flat.numel()
        if state is not None:
            state.update(flat.numpy())
        if dtype in FLOATS:
            numbers = flat.view(FLOATS[dtype])
            finite = finite and bool((numbers.float() if dtype in FLOAT8 else numbers).isfinite().all())
    if not finite:
        return f"{name}: holds NaN or infinities, which no {claim.words[0]}", False, nbytes
    checked = state is not None and claim.checksum is not None
    if checked and state.digest().hex() != claim.checksum:
        _, made, file = claim.words
        return f"{name}: differs from what was {made}, whose checksum is in {file}", True, nbytes
    return None, checked, nbytes


def _hash_of(kind: str | None) -> Any:
    """None where there is no checksum, or the library that would make it."""
    if kind == "xxh3-128":
        return _C.Xxh3()
    if kind == "blake3":
        try:
            import blake3
        except ImportError:
            return None
        return blake3.blake3()
    return None


def _same(want: memoryview, blocks: Iterator[Tensor]) -> bool:
    at, flat = 0, want.cast("B") if want.nbytes else want
    for block in blocks:
        got = memoryview(block.reshape(-1).numpy().data)
        if flat[at : at + got.nbytes] != got:
            return False
        at += got.nbytes
    return at == want.nbytes

"""Experts that are constants in a checkpoint: which tensors must be there instead of theirs, and what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moekern.architectures import Layout
from moekern.architectures.substitution import (
    APPROXIMATE,
    COMPRESSION,
    FORMS,
    constant_name,
    experts_prefix,
    replace_problem,
    with_replaced,
)
from moekern.checkpoint.folder import CONFIG, MANIFEST, Checkpoint
from moekern.checkpoint.strict_json import read_json
from moekern.errors import InputError
from moekern.plan.document import Plan
from moekern.plan.replacement import ZERO
from moekern.verification.computed import Claim, checked_tensor
from moekern.verification.opened import Folder


class Vectors(Protocol):
    """What experts become, [E, H] float64 by layer."""

    def of(self, layer: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Constant:
    """What must stand for a dropped expert, whose down projection `source` was: dtype and shape."""

    layer: str
    expert: int
    source: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Replaced:
    """What becomes of the dropped experts of a plan that replaces them; empty of one that does not. `gone` are the
    source's tensors that are not there any longer, `kept` all experts, none of which has another number."""

    form: str | None = None
    dropped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)  # what moekern_plan.json must say of it

    def config(self, before: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
        """config.json as it must be, beside what pruning makes of it."""
        return before if self.form is None else with_replaced(before, layout, self.dropped, self.form)


def replaced_in(
    checkpoint: Checkpoint, layout: Layout, plan: Plan, record: Mapping[str, Any] | None, folder: Path
) -> Replaced:
    """What must be there. The form is the one that the folder's record names, else that of its config.json. Raises
    InputError for a source whose experts cannot be replaced."""
    if plan.replace is None:
        return Replaced()
    if (problem := replace_problem(checkpoint, layout)) is not None:
        raise InputError(f"{checkpoint.folder}: experts cannot become constants: {problem}")
    told = _told(record)
    form = next((each for each in FORMS if told.get("form") == each), None) or _form_of(folder)
    dropped, constants, gone = dict[str, tuple[int, ...]](), dict[str, Constant](), set[str]()
    for key, layer in layout.layers.items():
        dropped[key] = tuple(e for e in range(layer.num_experts) if e not in plan.layers[key].keep)
        for tensor in layer.of_role("expert"):
            if tensor.expert is not None and tensor.expert in dropped[key]:
                gone.add(tensor.name)
                if tensor.projection == "down" and not tensor.is_bias:
                    entry = checkpoint.tensors[tensor.name]
                    name = constant_name(form, experts_prefix(layer), tensor.expert)
                    constants[name] = Constant(key, tensor.expert, entry.name, entry.dtype, entry.shape[:1])
    whole = {key: tuple(range(layer.num_experts)) for key, layer in layout.layers.items()}
    made_of = plan.replace.document()
    if plan.replace.tier is not None and isinstance(told.get("statistics"), str):
        made_of.setdefault("statistics", told["statistics"])  # which the plan need not name
    return Replaced(form, dropped, constants, frozenset(gone), whole, {"form": form, **made_of})


def _told(record: Mapping[str, Any] | None) -> Mapping[str, Any]:
    found = (record or {}).get("replaced")
    return found if isinstance(found, dict) else {}


def _form_of(folder: Path) -> str:
    try:
        config = read_json(folder / CONFIG)
    except InputError:  # which is told elsewhere
        return APPROXIMATE
    return COMPRESSION if "compression_config" in config and "approximate_experts" not in config else APPROXIMATE


def constant_problems(
    constants: Mapping[str, Constant],
    plan: Plan,
    vectors: Vectors | None,
    lines: list[dict[str, Any]],
    new: Folder,
) -> Iterator[str]:
    """A line for each constant that is not what it must be: its dtype, its shape, finite numbers, the checksum that it
    was written with, and where it is zeros, or `vectors` are given, its very bytes."""
    told = {
        name: (line.get("checksum"), checksum)
        for line in lines
        if isinstance(line.get("tensors"), dict)
        for name, checksum in line["tensors"].items()
    }
    for name, constant in constants.items():
        if name not in new.shards:
            continue
        kind, checksum = told.get(name, (None, None))
        claim = Claim(constant.layer, kind, checksum, plain=False, words=("constant holds", "written", MANIFEST))
        problem, _, _ = checked_tensor(name, claim, (constant.dtype, list(constant.shape)), new)
        if problem is not None:
            yield problem
            continue
        if (want := _wanted(constant, plan, vectors)) is not None:
            got = new.tensor(name)
            if not torch.equal(want.to(got.dtype), got):
                yield f"{name}: differs from what {_kind(plan)} makes of expert {constant.expert}"


def is_known(plan: Plan, vectors: Vectors | None) -> bool:
    """Whether constants of a plan are compared with what they must be."""
    return plan.replace is not None and (_kind(plan) == ZERO or vectors is not None)


def _kind(plan: Plan) -> str:
    assert plan.replace is not None
    return plan.replace.constants


def _wanted(constant: Constant, plan: Plan, vectors: Vectors | None) -> Tensor | None:
    """float32; None where it cannot be known."""
    if _kind(plan) == ZERO:
        return torch.zeros(constant.shape)
    return None if vectors is None else torch.from_numpy(vectors.of(constant.layer)[constant.expert]).float()

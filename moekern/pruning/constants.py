"""The vectors that stand for dropped experts, where they are replaced; see `architectures.substitution`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moekern.architectures import Layout
from moekern.architectures.substitution import FORMS, check_form, constant_name, experts_prefix, replace_problem
from moekern.checkpoint.dtypes import decode, encode
from moekern.checkpoint.folder import Checkpoint
from moekern.checkpoint.header import TensorEntry
from moekern.errors import InputError
from moekern.plan.document import Mtp, Plan
from moekern.plan.replacement import Replacement
from moekern.pruning.pieces import Computed, computed, recipe


class Vectors(Protocol):
    """What experts of a model become, made of statistics."""

    @property
    def replacement(self) -> Replacement:
        """What they are, and of which statistics."""

    def of(self, layer: str) -> np.ndarray:
        """[E, H] float64."""

    def idle(self, layer: str) -> Sequence[int]:
        """Experts that no token was routed to, for which zeros stand."""


@dataclass(frozen=True)
class Replaced:
    """What becomes of the dropped experts of a plan: `dropped` by layer key, rising. vectors: None for zeros."""

    form: str
    dropped: Mapping[str, Sequence[int]]
    vectors: Vectors | None

    def constant(self, layout: Layout, key: str, expert: int) -> Constant:
        name = constant_name(self.form, experts_prefix(layout.layers[key]), expert)
        return Constant(name, key, expert, self.vectors)

    def made_of(self, plan: Plan) -> Replacement:
        """What the constants are, and of which statistics, which a plan need not name."""
        assert plan.replace is not None
        return plan.replace if self.vectors is None else self.vectors.replacement

    def notes(self) -> tuple[str, ...]:
        """A line where some of the experts were never routed to."""
        idle = (
            sum(len({*self.vectors.idle(key)} & {*gone}) for key, gone in self.dropped.items()) if self.vectors else 0
        )
        all_of = sum(map(len, self.dropped.values()))
        told = f"{idle} of the {all_of} replaced experts had no token in the statistics: zeros stand for them"
        return (told,) if idle else ()


@dataclass(frozen=True)
class Constant:
    """The vector of one expert, in the place of its down projection."""

    name: str
    layer: str
    expert: int
    vectors: Vectors | None

    def piece(self, entry: TensorEntry, size: int) -> Computed:
        """Its bytes, in the dtype of `entry`. Raises InputError, when they are made, for another length than `size`
        and for what is not finite in that type."""
        made_of = None if self.vectors is None else self.vectors.replacement.document()
        digest = recipe("constant", [], made_of=made_of, layer=self.layer, expert=self.expert, dtype=entry.dtype)
        return computed(self.name, digest, len(encode(np.zeros(size), entry.dtype)), lambda: self._make(entry, size))

    def _make(self, entry: TensorEntry, size: int) -> bytes:
        vector = np.zeros(size) if self.vectors is None else self.vectors.of(self.layer)[self.expert]
        if vector.shape != (size,):
            what = f"the statistics have {len(vector)} numbers of an expert's output, and its down projection {size}"
            raise InputError(f"{self.name}: {what}")
        data = encode(vector, entry.dtype)
        if not np.isfinite(decode(data, entry.dtype)).all():
            raise InputError(f"{self.name}: a constant is beyond the range of {entry.dtype}; use --replace zero")
        return data


def replaced_experts(
    checkpoint: Checkpoint, layout: Layout, plan: Plan, form: str | None, vectors: Vectors | None, mtp: Mtp
) -> Replaced | None:
    """What a plan makes of its dropped experts; None where they are simply gone.

    Raises InputError for a model or a form that it cannot be, without the statistics that the constants are made of or
    with others than the plan names, and where MTP layers would be pruned.
    """
    if plan.replace is None:
        if form is not None or vectors is not None:
            raise InputError("--form, --statistics: the plan drops experts, and replaces none; add --replace")
        return None
    form = FORMS[0] if form is None else form
    check_form(form)
    if (problem := replace_problem(checkpoint, layout)) is not None:
        raise InputError(f"{checkpoint.folder}: experts cannot become constants: {problem}")
    if mtp == "prune" and layout.mtp:
        why = "calibration does not run MTP layers, so that nothing is known to put in the place of their experts"
        raise InputError(f"--mtp prune: {why}; use --mtp keep or --mtp drop")
    check_vectors(plan.replace, vectors)
    dropped = {
        key: tuple(sorted(set(range(layer.num_experts)) - set(plan.layers[key].keep)))
        for key, layer in layout.layers.items()
    }
    return Replaced(form, dropped, vectors)


def check_vectors(asked: Replacement, vectors: Vectors | None) -> None:
    """Raise InputError unless these are what a plan asks for."""
    if asked.tier is None:
        if vectors is not None:
            raise InputError("--statistics: the plan replaces experts by zeros, which need none")
    elif vectors is None:
        raise InputError(f"--statistics: the plan replaces experts by constants ({asked.constants}): give their file")
    elif vectors.replacement.constants != asked.constants:
        raise InputError(f"--statistics: {vectors.replacement.constants} was made, the plan asks for {asked.constants}")

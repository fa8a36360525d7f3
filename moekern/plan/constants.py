"""The constants that stand for replaced experts, made of statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from moekern.architectures import Layout
from moekern.architectures.substitution import PLAIN, Constants
from moekern.architectures.twins import router_numbers, same_routers
from moekern.checkpoint.dtypes import decode, encode
from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError
from moekern.plan.document import Plan
from moekern.plan.replacement import LEAST_SQUARES, MEAN, Replacement, check_kind
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics

Live = Callable[[str], Mapping[int, Tensor]]  # layer key -> expert -> what it returns, float32 [H], or [1] for all H


@dataclass
class Measured:
    """As `pruning.constants.Vectors`: one layer's are held."""

    statistics: Statistics
    replacement: Replacement
    held: dict[str, tuple[np.ndarray, Sequence[int]]] = field(default_factory=dict)  # of one layer

    def of(self, layer: str) -> np.ndarray:
        """[E, H] float64."""
        return self._layer(layer)[0]

    def idle(self, layer: str) -> Sequence[int]:
        """Experts that no token was routed to, for which zeros stand."""
        return self._layer(layer)[1]

    def _layer(self, layer: str) -> tuple[np.ndarray, Sequence[int]]:
        if layer not in self.held:
            self.held.clear()
            if layer not in self.statistics.layers:
                raise InputError(f"--statistics: they have no layer {layer}, which the plan has")
            tier = self.replacement.tier
            assert tier is not None
            sums = self.statistics.layer(layer, self.replacement.domains, (tier,))
            values = constants(sums, self.replacement.constants)
            self.held[layer] = values, (sums.count == 0).nonzero().flatten().tolist()
        return self.held[layer]


def constants(sums: LayerStatistics, kind: str) -> np.ndarray:
    """What stands for each expert's output, [E, H] float64: y the output before the gate g, over the n tokens that the
    expert got, mean: sum y / n (MoNE, arXiv:2507.00390); least-squares: sum g^2 y / sum g^2. Zeros where n is 0."""
    over, under = {
        MEAN: (sums.value_sum, sums.count.double()),
        LEAST_SQUARES: (sums.gated_value_sum, sums.gated_value_weight),
    }[kind]
    known = (under > 0)[:, None]
    return (over / under.clamp(min=1e-300)[:, None]).where(known, 0).numpy()


def measured(
    statistics: Statistics, asked: Replacement, checkpoint: Checkpoint | None = None, layout: Layout | None = None
) -> Measured:
    """The constants that a plan asks for. Raises InputError for a tier or a domain that the statistics lack, for
    another file than the plan names, for what lies in no file, and for statistics of another model than the
    checkpoint, and no twin of it."""
    assert asked.tier is not None
    sha256 = statistics.sha256
    if sha256 is None:
        raise InputError("--statistics: constants are made of a statistics file; save these first")
    if asked.statistics is not None and sha256 != asked.statistics:
        found = f"they have the sha256 {sha256[:12]}, the plan names {asked.statistics[:12]}"
        raise InputError(f"--statistics: others than the plan's constants are made of: {found}")
    _check_tier(statistics, asked)
    if checkpoint is not None and layout is not None and statistics.header["fingerprint"] != checkpoint.fingerprint:
        known_routers = statistics.header.get("routers")
        if not known_routers or not same_routers(known_routers, router_numbers(checkpoint, layout)):
            raise InputError(f"--statistics: they were measured on another model than {checkpoint.name}")
    return Measured(statistics, replace(asked, statistics=sha256))


def _check_tier(statistics: Statistics, asked: Replacement) -> None:
    """Raise InputError for a tier or a domain that the statistics lack."""
    if asked.tier not in statistics.tiers:
        raise InputError(
            f"--replace {asked.constants}: the statistics lack the tier {asked.tier}; "
            f"add it to calibrate (--tier {asked.tier})"
        )
    for domain in asked.domains or ():
        if domain not in statistics.domains:
            known = ", ".join(statistics.domains)
            raise InputError(f"--statistics: they lack the domain {domain} of the plan's constants; they have {known}")


def live_constants(plan: Plan, checkpoint: Checkpoint, layout: Layout, vectors: Measured | None) -> Live:
    """What the dropped experts of a plan return, with the bits that the pruned checkpoint would hold. vectors: None for
    zeros."""

    def of(key: str) -> dict[int, Tensor]:
        layer, keep = layout.layers[key], set(plan.layers[key].keep)
        dropped = [e for e in range(layer.num_experts) if e not in keep]
        if vectors is None:
            return dict.fromkeys(dropped, torch.zeros(1))
        downs = (t for t in layer.of_role("expert") if t.projection == "down" and not t.is_bias)
        dtypes = {checkpoint.tensors[tensor.name].dtype for tensor in downs}
        dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= {*PLAIN} else "F32"
        values = vectors.of(key)
        return {e: torch.from_numpy(decode(encode(values[e], dtype), dtype).astype(np.float32)) for e in dropped}

    return of


def stored_constants(checkpoint: Checkpoint, layers: Mapping[str, Constants]) -> Live:
    """What the replaced experts of a checkpoint return; `layers` is as `substitution.as_whole` gives it."""

    def of(key: str) -> dict[int, Tensor]:
        tensors = layers[key].tensors if key in layers else {}
        return {e: torch.from_numpy(checkpoint.array(name).astype(np.float32)) for e, name in tensors.items()}

    return of


def constants_digest(checkpoint: Checkpoint, layers: Mapping[str, Constants]) -> str:
    """sha256 of all that the replaced experts of a checkpoint return."""
    digest = hashlib.sha256()
    for key, constants in sorted(layers.items()):
        for expert, name in sorted(constants.tensors.items()):
            digest.update(repr((key, expert, checkpoint.tensors[name].dtype)).encode() + checkpoint.read(name))
    return digest.hexdigest()


def replacing(plan: Plan, kind: str, statistics: Statistics | None) -> Plan:
    """The same plan with its dropped experts replaced: by what statistics give over the domains that the plan counts,
    where they have these, else over all. Raises InputError for an unknown kind, and without statistics where they are
    needed."""
    check_kind(kind)
    asked = Replacement(kind)
    if asked.tier is None:
        return replace(plan, replace=asked)
    if statistics is None:
        raise InputError(f"--replace {kind}: needs --statistics, which the constants are made of")
    counted = plan.provenance.get("domains")
    domains = tuple(map(str, counted)) if isinstance(counted, list) else ()
    some = bool(domains) and set(domains) < set(statistics.domains)
    asked = Replacement(kind, statistics.sha256, domains if some else None)
    _check_tier(statistics, asked)
    return replace(plan, replace=asked)

"""What the card of a pruned checkpoint tells, found from the original, the plan and what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moekern.architectures import Layout
from moekern.architectures.channels import PLAIN
from moekern.architectures.config_keys import model_types
from moekern.architectures.quantisation import quantisation_of
from moekern.checkpoint.contents import MODEL_CARD, kept_card
from moekern.checkpoint.folder import PLAN_FILE, Checkpoint
from moekern.estimation.overview import OWN_CODE, running
from moekern.plan.document import Mtp, Plan
from moekern.plan.mtp import Mtp as StoredMtp
from moekern.plan.served import served_as
from moekern.plan.serving import commands_of
from moekern.plan.targets import ENGINES, Target, findings
from moekern.pruning.shards import OutputShard
from moekern.publishing.card import FOLDER, Facts
from moekern.publishing.front_matter import base_of, inherited, values_of


def facts_of(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    kept: Mapping[str, Sequence[int]],
    shards: Sequence[OutputShard],
    config: Mapping[str, Any],
    mtp: Mtp,
    told: str,
    flags: Sequence[str] = (),
) -> Facts:
    """kept: the experts that stay, of MTP layers too; config: that of the result; told: a line about MTP layers; flags:
    those that made it, where the plan does not say so."""
    values = values_of(checkpoint.folder / MODEL_CARD) if MODEL_CARD in checkpoint.side_files else {}
    base, _, commit = (checkpoint.repository or "").partition("@")
    if (checkpoint.folder / PLAN_FILE).is_file():
        base = base or base_of(values) or ""
    return Facts(
        name=base or str(next(iter(model_types(checkpoint.config)), layout.family.name)),
        base=base or None,
        commit=commit or None,
        fingerprint=checkpoint.fingerprint,
        layers={key: (layer.num_experts, len(kept[key])) for key, layer in layout.layers.items()},
        top_k=layout.router.top_k,
        width=(layout.width, layout.width if plan.width is None else plan.width),
        parameters=_parameters(checkpoint, layout, kept, shards, plan.width),
        nbytes=(checkpoint.nbytes, sum(shard.data_bytes for shard in shards)),
        settings=tuple(_changes(checkpoint.config, config)),
        plan=plan,
        mtp=told,
        serve=_serve(checkpoint, layout, plan, kept, mtp),
        original_card=kept_card(checkpoint.side_files),
        inherited=inherited(values),
        flags=flags,
    )


def _parameters(
    checkpoint: Checkpoint,
    layout: Layout,
    kept: Mapping[str, Sequence[int]],
    shards: Sequence[OutputShard],
    width: int | None,
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """All parameters and those that a token uses, before and after; None where weights are no plain numbers. MTP layers
    count as not used."""
    entries, written = checkpoint.tensors, [tensor for shard in shards for tensor in shard.tensors]
    if quantisation_of(checkpoint.config) or any(entry.dtype not in PLAIN for entry in entries.values()):
        return None
    before = {name: math.prod(entry.shape) for name, entry in entries.items()}
    after = {tensor.name: tensor.elements for tensor in written}
    left_of = (width or 1) / (layout.width or 1) if width is not None else 1.0
    idle = [0.0, 0.0]
    for key, layer in layout.layers.items():
        routed, left = sum(before[tensor.name] for tensor in layer.of_role("expert")), len(kept[key])
        share = routed * left_of * left / layer.num_experts
        idle[0] += routed * (1 - min(1.0, layout.router.top_k / layer.num_experts))
        idle[1] += share * (1 - min(1.0, layout.router.top_k / left))
    whole, used = sum(before.values()), _beside(before, layout) - idle[0]
    return (whole, round(used)), (sum(after.values()), round(_beside(after, layout) - idle[1]))


def _beside(elements: Mapping[str, int], layout: Layout) -> int:
    """Of all tensors but those of MTP layers."""
    return sum(n for name, n in elements.items() if not name.startswith(layout.mtp_prefixes))


def _changes(before: Any, after: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Values that differ, by dotted path, those of the one alone too."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys((*before, *after)):
            yield from _changes(before.get(key), after.get(key), (*path, str(key)))
    elif json.dumps(before) != json.dumps(after):
        yield ".".join(path), before, after


def _serve(
    checkpoint: Checkpoint, layout: Layout, plan: Plan, kept: Mapping[str, Sequence[int]], mtp: Mtp
) -> dict[str, str]:
    """Engine -> command, of those that are known to run the result."""
    served = served_as(layout, checkpoint.config).narrowed(plan.width)
    served = replace(served, replaced=plan.replace is not None)
    counts = {key: len(kept[key]) for key in layout.layers}
    of_mtp = tuple(len(kept[key]) if key in kept else layer.num_experts for key, layer in layout.mtp.items())
    stored = StoredMtp((), ()) if mtp == "drop" else StoredMtp(of_mtp, layout.mtp_prefixes)
    found = {engine: tuple(findings(Target(engine), counts, served, stored)) for engine in ENGINES}
    return commands_of(Path(FOLDER), found, own_code=running(layout.family, checkpoint.config)[1] == OWN_CODE)

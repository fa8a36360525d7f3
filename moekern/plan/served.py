"""Which engines run a checkpoint, by its headers and config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moekern.architectures import Layout, find_layout
from moekern.architectures.config_keys import model_types
from moekern.architectures.substitution import as_whole
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.estimation.overview import OWN_CODE, running
from moekern.plan.engines import Finding
from moekern.plan.formats import name_in, weight_format
from moekern.plan.mtp import Mtp
from moekern.plan.shards import shards_of
from moekern.plan.targets import ENGINES, Served, Target, findings, nearest, runs


@dataclass(frozen=True)
class Report:
    """Where a checkpoint runs: target -> the rules it breaks."""

    folder: str
    model: str  # the folder, or a hub id and its commit
    family: str
    counts: Mapping[str, int]  # layer key -> experts
    mtp: Mapping[str, int]
    found: Mapping[str, tuple[Finding, ...]]
    nearest: Mapping[str, str]  # of targets that do not run it: counts that would, as the end of a message
    replaced: bool = False  # dropped experts are constants, and the counts those of the others
    own_code: bool = False  # the code of its model lies beside the weights, and nothing else runs it

    @property
    def good(self) -> bool:
        """Whether no target refuses it; what is not known does not count."""
        return all(verdict(row) is not False for row in self.found.values())

    def document(self) -> dict[str, Any]:
        targets = {
            name: {
                "runs": verdict(row),
                "findings": [{"stops": finding.stops, "text": finding.text} for finding in row],
            }
            for name, row in self.found.items()
        }
        uniform = len(set(self.counts.values())) == 1
        return {
            "folder": self.folder, "model": self.model, "family": self.family, "uniform": uniform,
            "experts": dict(self.counts), "mtp": dict(self.mtp), "targets": targets,
        }  # fmt: skip


def verdict(row: Iterable[Finding]) -> bool | None:
    """Whether an engine runs a model with these findings; None when that is not known."""
    stops = {finding.stops for finding in row}
    return False if True in stops else None if None in stops else True


def check_folder(source: Path | Checkpoint, targets: Sequence[Target] = ()) -> Report:
    """Which targets (none: every engine) run a checkpoint, by its headers and config. Raises InputError."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    checkpoint, constants = as_whole(checkpoint)
    layout = find_layout(checkpoint)
    served = replace(served_as(layout, checkpoint.config), replaced=bool(constants))
    gone = {key: len(each.tensors) for key, each in constants.items()}
    counts = {key: layer.num_experts - gone.get(key, 0) for key, layer in layout.layers.items()}
    mtp = {key: layer.num_experts for key, layer in layout.mtp.items()}
    asked = tuple(targets) or tuple(Target(engine) for engine in ENGINES)
    stored = Mtp(tuple(mtp.values()), layout.mtp_prefixes)
    found = {str(target): tuple(findings(target, counts, served, stored)) for target in asked}
    near = {
        str(target): nearest(layout.num_experts, served, [target])
        for target in asked
        if not served.replaced and not runs(layout.num_experts, served, [target])
    }
    return Report(
        str(checkpoint.folder), checkpoint.name, layout.family.name, counts, mtp, found, near, bool(constants),
        running(layout.family, checkpoint.config)[1] == OWN_CODE,
    )  # fmt: skip


def served_as(layout: Layout, config: Mapping[str, Any]) -> Served:
    """What engines go by: the names of config.json and the format of the weights beside the router's numbers."""
    classes = config.get("architectures")
    names = {text for text in map(name_in, classes if isinstance(classes, list) else ()) if text}
    kinds = {text for text in map(name_in, model_types(config)[:1]) if text} if names else set()
    experts = (tensor.name for layer in layout.layers.values() for tensor in layer.of_role("expert"))
    weights = weight_format(config, experts)
    known_as, keys = frozenset(names | kinds), frozenset(config)
    shards = shards_of(config, layout.family.holder)
    if layout.width is not None:
        shards = replace(shards, width=layout.width)  # of the tensors
    family = layout.family
    return Served(family.name, family.score, layout.router, known_as, weights, keys, shards, rope_of(config))


def rope_of(config: Mapping[str, Any]) -> tuple[float, str] | None:
    """(rope_theta, rope_type) of rope_parameters, as transformers 5 saves them, where the root has no rope_theta."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in config:
        return None
    theta, kind = rope.get("rope_theta"), name_in(rope.get("rope_type", "default"))
    return (float(theta), kind) if isinstance(theta, (int, float)) and 0 < theta < 1e30 and kind else None

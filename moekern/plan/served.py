"""Which engines run a checkpoint, by its headers and config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekern.architectures import find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.plan.targets import ENGINES, Finding, Served, Target, findings, nearest, runs


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

    @property
    def good(self) -> bool:
        return not any(finding.stops for row in self.found.values() for finding in row)

    def document(self) -> dict[str, Any]:
        targets = {
            name: {
                "runs": not any(finding.stops for finding in row),
                "findings": [{"stops": finding.stops, "text": finding.text} for finding in row],
            }
            for name, row in self.found.items()
        }
        uniform = len(set(self.counts.values())) == 1
        return {
            "folder": self.folder, "model": self.model, "family": self.family, "uniform": uniform,
            "experts": dict(self.counts), "mtp": dict(self.mtp), "targets": targets,
        }  # fmt: skip


def check_folder(source: Path | Checkpoint, targets: Sequence[Target] = ()) -> Report:
    """Which targets (none: every engine) run a checkpoint, by its headers and config. Raises InputError."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    served = Served(layout.family.name, layout.family.score, layout.router, layout.family.transformers)
    counts = {key: layer.num_experts for key, layer in layout.layers.items()}
    mtp = {key: layer.num_experts for key, layer in layout.mtp.items()}
    asked = tuple(targets) or tuple(Target(engine) for engine in ENGINES)
    found = {str(target): tuple(findings(target, counts, served, tuple(mtp.values()))) for target in asked}
    near = {
        str(target): nearest(layout.num_experts, served, [target])
        for target in asked
        if not runs(layout.num_experts, served, [target])
    }
    return Report(str(checkpoint.folder), checkpoint.name, layout.family.name, counts, mtp, found, near)

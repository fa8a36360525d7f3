"""Budgets that are smaller than a layer of a tiny model, and room for less text than there is."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.model import layerwise, room
from moekern.model.budget import Budget
from moekern.model.compute import Compute
from moekern.model.expert_groups import Takes

Usage = namedtuple("Usage", "total used free")


def little_room(patch: pytest.MonkeyPatch, memory: int, disk: int) -> None:
    """Bytes of memory and disk that there are for hidden states."""
    patch.setattr(Takes, "room", property(lambda self: memory))
    patch.setattr(room.shutil, "disk_usage", lambda folder: Usage(0, 0, disk))


def taken(folder: Path, compute: Compute = Compute()) -> Takes:
    """What a model takes when it is run whole."""
    checkpoint = open_checkpoint(folder)
    with layerwise.open_layerwise(checkpoint, find_layout(checkpoint), compute) as model:
        assert not model.groups.cuts
        return model.takes


def tighten(patch: pytest.MonkeyPatch, folder: Path, compute: Compute = Compute(), share: float = 0.6) -> None:
    """Let models be run in so much less memory than the layers of this one need, reader and all."""
    whole = taken(folder, compute)
    host = 2 * round(whole.outside + share * (whole.weights + whole.buffer))  # half is for computing
    patch.setattr(layerwise, "budget_of", lambda compute: Budget(host))


def cuts_of(folder: Path, compute: Compute = Compute()) -> int:
    """In how many groups the experts of most of its layers are run then."""
    checkpoint = open_checkpoint(folder)
    with layerwise.open_layerwise(checkpoint, find_layout(checkpoint), compute) as model:
        return max(map(len, model.groups.cuts.values()), default=1)

"""What a plan keeps, as layers in memory are cut by it."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.model.merged_experts import Merging
from moekern.plan.channels import channel_rows
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.groups import aligned
from moekern.plan.router_rows import router_rows


def live_channels(layer: LayerPlan) -> Tensor | None:
    """The channels that stay of each kept expert, int64 [n, M]; None where all do."""
    return None if layer.channels is None else torch.from_numpy(channel_rows(layer.channels))


def live_merging(plan: Plan, key: str) -> Merging | None:
    """What is merged into the kept experts of a layer; None where nothing is."""
    groups = plan.layers[key].groups
    return None if groups is None else Merging(groups, aligned(plan.provenance), router_rows(plan).get(key, {}))

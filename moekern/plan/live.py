"""What a plan keeps, as layers in memory are cut by it."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.plan.channels import channel_rows
from moekern.plan.document import LayerPlan


def live_channels(layer: LayerPlan) -> Tensor | None:
    """The channels that stay of each kept expert, int64 [n, M]; None where all do."""
    return None if layer.channels is None else torch.from_numpy(channel_rows(layer.channels))

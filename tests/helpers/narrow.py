"""Plans that take channels from experts, and the checkpoints that they make, as transformers itself writes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern.architectures import Layout
from moekern.architectures.widths import narrow_numbers
from moekern.model.pruned_layers import LivePruner
from moekern.model.transformers_api import loader_of
from moekern.plan.channels import channel_text
from moekern.plan.document import LayerPlan, Plan


def random_channels(layout: Layout, keeps: Mapping[str, tuple[int, ...]], width: int, seed: int) -> dict[str, Tensor]:
    """Layer key -> [n, width]: channels of each kept expert, rising."""
    generator, of = torch.Generator().manual_seed(seed), layout.width
    assert of is not None
    picked = lambda: torch.randperm(of, generator=generator)[:width].sort().values  # noqa: E731
    return {key: torch.stack([picked() for _ in keep]) for key, keep in keeps.items()}


def narrow_plan(layout: Layout, keep: tuple[int, ...], width: int, seed: int) -> Plan:
    """The same experts of every layer, each with channels of its own."""
    found = random_channels(layout, dict.fromkeys(layout.layers, keep), width, seed)
    texts = {key: tuple(channel_text(own.numpy(), layout.width or 0) for own in rows) for key, rows in found.items()}
    return Plan({key: LayerPlan(keep, None, own) for key, own in texts.items()})


def save_narrow(model: Any, layout: Layout, plan: Plan, channels: Mapping[str, Tensor], folder: Path) -> Path:
    """The checkpoint of a model in memory without these experts and channels."""
    narrow = copy.deepcopy(model)
    pruner = LivePruner(loader_of(narrow), layout)
    for key, layer in plan.layers.items():
        pruner.prune(key, layer.keep, channels[key])
    width = next(iter(channels.values())).shape[1]
    count = len(next(iter(plan.layers.values())).keep)
    for path, number in (dict.fromkeys(layout.count_paths, count) | narrow_numbers(layout, width)).items():
        setattr(narrow.config, path[-1], number)
    narrow.save_pretrained(folder)
    return folder

"""What the tests of one family share: its model in memory, and its checkpoint pruned to half of the experts.

Only the family in flight is held: the next one's first test drops the last one's.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekern.architectures import FAMILIES, Layout, find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from tests.helpers import families

# Families that cannot be pruned.
REFUSED = {name for family in FAMILIES if family.refused for name in (family.name, *family.also)}
REFUSED |= {"diffusion_gemma"}  # two stacks share their layers, and only one of them has names in the checkpoint


def random_plan(layout: Layout, seed: int, per_group: int | None = None) -> Plan:
    """A different half of the experts in each layer, the same number in each group."""
    rng = random.Random(seed)
    size = layout.num_experts // layout.n_group
    count = per_group or size // 2
    layers = {}
    for key in layout.layers:
        groups = [rng.sample(range(g * size, (g + 1) * size), count) for g in range(layout.n_group)]
        layers[key] = LayerPlan(tuple(sorted(e for group in groups for e in group)))
    return Plan(layers)


@dataclass(frozen=True)
class Half:
    """A family's checkpoint pruned by random_plan."""

    name: str
    layout: Layout
    plan: Plan
    folder: Path

    @cached_property
    def logits(self) -> Tensor:
        """Those of the pruned model for the family's ids; it has every tensor it needs, and no other."""
        model, info = families.load(self.folder, loading_info=True)
        assert not any(info.values()), info
        return families.forward(model, families.input_ids(self.name))


class Shared:
    def __init__(self, checkpoint: Callable[[str], Path], root: Path) -> None:
        self.checkpoint, self.root = checkpoint, root
        self.name = ""
        self.clear()

    def clear(self) -> None:
        self._model: Any = None
        self._before: dict[str, Any] = {}
        self._half: Half | None = None
        shutil.rmtree(self.root / "out", ignore_errors=True)

    def _enter(self, name: str) -> None:
        if name != self.name:
            self.clear()
            self.name = name

    def model(self, name: str) -> Any:
        self._enter(name)
        if self._model is None:
            self._model, info = families.load(self.checkpoint(name), loading_info=True)
            assert not any(info.values()), info
            self._before = state(self._model)
        return self._model

    def check(self) -> None:
        """Whether the model is as it was loaded; if not, the next test gets a new one."""
        if self._model is None:
            return
        changed = differences(self._before, state(self._model))
        if changed:
            self._model = None
        assert not changed, f"the test changed the model that the family's other tests share: {changed[:5]}"

    def half(self, name: str) -> Half:
        self._enter(name)
        if self._half is None:
            folder, out = self.checkpoint(name), self.root / "out"
            layout = find_layout(open_checkpoint(folder))
            plan = random_plan(layout, seed=len(name))
            prune(folder, plan, out)
            self._half = Half(name, layout, plan, out)
        return self._half


def state(model: nn.Module) -> dict[str, Any]:
    """What a test may change in a model by using it: tensors, gradients, hooks, modes and attributes."""
    found: dict[str, Any] = {"implementation": getattr(model.config, "_experts_implementation", None)}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        found[f"tensor {name}"] = value.detach().clone()
        found[f"gradient {name}"] = (value.requires_grad, value.grad is not None)
    for name, module in model.named_modules():
        found[f"module {name}"] = (
            module.training, len(module._forward_hooks), len(module._forward_pre_hooks), frozenset(vars(module)),
        )  # fmt: skip
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    changed = [key for key in a.keys() ^ b.keys()]
    for key in a.keys() & b.keys():
        tensors = isinstance(a[key], Tensor)
        if not (torch.equal(a[key], b[key]) if tensors else a[key] == b[key]):
            changed.append(key)
    return sorted(changed)

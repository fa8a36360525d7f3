"""What a pruned checkpoint with refitted layers is compared with: the original pruned in memory, with the computed
tensors put in as the model's own loader reads them from the folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from moekern.architectures import Layout
from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError
from moekern.model.compute import Compute
from moekern.model.layerwise import LayerwiseModel
from moekern.model.memory import drop
from moekern.model.pruned_layers import LivePruner
from moekern.model.reader import read_tensors
from moekern.model.transformers_api import Loader, open_loader
from moekern.plan.document import Plan
from moekern.plan.live import live_channels
from moekern.plan.router_rows import routers_computed
from moekern.verification.record import manifest_lines


@dataclass(frozen=True)
class RefittedLayers:
    """names: layer key -> its tensors in `after`, the pruned checkpoint, that were computed."""

    plan: Plan
    after: Checkpoint
    layout: Layout  # of `after`, as is the loader
    loader: Loader
    names: Mapping[str, Sequence[str]]

    @contextmanager
    def applied(self, original: LayerwiseModel, pruner: LivePruner, key: str) -> Iterator[None]:
        """Decoder layer `key` of the original, whose weights must be loaded, pruned and refitted meanwhile."""
        kept = self.plan.layers[key]
        with pruner.pruned(key, kept.keep, live_channels(kept)):
            live = original.layers[original.loader.moe_places(original.layout)[key]]
            self._put_in(live, key, original)
            yield

    def _put_in(self, live: nn.Module, key: str, original: LayerwiseModel) -> None:
        """Replace the parameters that computed tensors fill. Whatever else fills these is read from `after` too."""
        filled = {self.loader.model_key(name) for name in self.names[key]}
        routers = (t.name for t in self.layout.router_tensors(key) if t is not None)
        every = [*(t.name for t in self.layout.layers[key].of_role("expert")), *routers]
        names = [name for name in every if self.loader.model_key(name) in filled]
        self.loader.load(read_tensors(self.after, names), original.device)
        module = self.loader.decoder_layers()[1][self.loader.moe_places(self.layout)[key]]
        for name, parameter in module.named_parameters():
            if not parameter.is_meta:
                path, _, leaf = name.rpartition(".")
                live.get_submodule(path)._parameters[leaf] = nn.Parameter(parameter.detach(), requires_grad=False)
        drop(module)


def refitted_layers(plan: Plan, after: Checkpoint, layout: Layout, compute: Compute) -> RefittedLayers:
    """Raises InputError where the folder's manifest names no tensors of a layer that holds experts."""
    layers = {t.name: key for key, layer in layout.layers.items() for t in layer.of_role("expert")}
    layers |= routers_computed(plan, layout)
    names: dict[str, list[str]] = {}
    for line in manifest_lines(after.folder):
        for name in (line.get("refit") or {}).get("tensors", ()):
            if name not in layers:
                raise InputError(f"{after.folder}: {name} was refitted, and is no tensor of an expert or a router")
            names.setdefault(layers[name], []).append(name)
    loader = open_loader(after.folder, compute.torch_dtype, compute.trust_remote_code, layout, len(after.tensors))
    return RefittedLayers(plan, after, layout, loader, names)

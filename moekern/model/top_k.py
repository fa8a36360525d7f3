"""How many experts a token chooses, changed in a model that is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from moekern.architectures import Layout
from moekern.checkpoint.folder import CONFIG
from moekern.errors import InputError
from moekern.model.config_numbers import put_numbers
from moekern.model.transformers_api import Loader, layers_with

Places = Mapping[tuple[str, str], tuple[int, int]]  # module, attribute -> its number as config.json has it, and for k


@dataclass
class TopK:
    """Sets k in all decoder layers of one model. The model's own code has put it into attributes of modules: those that
    differ between models that are built with two numbers, on the meta device."""

    loader: Loader
    layout: Layout
    places: dict[int, Places] = field(default_factory=dict)  # by k
    now: int = field(init=False)  # what each token chooses

    def __post_init__(self) -> None:
        self.now = self.of_config
        self.places[self.now] = {}

    @property
    def of_config(self) -> int:
        return self.layout.router.top_k

    def check(self, k: int) -> None:
        """Raise InputError, naming --top-k, for a number that the model cannot have."""
        name = self.layout.family.name
        if not 1 <= k <= self.of_config:
            raise InputError(
                f"--top-k {k}: each token chooses {self.of_config} experts now; give 1 to {self.of_config}"
            )
        if not self.layout.top_k_paths:
            what = f"its code chooses {self.of_config} experts for each token, whatever {CONFIG} says"
            raise InputError(f"--top-k {k}: {name}: {what}")
        self._places(k)

    def choose(self, k: int) -> None:
        """Let each token choose k experts."""
        if k == self.now:
            return
        modules = dict(self.loader.decoder_layers()[1].named_modules())
        after = self._places(k)
        for (path, name), (own, _) in self.places[self.now].items():
            setattr(modules[path], name, own)
        for (path, name), (_, number) in after.items():
            setattr(modules[path], name, number)
        put_numbers(self.loader.model.config, dict.fromkeys(self.layout.top_k_paths, k))
        self.now = k

    def _places(self, k: int) -> Places:
        if k not in self.places:
            own, other = (
                layers_with(self.loader, dict.fromkeys(self.layout.top_k_paths, n)) for n in (self.of_config, k)
            )
            self._check_shapes(own, other, k)
            was, numbers = _numbers(own), _numbers(other)
            self.places[k] = {at: (was[at], n) for at, n in numbers.items() if was.get(at, n) != n}
        return self.places[k]

    def _check_shapes(self, own: nn.Module, other: nn.Module, k: int) -> None:
        tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for name, value in (*own.named_parameters(), *own.named_buffers()):
            if value.shape != tensors[name].shape:
                what = f"layer {name} has the shape {list(value.shape)} for {self.of_config} experts a token"
                raise InputError(f"--top-k {k}: {self.layout.family.name}: {what}, and stays as it is")


def _numbers(layers: nn.Module) -> dict[tuple[str, str], int]:
    """All plain integers of modules."""
    found = ((path, vars(module)) for path, module in layers.named_modules())
    return {(path, name): value for path, own in found for name, value in own.items() if type(value) is int}

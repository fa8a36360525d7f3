"""Which parameters of a model train, by the names that people give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from moekern.checkpoint.folder import Checkpoint
from moekern.errors import InputError
from moekern.model.expert_lists import LIST, expert_modules
from moekern.model.experts import experts_of
from moekern.model.layerwise import LayerwiseModel
from moekern.model.projections import halves, views
from moekern.model.saved import places
from moekern.model.transformers_api import Loader, router_modules
from moekern.recovery.factors import Factored, rank_of
from moekern.recovery.forms import Direct, Form, Lora, Scale
from moekern.recovery.settings import FACTORS, Training


@dataclass(frozen=True)
class Chosen:
    """A parameter that trains, by its name in the model. layer: None, where it lies behind the decoder layers."""

    name: str
    layer: int | None
    form: Form
    shape: tuple[int, ...]

    def values(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Of each of the form's values: the part, a name of its own in the model, the shape."""
        for part, shape in self.form.shapes(self.shape).items():
            yield part, f"{self.name}.{part}" if part else self.name, shape


def chosen(layerwise: LayerwiseModel, training: Training) -> list[Chosen]:
    """What trains, in the model's order. Nothing has to be filled.

    Raises InputError for kinds that the model has nothing of, for a parameter that two kinds train in two ways, and for
    one whose tensors in the checkpoint cannot hold what it becomes.
    """
    found: dict[str, Chosen] = {}
    for kind in training.train:
        some = False
        for one in _of_kind(kind, layerwise, training):
            some = True
            if found.setdefault(one.name, one).form != one.form:
                raise InputError(f"--train {','.join(training.train)}: {one.name} cannot train in two ways at once")
        if not some:
            raise InputError(f"--train {kind}: {layerwise.layout.family.name}: {NOTHING[kind]}")
    places = {name: n for n, (name, _) in enumerate(layerwise.model.named_parameters())}
    return sorted(found.values(), key=lambda one: places[one.name])


def check_adapter(model: nn.Module, some: Sequence[Chosen]) -> None:
    """Raise InputError where peft has no place for matrices of low rank: they are of a linear module, or a stack."""
    for one in some:
        owner, _, name = one.name.rpartition(".")
        linear = name == "weight" and isinstance(model.get_submodule(owner), nn.Linear)
        if not linear and len(one.shape) != 3:
            what = f"{one.name} is no matrix of a module of its own, which an adapter could be put on"
            raise InputError(f"--adapter: {what}; name other --lora-targets, or write a checkpoint")


NOTHING = {
    "bias": "its routers have no bias that gates depend on; --train scale trains one number an expert as well",
    "scale": "its experts' down projections are not held in a way that is known",
    "router": "no router with weights was found",
    "norms": "it has no weights of norms",
    "lora": "it has no matrices of the kinds that --lora-targets names",
    "down": "its experts' down projections are not held in a way that is known",
    "experts": "its experts are not held in a way that is known",
    FACTORS: "its experts are not held as stacks of matrices",
    "all": "it has no decoder layers",
}


def check_written(
    checkpoint: Checkpoint, loader: Loader, layers_name: str, layers: nn.ModuleList, some: Sequence[Chosen]
) -> None:
    """Raise InputError where the checkpoint's tensors cannot hold what some parameters become."""
    for layer in dict.fromkeys(one.layer for one in some):
        names = [one.name for one in some if one.layer == layer]
        if layer is None:
            own: dict[str, Tensor] = {name: loader.model.get_parameter(name) for name in names}
        else:
            own = named(layers_name, layer, layers[layer])
        places(checkpoint, loader, own, names)


def named(layers_name: str, i: int, layer: nn.Module) -> dict[str, Tensor]:
    """All parameters of a decoder layer by the model's names."""
    return {f"{layers_name}.{i}.{name}": value for name, value in layer.named_parameters()}


def _of_kind(kind: str, layerwise: LayerwiseModel, training: Training) -> Iterator[Chosen]:
    lora = Lora(training.lora_rank, training.lora_alpha)
    for i, layer in enumerate(layerwise.layers):
        parts = _parts(layerwise, i, layer)
        own = dict(layer.named_parameters())
        names: Mapping[str, Form] = {}
        if kind in ("router", "bias"):
            names = {name: Direct() for name in parts.routers if kind == "router" or "bias" in name.split(".")[-1]}
        elif kind == "norms":
            names = {name: Direct() for name in _norms(layer)}
        elif kind in ("experts", "down"):
            names = {name: Direct() for name in (parts.experts if kind == "experts" else parts.downs)}
        elif kind == "scale":
            names = {name: Scale(parts.count) for name in parts.downs if parts.count}
        elif kind == FACTORS:
            names = {name: _factored(layer, own[name], training.factor_ratio) for name in parts.matrices(own)}
        elif kind == "lora":
            names = {name: lora for name in _targets(own, parts, training.lora_targets)}
        elif kind == "all":
            names = {name: Direct() for name, value in own.items() if value.is_floating_point()}
        for name, form in names.items():
            yield Chosen(f"{layerwise.layers_name}.{i}.{name}", i, form, tuple(own[name].shape))
    if kind in ("norms", "all"):
        yield from _behind(layerwise)


def _behind(layerwise: LayerwiseModel) -> Iterator[Chosen]:
    """The norm behind the decoder layers: the first that is made behind their list."""
    owner_name, _, layers = layerwise.layers_name.rpartition(".")
    children = list(layerwise.model.get_submodule(owner_name).named_children())
    start = [name for name, _ in children].index(layers)
    norms = [(name, module) for name, module in children[start:] if "norm" in type(module).__name__.lower()]
    for child, module in norms[:1]:
        for name in _norms(module):
            path = ".".join(filter(None, (owner_name, child, name)))
            yield Chosen(path, None, Direct(), tuple(layerwise.model.get_parameter(path).shape))


def _norms(part: nn.Module) -> list[str]:
    """Names of the weights of norms within a part, which may be one itself."""
    return [
        f"{name}.{own}".lstrip(".")
        for name, module in part.named_modules()
        if "norm" in type(module).__name__.lower()
        for own, value in module.named_parameters(recurse=False)
        if value.ndim == 1
    ]


@dataclass(frozen=True)
class _Parts:
    """Names within a decoder layer: weights of routers, of experts, and of these the down projections (which hold
    `count` experts each)."""

    routers: Sequence[str]
    experts: Sequence[str]
    downs: Sequence[str]
    count: int

    def matrices(self, own: Mapping[str, Tensor]) -> list[str]:
        """Those that hold experts' matrices: stacks of them, or of experts in a list each its own."""
        return [name for name in self.experts if own[name].ndim == (3 if self.downs else 2)]


def _parts(layerwise: LayerwiseModel, i: int, layer: nn.Module) -> _Parts:
    routers = [
        f"{name}.{own}"
        for name in router_modules(layer, layerwise.model)
        for own, value in layer.get_submodule(name).named_parameters()
        if value.is_floating_point()
    ]
    key, block = layerwise.moe_keys.get(i), experts_of(layer)
    if key is None or block is None:
        return _Parts(routers, (), (), 0)
    path = next(name for name, module in layer.named_modules() if module is block)
    known, count = halves(block), layerwise.layout.layers[key].num_experts
    if expert_modules(block) is not None:
        inside = [f"{path}.{LIST}.{name}" for name, _ in block.get_submodule(LIST).named_parameters()]
        return _Parts(routers, inside, (), 0)
    if known is None:
        return _Parts(routers, (), (), 0)
    held = [f"{path}.{name}".lstrip(".") for name in known.parameters]
    return _Parts([name for name in routers if name not in held], held, held[-1:], count)


def _factored(layer: nn.Module, value: Tensor, ratio: float) -> Factored:
    """The form of an expert's matrix, or of a stack, of a layer: rows are what experts put out of it."""
    block = experts_of(layer)
    turned = value.ndim == 3 and block is not None and views(block).up.stride(-1) != 1
    return Factored(rank_of(value.shape[-2], value.shape[-1], ratio), turned)


def _targets(own: Mapping[str, Tensor], parts: _Parts, targets: Sequence[str]) -> Iterator[str]:
    """The matrices that --lora-targets names."""
    for name, value in own.items():
        expert, attention = name in parts.experts, "attn" in name or "attention" in name
        matrix = value.is_floating_point() and value.ndim in (2, 3) and name not in parts.routers
        wanted = ("experts" in targets and expert) or ("attention" in targets and attention)
        if matrix and (wanted or "linear" in targets) and (value.ndim == 2 or expert):
            yield name

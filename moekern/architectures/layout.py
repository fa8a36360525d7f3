"""What a checkpoint's layout says: which tensors have an expert dimension, layer by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Literal

from moekern.architectures.config_keys import Path
from moekern.architectures.table import Family
from moekern.router import Router

Projection = Literal["gate", "up", "gate_up", "down", ""]
Form = Literal["plain", "halves", "alternating"]


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """A tensor of a shared expert that is so many times as wide as a routed one: its channels lie along `axis`, None
    where there are none or it is not known."""

    name: str
    axis: int | None


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One tensor that changes when experts go.

    "drop": it belongs to one expert, and goes with it or is renumbered. "slice": along `axis`, `rows` consecutive rows
    belong to each expert, followed by `trailing` rows that stay. "remap": its values are expert ids.

    projection: what an expert's tensor is, "" for others. Its I channels lie along `channel_axis` of the stored tensor
    (None: along none, as in the bias of down), in a tensor of gate and up in the form of `channel_form`: "halves", I of
    gate and then I of up, or "alternating", one of gate and one of up. Where experts are rows too, I rows are one's.
    """

    name: str
    action: Literal["drop", "slice", "remap"]
    role: Literal["expert", "router", "bias", "table"]
    expert: int | None
    template: str  # the name with "{}" for the expert's number, if the action is "drop"
    axis: int = 0
    rows: int = 1
    trailing: int = 0
    projection: Projection = ""
    channel_axis: int | None = None
    channel_form: Form = "plain"

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias of a projection."""
        return self.name.endswith(("_bias", ".bias"))

    def renamed(self, new: int) -> str:
        """The key of this tensor when its expert has become number `new`."""
        return self.template.replace("{}", str(new))


@dataclass(frozen=True)
class MoeLayer:
    """One layer with experts. key names it in plans and statistics, prefix in the checkpoint. width: the channels of
    each expert (the inner size of its MLP), None where the tensors do not say it, as those of some formats. step: what
    divides the widths that the format of quantised experts can hold; 0: it is plain numbers, or not known."""

    key: str
    prefix: str
    num_experts: int
    mtp: bool
    tensors: tuple[ExpertTensor, ...]
    width: int | None = None
    shared: tuple[SharedTensor, ...] = ()  # of the shared expert, where its width follows that of the others
    step: int = 0

    @property
    def plain(self) -> bool:
        """Whether experts are plain matrices of gate, up and down."""
        return self.width is not None and not self.step

    def of_role(self, *roles: str) -> Iterator[ExpertTensor]:
        return (tensor for tensor in self.tensors if tensor.role in roles)

    def refitted(self, *, all_parts: bool) -> list[ExpertTensor]:
        """The tensors that a refit computes: the matrices of down, or with `all_parts` all matrices and biases."""
        found = [t for t in self.of_role("expert") if t.projection and (all_parts or t.projection == "down")]
        found = [t for t in found if all_parts or not t.is_bias]
        return found if not self.plain else [t for t in found if t.channel_axis is not None or t.is_bias]


@dataclass(frozen=True)
class Layout:
    """The family that fits a checkpoint, its layers with experts, and what its config says about routing.

    Layers pruned to different counts have their own num_experts; the router's is the largest, which config.json holds.
    """

    family: Family
    layers: Mapping[str, MoeLayer]
    mtp: Mapping[str, MoeLayer]
    mtp_prefixes: tuple[str, ...]  # beginnings of every key of a multi-token-prediction block
    router: Router
    count_paths: tuple[Path, ...]  # config keys that hold the expert count
    mtp_paths: tuple[Path, ...]  # config keys that hold the number of multi-token-prediction layers
    top_k_paths: tuple[Path, ...] = ()  # config keys that hold how many experts a token chooses
    width_paths: tuple[Path, ...] = ()  # config keys that hold the width of routed experts
    shared_paths: tuple[Path, ...] = ()  # config keys that hold how many times as wide the shared expert is
    shared_times: int = 0  # what they hold; 0: no shared expert follows the width of the others
    shared_coded: bool = False  # the shared expert that follows is quantised: it has the numbers that it had
    notes: tuple[str, ...] = ()  # a line each: what the config says and the tensors do not

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    @property
    def width(self) -> int | None:
        """The channels of each routed expert; None where they are not known, or differ between layers."""
        found = {layer.width for layer in (*self.layers.values(), *self.mtp.values())}
        return found.pop() if len(found) == 1 else None

    @property
    def step(self) -> int:
        """What divides the widths that formats of quantised experts can hold; 0: no layer's are known to be such."""
        found = [layer.step for layer in (*self.layers.values(), *self.mtp.values()) if layer.step]
        return lcm(*found) if found else 0

    @property
    def n_group(self) -> int:
        return self.router.n_group

    def router_tensors(self, key: str) -> tuple[ExpertTensor | None, ExpertTensor | None]:
        """The matrix of the router of layer `key`, a row an expert, and the bias that it adds to logits: not one that
        only decides which experts are chosen, as routers with a sigmoid have. None of what there is not."""
        found = [t for t in self.layers[key].of_role("router") if (t.action, t.rows, t.axis) == ("slice", 1, 0)]
        if len(found) != 1:
            return None, None
        (weight,) = found
        name = f"{weight.name.removesuffix('weight')}bias"
        bias = next((tensor for tensor in self.layers[key].of_role("bias") if tensor.name == name), None)
        return weight, bias if self.family.score == "softmax" else None

"""What a checkpoint's layout says: which tensors have an expert dimension, layer by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from moekern.architectures.config_keys import Path
from moekern.architectures.table import Family
from moekern.router import Router


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One tensor that changes when experts go.

    "drop": it belongs to one expert, and goes with it or is renumbered. "slice": along `axis`, `rows` consecutive rows
    belong to each expert, followed by `trailing` rows that stay. "remap": its values are expert ids.
    """

    name: str
    action: Literal["drop", "slice", "remap"]
    role: Literal["expert", "router", "bias", "table"]
    expert: int | None
    template: str  # the name with "{}" for the expert's number, if the action is "drop"
    axis: int = 0
    rows: int = 1
    trailing: int = 0

    def renamed(self, new: int) -> str:
        """The key of this tensor when its expert has become number `new`."""
        return self.template.replace("{}", str(new))


@dataclass(frozen=True)
class MoeLayer:
    """One layer with experts. key names it in plans and statistics, prefix in the checkpoint."""

    key: str
    prefix: str
    num_experts: int
    mtp: bool
    tensors: tuple[ExpertTensor, ...]

    def of_role(self, *roles: str) -> Iterator[ExpertTensor]:
        return (tensor for tensor in self.tensors if tensor.role in roles)


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
    notes: tuple[str, ...] = ()  # a line each: what the config says and the tensors do not

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    @property
    def n_group(self) -> int:
        return self.router.n_group

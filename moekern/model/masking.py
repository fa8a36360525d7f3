"""The original model with experts masked out of selection: the oracle every pruned checkpoint must equal.

Inside a router's forward, the logits of dropped experts are replaced as soon as the linear map has made them; selection
biases of dropped experts are lowered too, so that score + bias never wins, and id tables name the substitutes that the
pruner writes. Channels that experts lose are columns of zeros in down. What the model does with logits, biases and ids
stays the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moekern.architectures import ExpertTensor, Layout, MoeLayer
from moekern.architectures.id_tables import replace_experts
from moekern.model.narrow_layers import check_channels, check_cuttable
from moekern.model.transformers_api import Loader, router_modules

MASKED = -1e9
PRODUCTS = (nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__)


class _ChangeLogits(TorchFunctionMode):
    """Change every product whose width is the router's, as soon as it is made."""

    def __init__(self, width: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.width, self.change, self.hits = width, change, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS and out.shape[-1] == self.width and out.is_floating_point():
            self.hits += 1
            out = self.change(out)
        return out


def _lowered(dropped: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The columns of dropped experts lowered."""
    columns = list(dropped)

    def change(logits: Tensor) -> Tensor:
        logits[..., columns] = max(MASKED, torch.finfo(logits.dtype).min)
        return logits

    return change


Channels = Mapping[int, Tensor]  # expert -> the channels that it keeps, int64
WHOLE: Channels = {}


@contextmanager
def masked_layer(
    loader: Loader, layer: MoeLayer, module: nn.Module, dropped: Sequence[int], channels: Channels = WHOLE
) -> Iterator[None]:
    """Mask experts of one decoder layer, whose weights must be loaded, while the context is open, and channels of the
    experts that `channels` names.

    Raises RuntimeError when the router ran and made no logits of the expected width: nothing would have been masked;
    InputError where channels cannot be cut.
    """
    with ExitStack() as stack:
        if dropped:
            stack.enter_context(changed_logits(loader, layer, module, _lowered(dropped)))
            for tensor in layer.tensors:
                if tensor.role in ("bias", "table"):
                    stack.enter_context(_changed(loader, tensor, layer.num_experts, dropped))
        if channels:
            down = check_cuttable(module, layer.key).down
            check_channels(torch.cat(list(channels.values())), down.shape[2], layer.key)
            stack.enter_context(_silent(down, channels))
        yield


@contextmanager
def changed_logits(
    loader: Loader, layer: MoeLayer, module: nn.Module, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """What the router's linear map makes of tokens, [..., E] and what a router has behind, becomes another while the
    context is open. Raises RuntimeError as `masked_layer` does."""
    width = layer.num_experts + max((t.trailing for t in layer.tensors if t.role == "router"), default=0)
    with ExitStack() as stack:
        for path in router_modules(module, loader.model):
            stack.enter_context(_changed_forward(module.get_submodule(path), width, change, layer.key))
        yield


@contextmanager
def masked(
    loader: Loader,
    layout: Layout,
    dropped: Mapping[str, Sequence[int]],
    channels: Mapping[str, Channels] | None = None,
) -> Iterator[None]:
    """Mask experts, and channels, of a whole model in memory: both map layer keys to what `masked_layer` takes."""
    places, (_, layers) = loader.moe_places(layout), loader.decoder_layers()
    with ExitStack() as stack:
        for key in dict.fromkeys((*dropped, *(channels or {}))):
            module, own = layers[places[key]], (channels or {}).get(key, WHOLE)
            stack.enter_context(masked_layer(loader, layout.layers[key], module, dropped.get(key, ()), own))
        yield


@contextmanager
def _silent(down: Tensor, channels: Channels) -> Iterator[None]:
    """Make zeros of the columns of down [E, H, I] whose channels experts do not keep, and put the old ones back."""
    down = down.detach()
    before = {expert: down[expert].clone() for expert in channels}
    try:
        for expert, kept in channels.items():
            gone = torch.ones(down.shape[2], dtype=torch.bool)
            gone[kept] = False
            down[expert].masked_fill_(gone.to(down.device), 0)
        yield
    finally:
        for expert, old in before.items():
            down[expert].copy_(old)


@contextmanager
def _changed_forward(router: nn.Module, width: int, change: Callable[[Tensor], Tensor], key: str) -> Iterator[None]:
    forward, own = router.forward, vars(router).get("forward")

    def changed(*args: Any, **kwargs: Any) -> Any:
        with _ChangeLogits(width, change) as mode:
            out = forward(*args, **kwargs)
        if not mode.hits:
            raise RuntimeError(f"layer {key}: the router made no logits of width {width}, so nothing was masked")
        return out

    router.forward = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del router.forward
        if own is not None:  # one that was masked already, or that another tool has put there
            router.forward = own


@contextmanager
def _changed(loader: Loader, tensor: ExpertTensor, num_experts: int, dropped: Sequence[int]) -> Iterator[None]:
    """Lower a bias, or substitute ids in a table, and put the old values back."""
    key = loader.model_key(tensor.name)
    if key is None:
        yield
        return
    path, _, name = key.rpartition(".")
    owner: Any = loader.model.get_submodule(path)
    value: Tensor = getattr(owner, name)
    before = value.detach().clone()
    if tensor.role == "table":
        keep = torch.tensor([e for e in range(num_experts) if e not in set(dropped)])
        ranks = replace_experts(before.cpu().numpy(), keep.tolist(), num_experts)
        after = keep[torch.from_numpy(ranks).long()].to(before)
    else:
        axis = next(a for a, n in enumerate(before.shape) if n == num_experts + tensor.trailing)
        lowest = max(MASKED, torch.finfo(before.dtype).min)
        after = before.index_fill(axis, torch.tensor(list(dropped), device=before.device), lowest)
    own = value.data  # whose changes autograd does not count: other weights may lie in the same buffer
    own.copy_(after)
    try:
        yield
    finally:
        own.copy_(before)

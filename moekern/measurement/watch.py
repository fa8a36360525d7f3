"""Hooks on decoder layers while they are measured: the experts' call, the router's logits, the norm before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from moekern.errors import InputError
from moekern.measurement.batch import InFlight
from moekern.measurement.module_lists import measured_block
from moekern.measurement.probe import Probe
from moekern.measurement.recorder import Recorder
from moekern.model.expert_lists import expert_modules
from moekern.model.experts import experts_of, in_place
from moekern.model.transformers_api import router_modules

GAIN = "per_expert_scale"  # Gemma 4's router


@contextmanager
def watching(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    recorder: Recorder,
    flight: InFlight,
    *,
    empty_slots: bool = False,
) -> Iterator[dict[str, Probe]]:
    """Measure the experts of these decoder layers (plan key -> module) into `recorder` while the context is open.

    `flight` says which batch goes through them. Gives each layer's probe. Raises InputError for a layer whose experts
    moekern has no way to see.
    """
    with ExitStack() as stack:
        probes: dict[str, Probe] = {}
        for key, layer in layers.items():
            block = experts_of(layer)
            if block is None:
                raise InputError(f"layer {key}: {type(layer).__name__} has no experts that moekern can observe")
            if hasattr(block, "_moekern_probe"):
                raise InputError(f"layer {key}: its experts are observed already; leave that context first")
            probe = probes[key] = Probe(key, empty_slots, recorder, flight, gain=_gain(layer))
            listed = expert_modules(block) is not None
            stack.enter_context(in_place(block, probe, measured_block if listed else None))
            for path, index in () if listed else router_modules(layer, model).items():
                handle = layer.get_submodule(path).register_forward_hook(_keep_logits(probe, index))
                stack.callback(handle.remove)
            for child in layer.children():
                if "Norm" in type(child).__name__:
                    stack.callback(child.register_forward_hook(_keep_norm(probe)).remove)
        yield probes


def _gain(layer: nn.Module) -> Callable[[], Tensor] | None:
    """What gives the gain of each expert that a layer's router multiplies its weights by; None where it has none."""
    for module in layer.modules():
        if isinstance(getattr(module, GAIN, None), Tensor):
            return lambda: getattr(module, GAIN).detach()  # type: ignore[no-any-return]
    return None


def _keep_logits(probe: Probe, index: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        logits = output[index] if isinstance(output, tuple) else output
        probe.logits = logits.reshape(-1, logits.shape[-1])

    return hook


def _keep_norm(probe: Probe) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            probe.norm = args[0], output

    return hook

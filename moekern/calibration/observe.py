"""Measure a model that is already in memory, by the same hooks as calibration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moekern.architectures import family_named
from moekern.architectures.config_keys import model_types
from moekern.architectures.detect import find_router, score, trailing_rows
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import DEFAULT_DOMAIN
from moekern.errors import InputError, check_type
from moekern.measurement.batch import BatchContext, InFlight
from moekern.measurement.recorder import Recorder
from moekern.measurement.tiers import BY_BATCH, backends_of, wanted_tiers
from moekern.measurement.watch import watching
from moekern.model.experts import experts_of
from moekern.model.finite import blamed_outside, blamed_weight, out_of_range
from moekern.model.transformers_api import loader_of, router_modules
from moekern.statistics.file import Statistics
from moekern.statistics.header import Source, make_header
from moekern.statistics.layer import LayerStatistics
from moekern.version import versions


@contextmanager
def observe(
    model: PreTrainedModel,
    attention_mask: Tensor | None = None,
    *,
    domain: str = DEFAULT_DOMAIN,
    checkpoint: str | Path | None = None,
    tiers: Collection[str] = (),
    backend: str | None = None,
) -> Iterator[Statistics]:
    """Measure every forward pass of a transformers model while the context is open.

    Its outputs stay its own but for rounding: experts add up in another order than transformers has them. Each forward
    pass is a segment of the text: `calibrate` gives the same sums of the same batches, as long as these are no more
    than SEGMENTS chunks.

        with moekern.observe(model) as statistics:
            model(**inputs)
        plan = moekern.make_plan(statistics, "gated_norm", keep=0.5)

    Padding does not count: an `attention_mask` [B, S] given to the model's forward says what it is; one given here
    holds for all passes and goes first. `tiers` are of BY_BATCH: what one pass can measure. `checkpoint` is the folder
    the model came from; it ties plans to it. Inference only: no gradient flows through measured experts. Raises
    InputError for a model whose family is unknown or whose experts cannot be seen.
    """
    check_type("model", model, PreTrainedModel)
    config: dict[str, Any] = model.config.to_dict()
    family = next((row for name in model_types(config) if (row := family_named(name))), None)
    if family is None:
        raise InputError(f"{type(model).__name__}: model_type {model.config.model_type!r} is no family moekern knows")
    _, decoder = loader_of(model).decoder_layers()
    layers = {str(i): layer for i, layer in enumerate(decoder) if experts_of(layer) is not None}
    words = -(-model.get_input_embeddings().num_embeddings // 64)
    wanted = wanted_tiers(tiers, BY_BATCH, "observe")
    served = backends_of(next(decoder.parameters()).device.type, backend, wanted)
    recorder = Recorder(score(family, config), wanted, backend, words)
    flight = InFlight(BatchContext(domain, (0, 0), segment=-1))
    handle = model.register_forward_pre_hook(_announce(flight, domain, attention_mask), with_kwargs=True)
    header: dict[str, Any] = {}
    measured: dict[str, Mapping[str, LayerStatistics]] = {}
    try:
        with watching(model, layers, recorder, flight, empty_slots=trailing_rows(family, config) > 0):
            yield Statistics(header, measured)
    finally:
        handle.remove()
    if not recorder.layers:
        raise InputError("observe: the model was not run while it was observed")
    some = recorder.unite(recorder.layers[0])[domain]
    router = find_router(family, config, type(model).__name__, some.num_experts)
    for key in recorder.layers:
        measured[key] = recorder.take(key, router.top_k, lambda: _blamed(model, int(key)))  # noqa: B023
    fingerprint = open_checkpoint(checkpoint).fingerprint if checkpoint else ""
    header |= make_header(
        Source(fingerprint, family.name, score(family, config), router),
        tokens={domain: int(some.tokens)},
        data="observed in memory",
        backend=served,
        versions=versions(),
    )


def _blamed(model: PreTrainedModel, upto: int) -> str:
    """The first weight, up to this decoder layer, that is not finite, or else the type."""
    name, decoder = loader_of(model).decoder_layers()
    for i, layer in enumerate(decoder[: upto + 1]):
        experts = experts_of(layer)
        E = 0 if experts is None else int(getattr(experts, "num_experts", 0))
        cause = blamed_weight(layer, router_modules(layer, model), range(E))
        if cause is not None:
            return f"layer {i}: {cause}"
    return blamed_outside(model, name, head=False) or out_of_range("activations are", model.dtype)


def _announce(flight: InFlight, domain: str, fixed: Tensor | None) -> Any:
    """A hook before the model's forward pass that says which tokens come: a segment of their own."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
        B, S = given.shape[:2] if isinstance(given, Tensor) and given.ndim > 1 else (0, 0)
        flight.context = BatchContext(
            domain,
            (B, S),
            mask=_counted(fixed if fixed is not None else kwargs.get("attention_mask"), S, grown=fixed is None),
            token_ids=ids.reshape(-1) if isinstance(ids, Tensor) else None,
            segment=-1 if flight.context is None else flight.context.segment + 1,
        )

    return hook


def _counted(mask: Any, tokens: int, *, grown: bool) -> Tensor | None:
    """[T] bool: the tokens that are no padding; None where all count.

    While a model generates, its mask covers what the cache holds too (`grown`): the last columns are of the new tokens.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if grown and 0 < tokens < mask.shape[1]:
        mask = mask[:, -tokens:]
    return None if bool(mask.all()) else mask.reshape(-1).bool()

"""Stream calibration text through a checkpoint, one decoder layer at a time, and measure its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moekern import kernels
from moekern.architectures import Layout, find_layout
from moekern.checkpoint import Checkpoint, open_checkpoint
from moekern.data import Batch, TokenData
from moekern.decoder import LayerwiseModel, open_layerwise
from moekern.errors import InputError
from moekern.recorder import Recorder
from moekern.seam import observed
from moekern.statistics import Statistics, make_header
from moekern.version import versions

OPS = ("router_stats", "sort_by_expert", "combine_and_measure")


def calibrate(
    source: str | Path | Checkpoint,
    data: TokenData,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    dimensions: bool = True,
    backend: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Measure the routed tier of every MoE layer over all tokens of `data`.

    Weights are in the checkpoint's dtype unless `dtype` is given; at most the skeleton and two decoder layers are
    resident. `dimensions` keeps the per-dimension sums [E, H] that ean_dim needs. `progress(done, total)` counts
    decoder layers. Raises InputError for a checkpoint that is not a MoE, cannot be built or lacks tensors.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    backends = _backends(device, backend)
    recorder = Recorder(dimensions=dimensions, backend=backend)
    with open_layerwise(
        checkpoint, layout, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    ) as layerwise:
        _measure(layerwise, data, recorder, progress)
    return _statistics(checkpoint, layout, data, recorder, backends, dtype)


def _measure(
    layerwise: LayerwiseModel, data: TokenData, recorder: Recorder, progress: Callable[[int, int], None]
) -> None:
    model: Any = layerwise.model
    layout = layerwise.layout
    modules = {key: layerwise.layers[i] for i, key in layerwise.moe_keys.items()}
    last = max(layerwise.moe_keys)
    empty = any(t.trailing for layer in layout.layers.values() for t in layer.tensors)

    def forward(batch: Batch) -> None:
        model(input_ids=batch.input_ids.to(layerwise.device), use_cache=False)

    @contextmanager
    def entering(batch: Batch, layer: int) -> Iterator[None]:
        recorder.domain = batch.domain
        yield

    def done(i: int) -> None:
        if i in layerwise.moe_keys:
            recorder.check(layerwise.moe_keys[i], layout.top_k)
            _check_finite(recorder, layerwise.moe_keys[i], layout.top_k)
        progress(i + 1, last + 1)

    with observed(model, modules, recorder, score=layout.family.score, empty_slots=empty):
        layerwise.run(data.batches, forward, entering=entering, stop_after=last, progress=done)


def _check_finite(recorder: Recorder, layer: str, top_k: int) -> None:
    """Raise InputError when a finished layer's sums overflowed."""
    for domain, sums in recorder.sums.get(layer, {}).items():
        problem = sums.problem(top_k)
        if problem:
            raise InputError(
                f"layer {layer}, domain {domain}: {problem}: the model's numbers leave the range of its dtype; "
                "try another one (--dtype)"
            )


def _backends(device: str, backend: str | None) -> dict[str, str]:
    """Which backend serves each op, for the statistics' header."""
    kind = torch.device(device).type
    try:
        return {op: kernels.backend_for(op, kind, backend) for op in OPS}
    except NotImplementedError as error:
        raise InputError(f"--backend {backend}: {error}") from error


def _statistics(
    checkpoint: Checkpoint,
    layout: Layout,
    data: TokenData,
    recorder: Recorder,
    backends: dict[str, str],
    dtype: torch.dtype | None,
) -> Statistics:
    header = make_header(
        fingerprint=checkpoint.fingerprint,
        family=layout.family.name,
        score=layout.family.score,
        top_k=layout.top_k,
        num_experts=layout.num_experts,
        n_group=layout.n_group,
        topk_group=layout.topk_group,
        group_top=max(1, layout.group_top),
        domains=list(data.tokens),
        tokens=data.tokens,
        data=data.recipe,
        backend=backends,
        versions=versions(),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
    )
    layers = {key: {domain: sums.to("cpu") for domain, sums in recorder.sums[key].items()} for key in layout.layers}
    return Statistics(header, layers)

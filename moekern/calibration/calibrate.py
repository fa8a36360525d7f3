"""Stream calibration text through a checkpoint, one decoder layer at a time, and measure its experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekern import kernels
from moekern.architectures import Layout, find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.measurement.gradients import add_gradients
from moekern.measurement.recorder import OutlierRecorder, Recorder
from moekern.measurement.replay import Replay, sample
from moekern.measurement.tiers import wanted_tiers
from moekern.measurement.watch import observed
from moekern.measurement.weights import weigh_layer
from moekern.model.compute import Compute
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.statistics.file import Statistics
from moekern.statistics.header import Source, make_header
from moekern.statistics.layer import TIERS
from moekern.version import versions

OPS = ("router_stats", "sort_by_expert", "combine_and_measure")
TIER_OPS = {"vocabulary": ("vocabulary",), "replay": ("similarity",)}
WEIGHT_OPS = ("weight_stats", "similarity", "dequantize")  # on the CPU
REPLAY_TOKENS = 512


def calibrate(
    source: str | Path | Checkpoint,
    data: TokenData,
    compute: Compute = Compute(),
    *,
    tiers: Collection[str] = ("dimensions",),
    replay_tokens: int = REPLAY_TOKENS,
    spill: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Measure the routed tier of every MoE layer over all tokens of `data`, and what `tiers` names beside it.

    Weights are in the checkpoint's dtype unless `compute` has one; at most the skeleton and two decoder layers are
    resident. "outliers" takes "dimensions" along and a second pass over the data; "replay" runs all experts on
    `replay_tokens` tokens of each domain; "gradient" takes a forward and a backward pass, see `gradients`,
    with layers' inputs in files under `spill` where it is given. `progress(done, total)` counts decoder layers over all
    passes. Raises InputError for a checkpoint that is not a MoE, cannot be built or lacks tensors, and for a tier that
    cannot be measured there.
    """
    wanted = wanted_tiers(tiers, TIERS, "calibrate")
    if replay_tokens < 1:
        raise InputError(f"--replay-tokens {replay_tokens}: expected 1 or more")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    backend = compute.backend
    backends = backends_of(compute, wanted)
    recorder = Recorder(tiers=[tier for tier in wanted if tier not in ("weights", "gradient")], backend=backend)
    with open_layerwise(checkpoint, layout, compute) as layerwise:
        recorder.words = -(-layerwise.vocab_size // 64)
        passes = [recorder]
        if "outliers" in wanted:
            passes.append(OutlierRecorder(tiers=(), backend=backend, first=recorder.sums))
        weighed = len(layout.layers) if "weights" in wanted else 0
        upto, layers = max(layerwise.moe_keys) + 1, len(layerwise.layers)
        back = 2 * layers - min(layerwise.moe_keys) if "gradient" in wanted else 0
        step = _steps(progress, upto * len(passes) + weighed + back)
        weights = _weigh(checkpoint, layout, backend, step) if "weights" in wanted else {}
        replay = _replay(layerwise, recorder) if "replay" in wanted else None
        _measure(layerwise, data, recorder, replay, replay_tokens, step)
        for again in passes[1:]:
            _measure(layerwise, data, again, None, 0, step)
        if "gradient" in wanted:
            recorder.sums.update(add_gradients(layerwise, data, recorder.sums, spill=spill, step=step))
    for key, found in weights.items():
        recorder.sums[key] = {domain: replace(sums, **found) for domain, sums in recorder.sums[key].items()}
    return _statistics(checkpoint, layout, data, recorder, backends, compute)


def _steps(progress: Callable[[int, int], None], total: int) -> Callable[[], None]:
    done = itertools.count(1)
    return lambda: progress(next(done), total)


def _weigh(
    checkpoint: Checkpoint, layout: Layout, backend: str | None, step: Callable[[], None]
) -> dict[str, dict[str, Tensor]]:
    """Layer key -> the fields of its weights tier."""
    found = {}
    for key, layer in layout.layers.items():
        weighed = weigh_layer(checkpoint, layer, backend=backend)
        found[key] = {f.name: getattr(weighed, f.name) for f in fields(weighed) if f.metadata["tier"] == "weights"}
        step()
    return found


def _replay(layerwise: LayerwiseModel, recorder: Recorder) -> Replay:
    layout = layerwise.layout
    if any(t.trailing for layer in layout.layers.values() for t in layer.tensors):
        raise InputError(f"--tier replay: {layout.family.name} also routes to what is no expert, which is not replayed")
    layers = {key: layerwise.layers[i] for i, key in layerwise.moe_keys.items()}
    return Replay(layerwise.loader, layout, layers, backend=recorder.backend)


def _measure(
    layerwise: LayerwiseModel,
    data: TokenData,
    recorder: Recorder,
    replay: Replay | None,
    replay_tokens: int,
    step: Callable[[], None],
) -> None:
    """One pass over weights and data."""
    model: Any = layerwise.model
    layout = layerwise.layout
    modules = {key: layerwise.layers[i] for i, key in layerwise.moe_keys.items()}
    empty = any(t.trailing for layer in layout.layers.values() for t in layer.tensors)
    last = {batch.domain: number for number, batch in enumerate(data.batches)}
    sampled = _samples(data, replay_tokens)

    def forward(task: tuple[int, Batch]) -> None:
        model(input_ids=task[1].input_ids.to(layerwise.device), use_cache=False)

    @contextmanager
    def entering(task: tuple[int, Batch], layer: int) -> Iterator[None]:
        number, batch = task
        key = layerwise.moe_keys.get(layer)
        recorder.domain = batch.domain
        recorder.token_ids = batch.input_ids.reshape(-1).to(layerwise.device)
        if replay is not None:
            B, S = batch.input_ids.shape
            replay.domain, replay.rows, replay.shape = batch.domain, sampled[number], (B, S)
        yield
        if replay is not None and key is not None and number == last[batch.domain]:
            replay.finish(key, batch.domain, recorder.sums[key][batch.domain])

    def done(i: int) -> None:
        if i in layerwise.moe_keys:
            recorder.check(layerwise.moe_keys[i], layout.router.top_k)
            recorder.finish(layerwise.moe_keys[i])
            _check_finite(recorder, layerwise.moe_keys[i], layout.router.top_k)
        step()

    with ExitStack() as stack:
        probes = stack.enter_context(observed(model, modules, recorder, score=layout.family.score, empty_slots=empty))
        if replay is not None:
            stack.enter_context(replay.watching(probes))
        tasks = list(enumerate(data.batches))
        layerwise.run(tasks, forward, entering=entering, stop_after=max(layerwise.moe_keys), progress=done)


def _samples(data: TokenData, size: int) -> dict[int, Tensor]:
    """Batch number -> its tokens that are replayed, `size` for each domain."""
    found: dict[int, Tensor] = {}
    for domain in data.tokens:
        numbers = [number for number, batch in enumerate(data.batches) if batch.domain == domain]
        rows = sample([data.batches[number].input_ids.numel() for number in numbers], size)
        found |= dict(zip(numbers, rows, strict=True))
    return found


def _check_finite(recorder: Recorder, layer: str, top_k: int) -> None:
    """Raise InputError when a finished layer's sums overflowed."""
    for domain, sums in recorder.sums.get(layer, {}).items():
        problem = sums.problem(top_k)
        if problem:
            raise InputError(
                f"layer {layer}, domain {domain}: {problem}: the model's numbers leave the range of its dtype; "
                "try another one (--dtype)"
            )


def backends_of(compute: Compute, tiers: Collection[str] = ()) -> dict[str, str]:
    """Which backend serves each op, for the statistics' header. Raises InputError for one that is not there."""
    kind = torch.device(compute.device).type
    ops = dict.fromkeys(WEIGHT_OPS, "cpu") if "weights" in tiers else {}
    ops |= dict.fromkeys((*OPS, *(op for tier in tiers for op in TIER_OPS.get(tier, ()))), kind)
    try:
        return {op: kernels.backend_for(op, where, compute.backend) for op, where in ops.items()}
    except NotImplementedError as error:
        raise InputError(f"--backend {compute.backend}: {error}") from error


def _statistics(
    checkpoint: Checkpoint,
    layout: Layout,
    data: TokenData,
    recorder: Recorder,
    backends: dict[str, str],
    compute: Compute,
) -> Statistics:
    header = make_header(
        Source.of(checkpoint, layout),
        tokens=data.tokens,
        data=data.recipe,
        backend=backends,
        versions=versions(),
        dtype=compute.dtype_name,
    )
    layers = {key: {domain: sums.to("cpu") for domain, sums in recorder.sums[key].items()} for key in layout.layers}
    return Statistics(header, layers)

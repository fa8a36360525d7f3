"""Stream calibration text through a checkpoint, one decoder layer at a time, and measure its experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from moekern import files
from moekern.architectures import Layout, find_layout
from moekern.calibration.passes import MeasuringPass, Progress, Steps, Sums, samples
from moekern.calibration.sharing import (
    check_tiers_of,
    deciding_library,
    deciding_threads,
    facts_of,
    header_of_part,
    kept_apart,
    share_of,
)
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import Segment, TokenData
from moekern.data.text import check_data
from moekern.errors import InputError, check_type
from moekern.measurement.gradients import STAGES, check_gradients, measure_gradients
from moekern.measurement.probe import Probe
from moekern.measurement.recorder import OutlierRecorder, Recorder
from moekern.measurement.replay import Replay
from moekern.measurement.tiers import TABLE, backends_of, wanted_tiers
from moekern.measurement.weights import weigh_layer
from moekern.model.compute import Compute
from moekern.model.journal import Journal, Resume, opened, removed, undamaged
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.position import text_key
from moekern.model.precision import settled
from moekern.statistics.file import Statistics
from moekern.statistics.header import Source, make_header
from moekern.statistics.layer import TIERS
from moekern.statistics.parts import load_part
from moekern.statistics.store import HeldStore, Store, file_store, statistics_of
from moekern.team import Part
from moekern.version import versions

REPLAY_TOKENS = 512
Finished = Callable[[str, Sums], object]  # a layer's key and sums
Told = Callable[[Statistics], object]  # of one layer
FIRST, SECOND = "first pass", "second pass"


def calibrate(
    source: str | Path | Checkpoint,
    data: TokenData,
    compute: Compute = Compute(),
    *,
    tiers: Collection[str] = (),
    replay_tokens: int = REPLAY_TOKENS,
    out: str | Path | None = None,
    resume: Resume | None = None,
    part: Part | None = None,
    progress: Progress = lambda done, total: None,
    told: Told = lambda layer: None,
) -> Statistics:
    """Measure the routed tier of every MoE layer over all tokens of `data`, and what `tiers` names beside it.

    Weights are in the checkpoint's dtype unless `compute` names another; at most the skeleton, two decoder layers, of
    layers larger than the budget a group of experts, and one layer's sums are resident. With `out`, each layer's sums
    go to that file when the layer is done; without, they are held. "outliers" takes "dimensions" along and a second
    pass over the data; "replay" runs all experts on `replay_tokens` tokens of each domain; "gradient" takes a forward
    and a backward pass, see `gradients`. What does not fit into memory goes to files, see `Compute`. `progress(done,
    total)` counts decoder layers over all passes, and of the one at work the share of the text that has gone through
    it. `told` is given what the first pass measured of a layer, as soon as it is done.

    With `out` and `resume` it is written down how far it is, and the same call goes on where it was stopped, in any
    number of processes.

    Text is computed and its sums are added `data.chunk` sequences at a time, in their order: the batches of `data`
    change no bit, and neither does the number of threads, but for the gradient tier's, nor that of processes
    (`compute.team`, whose rank 0 alone has the sums). With `part`, one of several calibrations that know nothing of
    each other, the segments of its share are kept apart, for `statistics.parts.merge_parts`.
    Raises InputError for a checkpoint that is not a MoE, cannot be built or lacks tensors, and for a tier that cannot
    be measured there.
    """
    wanted = wanted_tiers(tiers, TIERS, "calibrate")
    if replay_tokens < 1:
        raise InputError(f"--replay-tokens {replay_tokens}: expected 1 or more")
    check_type("data", data, TokenData)
    check_type("compute", compute, Compute)
    if not data.batches:
        raise InputError("calibrate: the data hold no batch", kind="data")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    check_data(data, checkpoint)
    layout = find_layout(checkpoint)
    compute = settled(compute, checkpoint, layout)
    check_tiers_of(wanted, compute.team, part)
    header = _header(checkpoint, layout, data, compute, wanted)
    experts = {key: layer.num_experts for key, layer in layout.layers.items()}
    tell: Finished = lambda key, sums: told(Statistics(header, {key: sums}))  # noqa: E731
    units: Sequence[Segment] | None = None
    if part is not None:
        share = share_of(data.by_chunk(), part)
        header, units = header_of_part(header, part, share), list(kept_apart(share).values())
    job = Job(checkpoint, layout, data, compute, wanted, replay_tokens, progress, tell, units)
    if out is not None:
        files.check_new(Path(out))
    team = compute.team
    team.together(calibrate, checkpoint.folder, data, compute, tiers=wanted, replay_tokens=replay_tokens, part=part)
    team.check_alike(facts_of(checkpoint, compute))
    if out is None:
        held = HeldStore()
        with opened(None, {}, job.passes, team) as journal:  # of rank 0 of a team it may be there
            job.run(held, journal)
        return statistics_of(header, held, list(layout.layers) if team.first else ())
    with (
        file_store(out, header, experts, wanted, None if resume is None else resume.position) as store,
        opened(resume, job.key(header, part), job.passes, team) as journal,
    ):
        job.run(store, journal)
    if resume is not None:
        removed(resume.folder)
    return Statistics.load(out) if part is None else load_part(Path(out))


@dataclass(frozen=True)
class Job:
    """One calibration: what is measured, of what, and how."""

    checkpoint: Checkpoint
    layout: Layout
    data: TokenData
    compute: Compute
    tiers: tuple[str, ...]
    replay_tokens: int
    progress: Progress
    told: Finished
    units: Sequence[Segment] | None = None  # segments of the text; None: all

    def run(self, store: Store, journal: Journal | None = None) -> None:
        """Measure every tier into `store`, or what a stopped run has left to do."""
        with open_layerwise(self.checkpoint, self.layout, self.compute, self.compute.team) as layerwise:
            if "gradient" in self.tiers:
                check_gradients(layerwise, sum(self.data.tokens.values()))
            step = self._steps(layerwise)
            if journal is not None and journal.found is not None:
                with undamaged(journal.folder):
                    store.take_up(journal.found.kept["store"])
                    step.done = int(journal.found.kept["steps"])
            for name, kind in ((FIRST, _FirstPass), (SECOND, _SecondPass)):
                stage = None if journal is None else journal.stage(name)
                if name in self.passes and (stage is None or not stage.passed):
                    kind(self, layerwise, store, step).run(stage)
            if "gradient" in self.tiers:
                kept = lambda: {"steps": step.done, "store": store.kept()}  # noqa: E731
                measure_gradients(layerwise, self.data, store.add, step=step, journal=journal, kept=kept)

    @property
    def passes(self) -> tuple[str, ...]:
        """Names of what is run through the layers, in this order."""
        again = (SECOND,) if "outliers" in self.tiers else ()
        return (FIRST, *again, *(STAGES if "gradient" in self.tiers else ()))

    def key(self, header: Mapping[str, Any], part: Part | None = None) -> dict[str, Any]:
        """All that decides the bits of what is measured, in words for people."""
        share = {} if part is None else {"--part": str(part)}
        sample = {"--replay-tokens": self.replay_tokens} if "replay" in self.tiers else {}
        (run,) = header["runs"]
        return {
            "model": header["fingerprint"],
            "config.json": self.checkpoint.config_sha256,
            "text": {**text_key(self.data.by_chunk()), "recipe": run["data"]},
            "--tier": " ".join(self.tiers),
            **sample,
            **share,
            "--dtype": run["dtype"],
            "--device": self.compute.place.type,
            "kernels": run["backend"],
            "versions": run["versions"],
        }

    def recorder(self, layerwise: LayerwiseModel) -> Recorder:
        """For the first pass."""
        tiers = [tier for tier in self.tiers if TABLE[tier].by not in ("backward", "weights")]
        words = -(-layerwise.vocab_size // 64)
        return Recorder(self.layout.family.score, tiers, self.compute.backend, words)

    def _steps(self, layerwise: LayerwiseModel) -> Steps:
        """Counts decoder layers over all passes."""
        upto, layers = max(layerwise.moe_keys) + 1, len(layerwise.layers)
        total = upto * (2 if "outliers" in self.tiers else 1)
        total += len(self.layout.layers) if "weights" in self.tiers else 0
        total += 2 * layers - min(layerwise.moe_keys) if "gradient" in self.tiers else 0
        return Steps(self.progress, total)

    def weights(self, key: str) -> dict[str, Tensor]:
        """The fields of a layer's weights tier."""
        weighed = weigh_layer(self.checkpoint, self.layout, self.layout.layers[key], backend=self.compute.backend)
        return {f.name: getattr(weighed, f.name) for f in fields(weighed) if f.metadata["tier"] == "weights"}


class _FirstPass(MeasuringPass):
    """Everything that one forward pass measures; and when a layer is done, the replay of a sample and its weights."""

    def __init__(self, job: Job, layerwise: LayerwiseModel, store: Store, step: Steps) -> None:
        super().__init__(layerwise, job.data, job.recorder(layerwise), step, job.units)
        self.job, self.store, self.replay = job, store, None
        if "replay" in job.tiers:
            layerwise.check_whole("--tier replay")
            layers = {key: layerwise.layers[i] for i, key in self.keys.items()}
            self.replay = Replay(layerwise.loader, job.layout, layers, self.flight, job.compute.backend)
            self.replay.check()
            self.samples = samples(self.data, job.replay_tokens)

    def started(self) -> None:
        super().started()
        self.store.expect(self.layerwise.embedding_size, -(-self.layerwise.vocab_size // 64))

    def watched(self, probes: Mapping[str, Probe]) -> None:
        if self.replay is not None:
            self.open.enter_context(self.replay.watching(probes))

    def unite(self, key: str) -> None:
        super().unite(key)
        if self.replay is not None:
            self.replay.join(key, self.team.gather(self.replay.leave(key)), self.layerwise.device)

    def united(self, key: str) -> None:
        if self.replay is not None:
            for domain, sums in self.recorder.unite(key).items():
                self.replay.finish(key, domain, sums)

    def kept(self) -> dict[str, Any]:
        return {**super().kept(), "store": self.store.kept()}

    def finished(self, key: str, sums: Sums) -> None:
        self.store.put(key, sums)
        self.job.told(key, sums)
        if "weights" in self.job.tiers:
            found = self.job.weights(key)
            for domain in sums:
                self.store.add(key, domain, found)
            self.step()


class _SecondPass(MeasuringPass):
    """Entries of the outputs far from the mean that the first pass found."""

    recorder: OutlierRecorder

    def __init__(self, job: Job, layerwise: LayerwiseModel, store: Store, step: Steps) -> None:
        again = OutlierRecorder(job.layout.family.score, ("outliers",), job.compute.backend)
        super().__init__(layerwise, job.data, again, step)
        self.store = store

    def kept(self) -> dict[str, Any]:
        return {**super().kept(), "store": self.store.kept()}

    def loaded(self, layer: int) -> None:
        if layer in self.keys:
            key, device = self.keys[layer], self.layerwise.device
            first = self.team.broadcast(self.store.layer(key) if self.team.first else {})
            self.recorder.first[key] = {domain: s.to(device) for domain, s in first.items()}
        super().loaded(layer)

    def settled(self, key: str) -> None:
        self.recorder.first.pop(key, None)

    def finished(self, key: str, sums: Sums) -> None:
        for domain, s in sums.items():
            self.store.add(key, domain, {"outlier_sum": s.outlier_sum.cpu()})


def recipe_of(data: TokenData, compute: Compute, tiers: Collection[str]) -> dict[str, Any]:
    """All that decides the bits of statistics: the recipe of the data, the number of threads where it matters, and the
    library of the experts' products where it is another than torch's choice."""
    deciding = {"threads": deciding_threads(compute, tiers), "products": deciding_library(compute)}
    return dict(data.recipe) | {name: value for name, value in deciding.items() if value is not None}


def _header(
    checkpoint: Checkpoint, layout: Layout, data: TokenData, compute: Compute, tiers: tuple[str, ...]
) -> dict[str, Any]:
    return make_header(
        Source.of(checkpoint, layout),
        tokens=data.tokens,
        data=recipe_of(data, compute, tiers),
        backend=backends_of(compute.device, compute.backend, tiers),
        versions=versions(),
        dtype=compute.dtype_name,
        model=checkpoint.repository,
        config=checkpoint.config_sha256,
    )

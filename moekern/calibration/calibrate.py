"""Stream calibration text through a checkpoint, one decoder layer at a time, and measure its experts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from moekern import files
from moekern.architectures import Layout, find_layout
from moekern.calibration.passes import MeasuringPass, Progress, Steps, Sums, samples
from moekern.calibration.same import check_same
from moekern.calibration.sharing import (
    check_tiers_of,
    facts_of,
    header_of_part,
    kept_apart,
    recipe_of,
    share_of,
)
from moekern.calibration.text_groups import divided, groups_left, measured_in_groups, remove_groups
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import Segment, TokenData
from moekern.data.text import check_data
from moekern.errors import InputError, NoRoomForText, check_type
from moekern.measurement.batch import BatchContext
from moekern.measurement.gradient_parts import bytes_of, check_room, kept_of
from moekern.measurement.gradients import STAGES, check_gradients, measure_gradients
from moekern.measurement.probe import Probe
from moekern.measurement.recorder import CountingRecorder, OutlierRecorder, Recorder
from moekern.measurement.replay import Replay
from moekern.measurement.tiers import TABLE, backends_of, wanted_tiers
from moekern.measurement.weights import weigh_layer
from moekern.model.compute import Compute
from moekern.model.journal import ANEW, Journal, Resume, opened, undamaged
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.position import text_key
from moekern.model.precision import settled
from moekern.model.state_folder import removed
from moekern.statistics.file import Statistics
from moekern.statistics.header import Source, make_header
from moekern.statistics.layer import TIERS
from moekern.statistics.parts import load_part, open_part
from moekern.statistics.store import FileStore, HeldStore, Store, file_store, statistics_of
from moekern.team import Part
from moekern.version import versions

LOG = logging.getLogger(__name__)
REPLAY_TOKENS = 512
Finished = Callable[[str, Sums], object]  # a layer's key and sums
Told = Callable[[Statistics], object]  # of one layer
FIRST, SECOND = "first pass", "second pass"
OTHER = "another %s than what is to be measured; give statistics of the same text, with the tier dimensions"


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
    first: Path | None = None,
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

    Text that neither memory nor disk have room for is measured in groups, to the same bytes, but for tiers that need
    all of it at once (`text_groups`). With `out` what they measure stays in OUT.moekern/ until all are there, and the
    same call goes on with it. With `out` and `resume` it is written down how far it is, and the same call goes on where
    it was stopped, in any number of processes.

    Text is computed and its sums are added `data.chunk` sequences at a time, in their order: the batches of `data`
    change no bit, and neither does the number of threads, but for the gradient tier's, nor that of processes
    (`compute.team`, whose rank 0 alone has the sums). With `part`, one of several calibrations that know nothing of
    each other, the segments of its share are kept apart, for `statistics.parts.merge_parts`; outliers of parts are
    counted by `first`, merged statistics of all text with the tier "dimensions", and in the same pass.
    Raises InputError for a checkpoint that is not a MoE, cannot be built or lacks tensors, and for a tier that cannot
    be measured there.
    """
    wanted = wanted_tiers(tiers, TIERS, "calibrate")
    _check_given(data, compute, replay_tokens)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    check_data(data, checkpoint)
    layout, out = find_layout(checkpoint), None if out is None else Path(out)
    compute = settled(compute, checkpoint, layout)
    check_tiers_of(wanted, part, first)
    if part is not None and "gradient" in wanted and out is None:
        raise InputError("calibrate: a part keeps the gradients of its segments in a file; name one as out")
    if first is not None:
        check_same(first, Statistics.load(first), checkpoint, data, compute, ["dimensions"], then=OTHER)
    measure = partial(measure_once, checkpoint, data, compute, wanted, replay_tokens, layout=layout, first=first)
    groups: tuple[Part, ...] = ()
    if part is None and out is not None:
        if resume is not None and resume.restart:
            remove_groups(out)
        groups = groups_left(out)
    if not groups:
        try:
            return measure(out=out, resume=resume, part=part, progress=progress, told=told)
        except NoRoomForText as found:
            if part is not None:
                raise
            groups = divided(data, found, wanted, compute.team.size)
            LOG.info(f"{found}: the text is measured in {len(groups)} groups, each a pass over the weights")

    def group_to(path: Path, group: Part) -> None:
        own = None if resume is None else Resume(files.state_path(path), tell=resume.tell)
        before, of = group.number - 1, group.of
        step: Progress = lambda done, total: progress(before * total + done, of * total)  # noqa: E731
        measure(out=path, resume=own, part=group, progress=step)

    def check(path: Path) -> None:
        check_same(path, load_part(path), checkpoint, data, compute, wanted, exactly=True)
        if open_part(path).options != _options(wanted, replay_tokens):
            raise InputError(f"{path}: measured with another --replay-tokens; give the same again, or {ANEW}")

    statistics = measured_in_groups(groups, out, compute.spill, group_to, check)
    for key in statistics.layers:
        told(Statistics(statistics.header, {key: statistics.layers[key]}))
    return statistics


def _check_given(data: TokenData, compute: Compute, replay_tokens: int) -> None:
    if replay_tokens < 1:
        raise InputError(f"--replay-tokens {replay_tokens}: expected 1 or more")
    check_type("data", data, TokenData)
    check_type("compute", compute, Compute)
    if not data.batches:
        raise InputError("calibrate: the data hold no batch", kind="data")


def measure_once(
    source: Path | Checkpoint,
    data: TokenData,
    compute: Compute,
    tiers: tuple[str, ...],
    replay_tokens: int,
    *,
    layout: Layout | None = None,
    out: Path | None = None,
    resume: Resume | None = None,
    part: Part | None = None,
    first: Path | None = None,
    progress: Progress = lambda done, total: None,
    told: Told = lambda layer: None,
) -> Statistics:
    """As `calibrate`, all of the text, or a part of it, at once; the type that is computed in is settled.

    Raises NoRoomForText, on all ranks of a team, where neither memory nor disk have room for it.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint) if layout is None else layout
    header = _header(checkpoint, layout, data, compute, tiers)
    experts = {key: layer.num_experts for key, layer in layout.layers.items()}
    tell: Finished = lambda key, sums: told(Statistics(header, {key: sums}))  # noqa: E731
    units: Sequence[Segment] | None = None
    if part is not None:
        share = share_of(data.by_chunk(), part)
        header, units = (
            header_of_part(header, part, share, _options(tiers, replay_tokens)),
            list(kept_apart(share).values()),
        )
    job = Job(checkpoint, layout, data, compute, tiers, replay_tokens, progress, tell, units, first)
    if out is not None:
        files.check_new(out)
    team = compute.team
    team.together(measure_once, checkpoint.folder, data, compute, tiers, replay_tokens, part=part, first=first)
    team.check_alike(facts_of(checkpoint, compute, tiers))
    if out is None:
        held = HeldStore()
        with opened(None, {}, job.passes, team) as journal:  # of rank 0 of a team it may be there
            job.run(held, journal)
        return statistics_of(header, held, list(layout.layers) if team.first else ())
    with (
        file_store(out, header, experts, tiers, None if resume is None else resume.position) as store,
        opened(resume, job.key(header, part), job.passes, team) as journal,
    ):
        job.run(store, journal)
    if resume is not None:
        removed(resume.folder)
    return Statistics.load(out) if part is None else load_part(out)


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
    first: Path | None = None  # statistics of all text, by which outliers are counted in the first pass

    def run(self, store: Store, journal: Journal | None = None) -> None:
        """Measure every tier into `store`, or what a stopped run has left to do."""
        with open_layerwise(self.checkpoint, self.layout, self.compute, self.compute.team) as layerwise:
            if "gradient" in self.tiers:
                check_gradients(layerwise, self.data, self.units)
            step = self._steps(layerwise)
            if isinstance(store, FileStore) and self.units is not None and "gradient" in self.tiers:
                store.gradients = kept_of(layerwise)
                taken = bytes_of(store.gradients, len(self.units))
                if journal is None or journal.found is None:
                    check_room(store.path, taken, len(self.units))
                layerwise.notes.append(
                    f"gradients of {len(self.units)} segments take {files.sized(taken)} of {store.path}"
                )
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
                keep = None if self.units is None else store.keep
                measure_gradients(
                    layerwise, self.data, store.add, units=self.units, keep=keep, step=step, journal=journal, kept=kept
                )

    @property
    def passes(self) -> tuple[str, ...]:
        """Names of what is run through the layers, in this order."""
        again = (SECOND,) if self._twice else ()
        return (FIRST, *again, *(STAGES if "gradient" in self.tiers else ()))

    @property
    def _twice(self) -> bool:
        return "outliers" in self.tiers and self.first is None

    def key(self, header: Mapping[str, Any], part: Part | None = None) -> dict[str, Any]:
        """All that decides the bits of what is measured, in words for people."""
        share = {} if part is None else {"--part": str(part)}
        share |= {} if self.first is None else {"--first": files.sha256(self.first)}
        (run,) = header["runs"]
        return {
            "model": header["fingerprint"],
            "config.json": self.checkpoint.config_sha256,
            "text": {**text_key(self.data.by_chunk()), "recipe": run["data"]},
            "--tier": " ".join(self.tiers),
            **_options(self.tiers, self.replay_tokens),
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
        kind = Recorder if self.first is None else CountingRecorder
        return kind(self.layout.family.score, tiers, self.compute.backend, words)

    def _steps(self, layerwise: LayerwiseModel) -> Steps:
        """Counts decoder layers over all passes."""
        upto, layers = max(layerwise.moe_keys) + 1, len(layerwise.layers)
        total = upto * (2 if self._twice else 1)
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
        self.first = Statistics.load(job.first) if job.first is not None and self.team.first else None
        if "replay" in job.tiers:
            layerwise.check_whole("--tier replay")
            layers = {key: layerwise.layers[i] for i, key in self.keys.items()}
            self.replay = Replay(layerwise.loader, job.layout, layers, self.flight, job.compute.backend)
            self.replay.check()
            self.samples = samples(self.data, job.replay_tokens)

    def started(self) -> None:
        super().started()
        if self.replay is not None:
            self.replay.forget()
        self.store.expect(self.layerwise.embedding_size, -(-self.layerwise.vocab_size // 64))

    def loaded(self, layer: int) -> None:
        if isinstance(self.recorder, CountingRecorder) and layer in self.keys:
            key, device = self.keys[layer], self.layerwise.device
            told = {d: self.first.layers[key][d] for d in self.data.tokens} if self.first is not None else {}
            of = {domain: sums.to(device) for domain, sums in self.team.broadcast(told).items()}
            batches = self.data.batches  # in a part's file each segment is a domain of its own
            self.recorder.first = {key: {unit.domain: of[batches[unit.chunks[0]].domain] for unit in self.units}}
        super().loaded(layer)

    def watched(self, probes: Mapping[str, Probe]) -> None:
        if self.replay is not None:
            self.open.enter_context(self.replay.watching(probes))

    def through_segment(self, layer: int, context: BatchContext) -> None:
        if self.replay is not None:
            key = self.keys[layer]
            self.replay.finish(key, self.recorder.held(key, context))

    def conclude(self, layer: int) -> None:
        if self.replay is not None:
            self.replay.check_alike(self.keys[layer])
        super().conclude(layer)

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


def _options(tiers: Collection[str], replay_tokens: int) -> dict[str, Any]:
    """What decides the bits of statistics and does not stand in their header."""
    return {"--replay-tokens": replay_tokens} if "replay" in tiers else {}


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

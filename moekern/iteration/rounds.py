"""Calibrate and plan in one: layers pruned on the way while they stream by, and in rounds that score survivors again.

One-shot planning scores every layer of the whole model. Here a layer may be measured behind layers that are already
pruned (re-estimation: the progressive form of NAEE, arXiv:2402.14800), and experts may go in rounds, after each of
which all that are left are scored anew (MC-Suite, arXiv:2504.05586, without its training). Criteria on weights alone
see neither text nor routing, so their rounds need no pass: scores of single experts stay as they are, and those of
pairs are taken among the survivors. Every other criterion changes when tokens are routed anew, and takes a pass a
round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moekern.architectures import Layout, find_layout
from moekern.architectures.twins import router_numbers
from moekern.calibration.passes import MeasuringPass, Progress, Steps, Sums
from moekern.calibration.sharing import facts_of, recipe_of
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.criteria import Criterion, criterion_named, score_layer
from moekern.criteria.named import plug_ins
from moekern.data.batches import TokenData
from moekern.data.text import check_data
from moekern.errors import InputError
from moekern.measurement.recorder import Recorder
from moekern.measurement.tiers import BY_BATCH, backends_of
from moekern.measurement.weights import NO_TEXT, weigh_layer
from moekern.model.compute import Compute
from moekern.model.journal import Resume, Stage, opened
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.position import text_key
from moekern.model.precision import settled
from moekern.model.pruned_layers import LivePruner
from moekern.plan.choose import choose_top
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.make import SETS, make_plan, ties_of
from moekern.plan.provenance import Provenance
from moekern.router import kept_count
from moekern.statistics.file import Statistics
from moekern.statistics.header import Source, make_header
from moekern.team import ALONE
from moekern.version import versions

Keeps = Mapping[str, tuple[int, ...]]  # layer key -> experts by original number
Choose = Callable[[str, Sums, tuple[int, ...]], LayerPlan]


@dataclass(frozen=True)
class Method:
    """How experts are chosen. With `rounds` r, a layer loses about 1/r of what it loses in each round."""

    criterion: str
    keep: float | int
    rounds: int = 1
    reestimate: bool = True  # measure each layer behind the pruned layers before it
    domains: tuple[str, ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Iteration:
    """What all rounds share."""

    checkpoint: Checkpoint
    layout: Layout
    method: Method
    criterion: Criterion
    counts: Mapping[str, tuple[int, ...]]  # layer key -> experts left after each round
    provenance: Provenance
    measuring: Mapping[str, Any]  # for the provenance: how the text, if any, was run
    backend: str | None  # of kernels
    progress: Progress


def iterate(
    source: str | Path | Checkpoint,
    data: TokenData | None,
    method: Method,
    compute: Compute = Compute(),
    *,
    earlier: Sequence[Plan] = (),
    finished: Callable[[Plan], object] = lambda plan: None,
    resume: Resume | None = None,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """The plan of the last round. Without re-estimation and with one round: that of `calibrate` and `make_plan`.

    Each round is one pass over the weights, at the memory of `calibrate`; with re-estimation a MoE layer computes each
    batch twice. `finished` is called with the plan of each round before the last; `earlier` are such plans of a run
    that was stopped: those that are of this run are not made again, and with `resume` the round that it was in goes
    on. A criterion on weights alone takes no `data`.

    Raises InputError for what calibrate and make_plan refuse, for rounds that would drop nothing, for layers of
    different sizes with a share to keep, for criteria that need more than a pass measures, and for missing data.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    compute = compute if data is None else settled(compute, checkpoint, layout)
    job = _job(checkpoint, layout, data, method, compute, progress)
    if data is not None:
        compute.team.together(iterate, checkpoint.folder, data, method, compute, earlier=earlier)
        compute.team.check_alike(facts_of(checkpoint, compute))
    keeps = _taken_over(job, earlier)
    rounds = [f"round {number}" for number in range(1, method.rounds + 1)]
    resume, key = (None, {}) if data is None else (resume, _key(job, data, compute))
    with opened(resume, key, rounds, ALONE if data is None else compute.team) as journal:
        while True:
            stage = None if journal is None else journal.stage(rounds[len(keeps)])
            plan = _weighed_round(job, keeps) if data is None else _streamed_round(job, data, compute, keeps, stage)
            if len(keeps) + 1 == method.rounds:
                return plan
            finished(plan)
            keeps.append({key: layer.keep for key, layer in plan.layers.items()})


def needs_text(criterion: str) -> bool:
    """Whether a criterion is measured on text. Raises InputError for one that `iterate` cannot serve."""
    chosen = criterion_named(criterion)
    if chosen.family == "weight":
        return False
    for tier in chosen.tiers:
        if tier not in BY_BATCH:
            raise InputError(
                f"--criterion {criterion}: needs the {tier} tier, which is not measured on the way; choose one of the "
                f"tiers {', '.join(('routed', *BY_BATCH))}, or calibrate with --tier {tier} and plan"
            )
    return True


def schedule(experts: int, kept: int, rounds: int, groups: int = 1) -> tuple[int, ...]:
    """How many of `experts` are left after each round, the last time `kept`; always as many in each group.

    Raises InputError when a round would drop none.
    """
    steps = (experts - kept) // groups
    if rounds < 1 or rounds > max(1, steps):
        raise InputError(
            f"--rounds {rounds}: expected 1 to {max(1, steps)}: each drops at least {groups} of the {experts - kept} "
            "experts that go"
        )
    return tuple(experts - steps * done // rounds * groups for done in range(1, rounds + 1))


def _job(
    checkpoint: Checkpoint, layout: Layout, data: TokenData | None, method: Method, compute: Compute, progress: Progress
) -> Iteration:
    text = needs_text(method.criterion)
    if text != (data is not None):
        raise InputError(
            f"--criterion {method.criterion}: it is measured on text: give --data"
            if text
            else f"--data: {method.criterion} looks at weights alone; leave the text out"
        )
    if data is not None:
        check_data(data, checkpoint)
    sizes = {layer.num_experts for layer in layout.layers.values()}
    if isinstance(method.keep, float) and len(sizes) > 1:
        raise InputError(f"--keep {method.keep}: layers have different numbers of experts; give a count")
    counts = {}
    for key, layer in layout.layers.items():
        kept = kept_count(method.keep, layout.router.of(layer.num_experts))
        counts[key] = schedule(layer.num_experts, kept, method.rounds, layout.n_group)
    domains = [NO_TEXT] if data is None else list(method.domains or data.tokens)
    for name in method.domains or ():
        if data is None or name not in data.tokens:
            raise InputError(f"--domain {name}: the text has no such domain")
    chosen = criterion_named(method.criterion)
    provenance = Provenance(
        fingerprint=checkpoint.fingerprint,
        criterion=chosen.name,
        domains=domains,
        tokens={NO_TEXT: 0} if data is None else data.tokens,
        keep=method.keep,
        num_experts=layout.num_experts,
        seed=method.seed,
        routers=router_numbers(checkpoint, layout),
    )
    if data is None:
        backends_of("cpu", compute.backend, ("weights",))  # refuses one that cannot weigh
    measuring = {
        "backend": None if data is None else backends_of(compute.device, compute.backend),
        "config": checkpoint.config_sha256,
        "data": None if data is None else recipe_of(data, compute, ()),
        "dtype": compute.dtype_name,
        **({"plug_ins": code} if (code := plug_ins(method.criterion)) else {}),
        "rounds": method.rounds,
        "reestimate": method.reestimate and data is not None,
    }
    return Iteration(checkpoint, layout, method, chosen, counts, provenance, measuring, compute.backend, progress)


def _key(job: Iteration, data: TokenData, compute: Compute) -> dict[str, Any]:
    """All that decides the bits of the plan, in words for people."""
    method, made = job.method, job.measuring
    return {
        "model": job.checkpoint.fingerprint,
        "config.json": made["config"],
        "text": {**text_key(data.by_chunk()), "recipe": made["data"]},
        **{f"--{name}": getattr(method, name) for name in ("criterion", "keep", "rounds", "reestimate", "seed")},
        "--domain": job.provenance.domains,
        "plug-ins": made.get("plug_ins"),
        "--dtype": made["dtype"],
        "--device": compute.place.type,
        "kernels": made["backend"],
        "versions": versions(),
    }


def _plan(job: Iteration, layers: Mapping[str, LayerPlan], keeps: Sequence[Keeps]) -> Plan:
    """The plan of a round, which names what stayed after the rounds before it."""
    chosen = {key: layers[key] for key in job.layout.layers}
    provenance = job.provenance.document({key: len(layer.keep) for key, layer in chosen.items()})
    rounds = [{key: list(keep) for key, keep in each.items()} for each in keeps]
    ties = {} if job.criterion.kind in SETS else ties_of(chosen, job.layout.n_group)
    more = {"ties": ties} if ties else {}
    return Plan(chosen, {**provenance, **job.measuring, **more, "earlier_rounds": rounds})


def _taken_over(job: Iteration, earlier: Sequence[Plan]) -> list[Keeps]:
    """What rounds that another run finished kept, in order, as far as they are rounds of this run."""
    keeps: list[Keeps] = []
    for plan in earlier:
        layers = dict(plan.layers)
        same = set(layers) == set(job.layout.layers) and len(keeps) + 1 < job.method.rounds
        if not same or Plan.from_json(_plan(job, layers, keeps).to_json()) != plan:
            break
        keeps.append({key: layer.keep for key, layer in layers.items()})
    return keeps


def _weighed_round(job: Iteration, keeps: Sequence[Keeps]) -> Plan:
    """All layers are weighed once a round: reading is cheap beside a forward pass, and only one layer is in memory."""
    layers, total = {}, len(job.layout.layers)
    for done, (key, layer) in enumerate(job.layout.layers.items(), start=1):
        held = keeps[-1][key] if keeps else tuple(range(layer.num_experts))
        weighed = weigh_layer(job.checkpoint, job.layout, layer, backend=job.backend)
        sums = weighed.permuted(torch.tensor(held))
        scores = tuple(score_layer(job.criterion, sums, key, job.method.seed).tolist())
        chosen = choose_top(scores, job.counts[key][len(keeps)], groups=job.layout.n_group, where=f"layer {key}")
        layers[key] = LayerPlan(tuple(held[e] for e in chosen), None if keeps else scores)
        job.progress(len(keeps) * total + done, job.method.rounds * total)
    return _plan(job, layers, keeps)


def _streamed_round(
    job: Iteration, data: TokenData, compute: Compute, keeps: Sequence[Keeps], stage: Stage | None
) -> Plan:
    model = Source.of(job.checkpoint, job.layout)
    backends = backends_of(compute.device, compute.backend)

    def choose(key: str, sums: Sums, held: tuple[int, ...]) -> LayerPlan:
        left = replace(model, router=model.router.of(len(held)))
        header = make_header(left, tokens=data.tokens, data=data.recipe, backend=backends, versions=versions())
        method, count = job.method, job.counts[key][len(keeps)]
        statistics = Statistics(header, {key: sums})
        plan = make_plan(statistics, job.criterion, count, seed=method.seed, domains=method.domains)
        layer = plan.layers[key]
        # The scores of survivors would be one for each of them, not of the original experts.
        return LayerPlan(tuple(held[e] for e in layer.keep), None if keeps else layer.scores)

    with open_layerwise(job.checkpoint, job.layout, compute, compute.team) as layerwise:
        total = max(layerwise.moe_keys) + 1
        step = Steps(job.progress, job.method.rounds * total, len(keeps) * total)
        measured = _Round(job, layerwise, data, choose, keeps[-1] if keeps else {}, step)
        measured.run(stage)
    return _plan(job, measured.plans, keeps)


class _Round(MeasuringPass):
    """Measure every MoE layer, pruned to `keeps` where that names it, and choose what stays as soon as it is measured.

    With `reestimate` the layer then drops the others in memory and computes all batches again for the next one.
    """

    def __init__(self, job: Iteration, layerwise: LayerwiseModel, data: TokenData, choose: Choose, keeps: Keeps,
                 step: Steps) -> None:  # fmt: skip
        self.job, self.choose, self.keeps = job, choose, keeps
        super().__init__(layerwise, data, self._recorder(layerwise, job.criterion.tiers), step)
        self.twice = [i for i in self.keys if i != self.stop_after] if job.method.reestimate else ()
        self.pruner = LivePruner(layerwise.loader, layerwise.layout)
        self.plans: dict[str, LayerPlan] = {}

    def started(self) -> None:
        super().started()
        self.pruner.held.clear()
        self.plans.clear()

    def kept(self) -> dict[str, Any]:
        return {**super().kept(), "plans": {key: (plan.keep, plan.scores) for key, plan in self.plans.items()}}

    def restored(self, layer: int, kept: Any) -> None:
        super().restored(layer, kept)
        self.plans = {
            key: LayerPlan(tuple(keep), None if scores is None else tuple(scores))
            for key, (keep, scores) in kept["plans"].items()
        }
        if list(self.plans) != [key for i, key in self.keys.items() if i < layer]:
            raise ValueError("plans of other layers")

    def loaded(self, layer: int) -> None:
        key = self.keys.get(layer)
        if key is not None and key in self.keeps:
            self.pruner.prune(key, self.keeps[key])
        super().loaded(layer)

    def between(self, layer: int) -> None:
        key = self.keys[layer]
        self.conclude(layer)
        self.pruner.prune(key, self.plans[key].keep)
        # Watched the second time too, so that the experts are computed alike; what they add up is thrown away.
        again = self._recorder(self.layerwise, ())
        again.apart = self.recorder.apart
        self.watch(layer, again)

    def held(self, layer: int) -> Sequence[int] | None:
        return self.pruner.held.get(self.keys.get(layer, ""))

    def finished(self, key: str, sums: Sums) -> None:
        held = self.keeps.get(key, tuple(range(self.layerwise.layout.layers[key].num_experts)))
        self.plans[key] = self.choose(key, sums, held)

    def settled(self, key: str) -> None:
        plan = self.team.broadcast(self.plans.get(key))
        assert plan is not None
        self.plans[key] = plan

    def _recorder(self, layerwise: LayerwiseModel, tiers: Sequence[str]) -> Recorder:
        words = -(-layerwise.vocab_size // 64)
        return Recorder(layerwise.layout.family.score, tiers, self.job.backend, words)

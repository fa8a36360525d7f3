"""The stage that optimises masks: what the original predicts, steps with looks at held-back text, the best of these."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moekern.architectures import Layout, find_layout
from moekern.architectures.twins import router_numbers
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.checkpoint.writing import write_tensors
from moekern.data.batches import TokenData
from moekern.data.text import check_data
from moekern.errors import InputError, check_type
from moekern.evaluation.losses import Loss, mean_loss, mean_of, row_document, row_of
from moekern.evaluation.under_plans import check_plans
from moekern.files import is_plain
from moekern.masks.biased import RECONSTRUCTED, Biased, Biases
from moekern.masks.logits import Adam, Logits, Pools, by_layer, drawn, gathered, spread
from moekern.masks.masked import WHAT, Masked, check_optimised
from moekern.masks.settings import Search
from moekern.model.compute import Compute
from moekern.model.journal import check_same_run, undamaged
from moekern.model.layerwise import open_layerwise
from moekern.model.position import text_key
from moekern.model.precision import settled
from moekern.model.requantised import as_stored
from moekern.plan.budgets import Budget
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.provenance import Provenance
from moekern.recovery.course import Course, Sample
from moekern.recovery.loaded import staying
from moekern.recovery.objective import Objective
from moekern.recovery.settings import Training
from moekern.recovery.taught import taught
from moekern.recovery.trained import Trained
from moekern.refit.variants import FITTED, Split
from moekern.version import versions

STATE = "state.safetensors"
VECTORS = ("values", "mean", "square", "best")
Losses = Mapping[str, Loss]  # by domain
Progress = Callable[[str, float, int], None]  # what is being done, how much of it is done, of how much
Counts = Mapping[str, tuple[int, int]]  # experts of a layer, and how many of them stay where it began


@dataclass(frozen=True)
class Optimised:
    """The plan that was best on held-back text, and losses of the plan that it began with and of it: `held` chose it,
    `judged` decided nothing (empty where there is too little text). best: after which step, from 1 on; 0: as it began.
    curve: a record for each step and each look. changed: experts that stay and did not."""

    plan: Plan
    best: int
    steps: int
    changed: int
    held: tuple[Losses, Losses]
    judged: tuple[Losses, Losses]
    curve: Sequence[Mapping[str, Any]]
    notes: tuple[str, ...] = ()


@dataclass
class _State:
    """How far a run is."""

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, dict[str, Any]] = field(default_factory=dict)  # of text that is judged by
    best: int = 0
    least: float | None = None  # of the looks


def optimise(
    source: str | Path | Checkpoint,
    plan: Plan,
    data: TokenData,
    folder: Path,
    search: Search = Search(),
    compute: Compute = Compute(),
    *,
    restart: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Optimised:
    """Which experts stay, chosen by gradient steps on KL to the original at the model's end, from a plan on, with one
    decoder layer in memory, or all of them where there is room: the same numbers.

    Of each domain a tenth of the sequences is held back to choose the best mask, and another one to judge it. What is
    not done yet lies in `folder`, and the same call goes on from there after a kill, to the same bytes. Raises
    InputError for models whose masks cannot be optimised, for plans that do not fit, and for text that is too little.
    """
    search.check()
    check_type("compute", compute, Compute)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    check_data(data, checkpoint)
    _check(plan, layout, checkpoint, search)
    compute = settled(compute, checkpoint, layout)
    course = _course(data, search)
    counts = {key: (layer.num_experts, len(plan.layers[key].keep)) for key, layer in layout.layers.items()}
    key = _key(checkpoint, plan, course, data, search, compute)
    with open_layerwise(checkpoint, layout, compute) as layerwise:  # what cannot be is found before anything is written
        check_optimised(layerwise)
        classes = layerwise.vocab_size
    folder.mkdir(parents=True, exist_ok=True)
    _check_left(folder, key, restart=restart)
    teacher = taught(
        checkpoint, course.samples, folder, search.top, compute, classes, restart=restart, tell=tell, progress=progress
    )
    with open_layerwise(checkpoint, layout, compute) as opened:
        layerwise = staying(opened)
        layerwise.model.requires_grad_(False)
        of_layers = "all layers in memory" if layerwise.stays else "one layer in memory at a time"
        named = "logits" if search.method == "masks" else "biases"
        tell(f"{WHAT}: {sum(count for count, _ in counts.values())} {named}; {of_layers}")
        pools = _pools(counts, layout, search)
        start = _mask_of(plan, counts)
        logits: Adam = Biases.of(pools, torch.zeros(pools.size))
        if search.method == "masks":
            logits = Logits.of(pools, pools.begun(_scores_of(plan, counts), start))
        masked = Masked(layerwise, Objective(), teacher)
        run = _Run(masked, course, search, counts, start, logits, logits.values, folder, key, tell, progress)
        state = run.searched()
        found = spread(run.mask(run.best), counts)
        provenance = _provenance(checkpoint, layout, plan, data, search)
        return run.finished(state, _planned(plan, found, run.best, counts, provenance, state, search))


@dataclass
class _Run:
    """A run from where it was stopped to its end. best: the logits, or biases, of the best look."""

    masked: Masked
    course: Course
    search: Search
    counts: Counts
    start: torch.Tensor
    logits: Adam
    best: torch.Tensor
    folder: Path
    key: Mapping[str, Any]
    tell: Callable[[str], None]
    progress: Progress

    def searched(self) -> _State:
        """Steps to the end. The state is written down at every look."""
        state, of = self._left(), len(self.course.steps)
        if state.step == 0 and not state.curve:
            state.before = row_document(self._look(self.course.judged, self.logits.values))
            self._looked(state)
        while state.step < of:
            told = self._stepped(state.step, of)
            state.step += 1
            state.curve.append({"step": state.step, **told})
            if state.step % self.search.looks == 0 or state.step == of:
                self._looked(state)
        return state

    def mask(self, values: torch.Tensor) -> torch.Tensor:
        """bool: which experts stay by these values; as it began where they say nothing yet."""
        return self.logits.pools.chosen(values) if bool(values.any()) else self.start

    def _stepped(self, step: int, of: int) -> dict[str, Any]:
        """One step on the logits, or biases."""
        told = self._on_masks(step, of) if self.search.method == "masks" else self._on_biases(step, of)
        return {"tokens": self.course.tokens(step), **told}

    def _on_biases(self, step: int, of: int) -> dict[str, Any]:
        """What moves the biases: the loss of the next token of the whole model."""
        samples, own = self.course.steps[step], by_layer(self.logits.values, self.counts)
        biased = Biased(self.masked.layerwise, self.search.diversity)
        found, sums = biased.slopes(samples, own, lambda share: self.progress("optimising", step + share, of))
        self.logits.stepped(gathered(found, self.counts), self.search.peak)
        return {"nll": float(sums[0]) / float(sums[3])}

    def _on_masks(self, step: int, of: int) -> dict[str, Any]:
        """What moves the logits: KL of masked models."""
        samples, pools = self.course.steps[step], self.logits.pools
        noisy = [
            self.logits.values.double() + noise
            for noise in drawn(pools.size, min(self.search.masks, len(samples)), self.search.seed, step)
        ]
        masks = [spread(~pools.chosen(values), self.counts) for values in noisy]
        worth, sums = self.masked.worth(samples, masks, lambda share: self.progress("optimising", step + share, of))
        temperature, gradient = self.search.temperature(step), torch.zeros(pools.size, dtype=torch.float64)
        for n, values in enumerate(noisy):
            own = gathered({key: found[n] for key, found in worth.items()}, self.counts)
            gradient += own * pools.slope(values, temperature)
        self.logits.stepped(gradient, self.search.peak)
        return {"temperature": temperature, "kl": float(sums[1]) / float(sums[3])}

    def _look(self, samples: Sequence[Sample], values: torch.Tensor) -> Losses:
        if not samples:
            return {}
        return self.masked.look(samples, spread(~self.mask(values), self.counts))

    def _looked(self, state: _State) -> None:
        """Look at what is held back, keep what is best, and write down how far the run is."""
        held = self._look(self.course.held, self.logits.values)
        if held:
            # what the steps make smaller
            value = mean_of(held, "kl" if self.search.method == "masks" else "nll")
            state.curve.append({"step": state.step, "held": row_document(held), "changed": self._changed()})
        if not held or state.least is None or value < state.least:
            state.least, state.best, self.best = value if held else None, state.step, self.logits.values.clone()
        vectors = {name: self.best if name == "best" else getattr(self.logits, name) for name in VECTORS}
        tensors = {name: as_stored(vector) for name, vector in vectors.items()}
        write_tensors(self.folder / STATE, tensors, {"said": json.dumps({"key": self.key, **asdict(state)})})

    def _changed(self) -> int:
        """How many experts stay that did not in the beginning."""
        return int((self.mask(self.logits.values) & ~self.start).sum())

    def _left(self) -> _State:
        """Where a run was stopped; its beginning where none was."""
        path = self.folder / STATE
        if not is_plain(path):
            return _State()
        found = Trained.said_in(path)
        with undamaged(self.folder), safe_open(path, framework="pt") as file:
            vectors = {name: file.get_tensor(name) for name in VECTORS}
            state = _State(**{name: found[name] for name in asdict(_State())})
        self.best = vectors.pop("best")
        self.logits = type(self.logits)(self.logits.pools, **vectors, steps=state.step)
        self.tell(f"{WHAT}: going on behind step {state.step} of {len(self.course.steps)}, where a stopped run was")
        return state

    def finished(self, state: _State, plan: Plan) -> Optimised:
        """Judge what was best."""
        notes = list(self.course.notes)
        after = self._look(self.course.judged, self.best)
        if self.course.held and not state.best:
            notes.append("no mask was better on held-back text than the plan's: it stays as it is; more steps may help")
        looks = [each["held"] for each in state.curve if "held" in each and each["step"] in (0, state.best)]
        held = (row_of(looks[0]), row_of(looks[-1])) if self.course.held else ({}, {})
        changed = int((self.mask(self.best) & ~self.start).sum())
        judged = row_of(state.before), after
        return Optimised(plan, state.best, state.step, changed, held, judged, tuple(state.curve), tuple(notes))


def _check(plan: Plan, layout: Layout, checkpoint: Checkpoint, search: Search) -> None:
    """Raise InputError for a plan or a model that is not for this."""
    check_plans({"plan": plan}, layout, checkpoint)
    if layout.family.no_gradient:
        raise InputError(f"{WHAT}: {layout.family.name}: {layout.family.no_gradient}")
    if plan.width is not None:
        raise InputError(f"{WHAT}: the plan says which channels of experts stay; take a plan of whole experts")
    if plan.merges:
        raise InputError(f"{WHAT}: the plan merges experts, which a mask does not; take a plan that drops them")
    if search.budget == "global" and layout.n_group > 1:
        raise InputError(
            f"--budget global: each of the router's {layout.n_group} groups must keep as many; take uniform"
        )


def _course(data: TokenData, search: Search) -> Course:
    """The text of each step; chunks are small enough that each mask has some."""
    longest = max((batch.input_ids.shape[1] for batch in data.batches), default=1)
    chunk = max(1, min(data.chunk, search.step_tokens // search.apart // longest))
    small = replace(data, chunk=chunk)
    there = Split.of(small).tokens(FITTED)
    if there < 2:
        raise InputError(
            f"{WHAT}: no sequence of two tokens is there to take steps on; give text (--data)", kind="data"
        )
    epochs = search.steps * search.step_tokens / there
    return Course.of(small, Training(epochs=epochs, step_tokens=search.step_tokens, seed=search.seed))


def _pools(counts: Counts, layout: Layout, search: Search) -> Pools:
    if search.budget == "global":
        return Pools.total(counts, layout.router.top_k)
    return Pools.uniform(counts, layout.n_group)


def _mask_of(plan: Plan, counts: Counts) -> torch.Tensor:
    """bool: which experts of all layers a plan keeps."""
    parts = []
    for key, (experts, _) in counts.items():
        part = torch.zeros(experts, dtype=torch.bool)
        part[list(plan.layers[key].keep)] = True
        parts.append(part)
    return torch.cat(parts)


def _scores_of(plan: Plan, counts: Counts) -> torch.Tensor:
    """Scores of all layers' experts; zeros of layers whose plan has none."""
    return gathered({key: plan.layers[key].scores or torch.zeros(n) for key, (n, _) in counts.items()}, counts)


def _planned(
    plan: Plan,
    keep: Mapping[str, tuple[int, ...]],
    values: torch.Tensor,
    counts: Counts,
    provenance: Mapping[str, Any],
    state: _State,
    search: Search,
) -> Plan:
    """What stays as a plan: logits are the scores. Layers that are not optimised (MTP) stay as they were planned."""
    scored = {key: LayerPlan(keep[key], tuple(own.tolist())) for key, own in by_layer(values, counts).items()}
    whole = Provenance(**provenance).document({key: len(keep[key]) for key in counts})
    curve = [
        {"step": each["step"], "kl": mean_loss({d: loss["kl"] for d, loss in each["held"].items()})}
        for each in state.curve
        if "held" in each
    ]
    more = {} if search.method == "masks" else {"reconstructed": RECONSTRUCTED}
    said = {"plan": plan.digest, "search": asdict(search), "best": state.best, "held": curve, "versions": versions()}
    mtp = {"mtp": plan.provenance["mtp"]} if "mtp" in plan.provenance else {}
    return Plan({**plan.layers, **scored}, whole | {WHAT: said | more} | mtp)


def _provenance(checkpoint: Checkpoint, layout: Layout, plan: Plan, data: TokenData, search: Search) -> dict[str, Any]:
    first = next(iter(layout.layers))
    return {
        "fingerprint": checkpoint.fingerprint,
        "criterion": search.method,
        "domains": list(data.tokens),
        "tokens": data.tokens,
        "keep": plan.provenance.get("keep", len(plan.layers[first].keep)),
        "num_experts": layout.num_experts,
        "seed": search.seed,
        "budget": Budget(search.budget),
        "routers": router_numbers(checkpoint, layout),
    }


def _key(
    checkpoint: Checkpoint, plan: Plan, course: Course, data: TokenData, search: Search, compute: Compute
) -> dict[str, Any]:
    """All that decides the bits, in words for people."""
    return {
        "model": checkpoint.fingerprint,
        "plan": plan.digest,
        "text": text_key(replace(data, batches=tuple(sample.batch for sample in course.samples))),
        "search": asdict(search),
        "--dtype": compute.dtype_name,
        "--device": compute.place.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _check_left(folder: Path, key: Mapping[str, Any], *, restart: bool) -> None:
    """Raise InputError where a run of another kind was stopped; with `restart` what it left is removed."""
    if restart:
        (folder / STATE).unlink(missing_ok=True)
    if is_plain(folder / STATE):
        check_same_run(folder, Trained.said_in(folder / STATE).get("key"), key)

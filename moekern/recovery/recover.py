"""The stage that trains: what the original predicts, then steps with looks at held-back text, then what is best."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moekern.architectures import find_layout
from moekern.calibration.sharing import facts_of
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import TokenData
from moekern.data.text import check_data
from moekern.errors import InputError, check_type
from moekern.evaluation.losses import Loss, mean_loss, mean_of, row_document, row_of
from moekern.files import is_folder, is_plain, sized
from moekern.model.compute import Compute
from moekern.model.journal import check_same_run
from moekern.model.position import text_key
from moekern.model.precision import settled
from moekern.model.top_k import TopK
from moekern.recovery.course import Course, Sample
from moekern.recovery.entropy import RECONSTRUCTED, check_entropy, idle
from moekern.recovery.factors import share_at
from moekern.recovery.loaded import ready, trainable
from moekern.recovery.objective import Objective
from moekern.recovery.settings import Training
from moekern.recovery.steps import Steps
from moekern.recovery.taught import Progress, taught
from moekern.recovery.trained import VALUES, Trained
from moekern.recovery.written import factored_size, write_adapter, write_trained
from moekern.version import versions

STATE, BEST, TRAINED, ADAPTER = "state.safetensors", "best.safetensors", "trained", "adapter"
LOOKING = "looking at held-back text"
Losses = Mapping[str, Loss]  # by domain


@dataclass(frozen=True)
class Recovery:
    """What came of training: `folder` holds the tensors that changed, by their names in the checkpoint, or an adapter.

    Losses are on text that was not trained on, before and after: `held` chose the best state, `judged` decided nothing
    (empty where there is too little text). best: the step after which the state was best, from 1 on; 0: as it was.
    curve: a record for each step and each look. record: what decided the result. settings: numbers that config.json
    must have from now on, by path. factored: what experts take as factors, by `written.factored_size`. Where each token
    chooses fewer experts, or experts are factored, losses are of such, but for those of `judged` before.
    """

    folder: Path
    tensors: int
    best: int
    steps: int
    held: tuple[Losses, Losses]
    judged: tuple[Losses, Losses]
    curve: Sequence[Mapping[str, Any]]
    record: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    settings: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    factored: Mapping[str, int] = field(default_factory=dict)


@dataclass
class _State:
    """How far a run is."""

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, dict[str, Any]] = field(default_factory=dict)  # of text that is judged by
    best: int = 0
    least: float | None = None  # of the looks
    stale: int = 0  # looks since then


def recover(
    pruned: str | Path | Checkpoint,
    original: str | Path | Checkpoint | None,
    data: TokenData,
    folder: Path,
    training: Training = Training(),
    compute: Compute = Compute(),
    *,
    judged: TokenData | None = None,
    predictions: Path | None = None,
    restart: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Recovery:
    """Train weights of a pruned model towards the original's predictions of a text (`original` None: by the loss of
    the next token alone), with one layer of it in memory, or all of them where there is room: the same numbers.

    Of each domain a tenth of the sequences is held back to choose the best state, and another one, unless `judged` is
    given, to judge it. What is not done yet lies in `folder`, and the same call goes on from there after a kill, to the
    same bytes. What the original predicts lies in `predictions` (None: there too), for other runs on the same text.
    Several processes (`compute.team`) share the sequences of each step, and the folder, which all must see;
    another number of them gives numbers that differ by rounding. Raises InputError for models that cannot be trained,
    or not so, and for text that is too little.
    """
    training.check()
    check_type("compute", compute, Compute)
    student = pruned if isinstance(pruned, Checkpoint) else open_checkpoint(pruned)
    whole = open_checkpoint(original) if isinstance(original, (str, Path)) else original
    check_data(data, student)
    if training.kl and whole is None:
        raise InputError("recover: --kl trains towards an original: name it (--original), or give --kl 0 --next 1")
    compute = settled(compute, student, find_layout(student))
    team = compute.team
    folders = student.folder, whole and whole.folder
    more = {"judged": judged, "predictions": predictions, "restart": restart}
    team.together(recover, *folders, data, folder, training, compute, **more)
    team.check_alike(facts_of(student, compute))
    course = Course.of(data, training, judged)
    key = _key(student, whole if training.kl else None, course, data, training, compute)
    with trainable(student, compute, training) as (layerwise, _):  # what cannot be is found before anything is written
        classes = layerwise.vocab_size
        if training.entropy:
            check_entropy(layerwise)
        if training.top_k is not None:
            TopK(layerwise.loader, layerwise.layout).check(training.top_k)
    if team.first:
        folder.mkdir(parents=True, exist_ok=True)
        _check_left(folder, key, restart=restart)
    team.meet()
    if not is_folder(folder):
        raise InputError(f"{folder}: rank {team.rank} does not see this folder, which all must")
    teacher = None
    if training.kl and whole is not None:
        place = predictions or folder
        teacher = taught(
            whole, course.samples, place, training.top, compute, classes,
            restart=restart, tell=tell, progress=progress,
        )  # fmt: skip
    with ready(student, compute, training) as there:
        tell(f"recover: {there.described}")
        objective = Objective(training.kl, training.next, training.temperature)
        steps = Steps(there.layerwise, there.trained, objective, teacher, training.entropy)
        chosen = TopK(there.layerwise.loader, there.layerwise.layout)
        run = _Run(steps, chosen, course, training, folder, key, tell, progress)
        return run.finished(run.trained_on())


@dataclass
class _Run:
    """A run from where it was stopped to its end."""

    steps: Steps
    chosen: TopK
    course: Course
    training: Training
    folder: Path
    key: Mapping[str, Any]
    tell: Callable[[str], None]
    progress: Progress

    @property
    def of(self) -> int:
        """Steps in all."""
        return len(self.course.steps)

    @property
    def top_k(self) -> int:
        """What each token chooses in the end."""
        return self.chosen.of_config if self.training.top_k is None else self.training.top_k

    @property
    def trained(self) -> Trained:
        return self.steps.trained

    def trained_on(self) -> _State:
        """Train to the end. The state is written down at every look."""
        state = self._left()
        of, looks = self.of, self.training.looks(self.of)
        if state.step == 0 and not state.curve:
            state.before = row_document(self._look(self.course.judged, untrained=True))
            if self.trained.rows is not None:
                self.steps.begin()
            self._looked(state)
        peak = self.training.peak(self.steps.layerwise.embedding_size, self._distance(state))
        while state.step < of and state.stale < self.training.patience:
            rate, samples = self.training.rate_at(state.step, of, peak), self.course.steps[state.step]
            self.chosen.choose(self.training.top_k_at(state.step, of, self.chosen.of_config))
            told = self.steps.step(samples, rate, lambda share: self.progress("training", state.step + share, of))
            if state.step == 0:
                self._check_touched()
            state.step += 1
            if self.trained.rows is not None:
                self.trained.rows.drop(share_at(state.step, of, self.training.kept_rows))
            tokens = self.course.tokens(state.step - 1)
            fewer = {} if self.training.top_k is None else {"top_k": self.chosen.now}
            state.curve.append({"step": state.step, "tokens": tokens, "rate": rate, **fewer, **told})
            if state.step % looks == 0 or state.step == of:
                self._looked(state)
        return state

    def _distance(self, state: _State) -> float | None:
        """KL to the original before anything was trained; None where nothing tells it."""
        held = next((each["held"] for each in state.curve if each["step"] == 0), None)
        if held is None or not self.training.kl:
            return None
        return mean_loss({domain: loss["kl"] for domain, loss in held.items()})

    def finished(self, state: _State) -> Recovery:
        """Write what the best state is, and judge it."""
        team, notes = self.steps.layerwise.team, list(self.course.notes)
        best = state.best if self.course.held else state.step
        if best != state.step:
            self.trained.load(self.folder / BEST, VALUES)
        if self.trained.rows is not None:
            self.trained.rows.drop(self.training.kept_rows)
        size = factored_size(self.trained)
        notes += _size_notes(size)
        self.chosen.choose(self.top_k)
        after = self._look(self.course.judged)
        fewer = self._settings()
        if self.course.held and not best and self.of:
            changed = "no weight" if fewer else "nothing"
            notes.append(
                f"no state was better on held-back text than the first: {changed} is changed; a lower --rate may help"
            )
        elif state.step < self.of:
            notes.append(f"ended after step {state.step} of {self.of}: {state.stale} looks brought nothing")
        if fewer:
            own, now = self.chosen.of_config, self.top_k
            notes.append(
                f"each token chooses {now} of the experts instead of {own}: losses before are with {own} on text that "
                f"decided nothing, with {now} on text that chose the best state"
            )
            notes += idle(state.curve)
        out = self.folder / TRAINED
        if team.first:
            if is_folder(out):
                shutil.rmtree(out)
            out.mkdir()
        team.meet()
        count = 0
        if self.training.adapter:
            count = write_adapter(self.trained, self.folder / ADAPTER if self.training.factored else out)
        if not self.training.adapter or self.training.factored:
            as_it_was = not best and not self.training.factored
            count = write_trained(self.trained, out, as_it_was=as_it_was, sparse=self.training.adapter)
        looks = [each["held"] for each in state.curve if "held" in each and each["step"] in (0, best)]
        held = (row_of(looks[0]), row_of(looks[-1])) if self.course.held else ({}, {})
        return Recovery(
            out, count, best, state.step, held, (row_of(state.before), after), tuple(state.curve),
            {"training": asdict(self.training), "best": best, "steps": state.step, **self.key, **self._reconstructed()},
            tuple(notes), fewer, size,
        )  # fmt: skip

    def _settings(self) -> dict[tuple[str, ...], int]:
        fewer = self.top_k != self.chosen.of_config
        return dict.fromkeys(self.chosen.layout.top_k_paths, self.top_k) if fewer else {}

    def _reconstructed(self) -> dict[str, str]:
        """What of a method is not known from its paper, for the record."""
        seer = self.training.entropy or self.training.top_k is not None
        return {"reconstructed": RECONSTRUCTED} if seer else {}

    def _look(self, samples: Sequence[Sample], shown: bool = True, untrained: bool = False) -> Losses:
        """`shown`: it has a progress of its own, where it is not one of many between steps."""
        if not samples:
            return {}
        step = partial(self.progress, LOOKING) if shown else lambda done, total: None
        return self.steps.look(samples, step, untrained=untrained)

    def _looked(self, state: _State) -> None:
        """Look at what is held back, keep what is best, and write down how far the run is. What has not the experts a
        token or the sparse rows of the end yet is looked at with these."""
        self.chosen.choose(self.top_k)
        team = self.steps.layerwise.team
        with self.trained.as_sparse_as_in_the_end():
            held = self._look(self.course.held, shown=state.step == 0)
            value = _value(held, self.training) if held else None
            if value is not None and (state.least is None or value < state.least):
                state.least, state.best, state.stale = value, state.step, 0
                if team.first:
                    self.trained.save(self.folder / BEST, {"step": state.step}, VALUES)
            elif value is not None and self._is_settled(state.step):
                state.stale += 1
        if held:
            state.curve.append({"step": state.step, "held": row_document(held)})
        if team.first and len(self.trained.begun) == len(self.trained.some):
            self.trained.save(self.folder / STATE, {"key": self.key, **asdict(state)})
        team.meet()

    def _is_settled(self, step: int) -> bool:
        """Whether nothing but values changes any more."""
        kept, last = self.training.kept_rows, self.trained.rows is None
        few = self.training.top_k_at(step, self.of, self.chosen.of_config) == self.top_k
        return few and (last or share_at(step, self.of, kept) == kept)

    def _left(self) -> _State:
        """Where a run was stopped; its beginning where none was."""
        if not is_plain(self.folder / STATE):
            return _State()
        found = self.trained.load(self.folder / STATE)
        state = _State(**{name: found[name] for name in asdict(_State())})
        self.trained.steps = state.step
        self.tell(f"recover: going on after step {state.step} of {self.of}, as a stopped run has left it")
        return state

    def _check_touched(self) -> None:
        """Raise InputError where no gradient reaches anything that trains; say it of some."""
        names = [one.name for one in self.trained.some if one.name not in self.trained.touched]
        if len(names) == len(self.trained.some):
            what = f"no gradient reaches {names[0]}: it decides which experts are chosen, and how much of each does not"
            raise InputError(f"--train {','.join(self.training.train)}: {what} depend on it")
        if names:
            self.tell(
                f"recover: no gradient reaches {len(names)} of the parameters, as {names[0]}: they stay as they are"
            )


def _check_left(folder: Path, key: Mapping[str, Any], *, restart: bool) -> None:
    """Raise InputError where a run of another kind was stopped; with `restart` what it left is removed."""
    if restart:
        for name in (STATE, BEST):
            (folder / name).unlink(missing_ok=True)
    if is_plain(folder / STATE):
        check_same_run(folder, Trained.said_in(folder / STATE).get("key"), key)


def _key(
    student: Checkpoint,
    original: Checkpoint | None,
    course: Course,
    data: TokenData,
    training: Training,
    compute: Compute,
) -> dict[str, Any]:
    """All that decides the bits, in words for people."""
    text = replace(data, batches=tuple(sample.batch for sample in course.samples))
    return {
        "model": student.fingerprint,
        "config.json": student.config_sha256,
        "original": None if original is None else [original.fingerprint, original.config_sha256],
        "text": text_key(text),
        "training": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(training).items()},
        "--dtype": compute.dtype_name,
        "--device": compute.place.type,
        "threads": torch.get_num_threads(),
        "processes": compute.team.size,
        "versions": versions(),
    }


def _value(losses: Losses, training: Training) -> float:
    """What training makes smaller, on some text: a mean over domains."""
    parts = mean_of(losses, "kl"), mean_of(losses, "nll")
    return sum(weight * part for weight, part in zip((training.kl, training.next), parts, strict=True) if weight)


def _size_notes(size: Mapping[str, int]) -> list[str]:
    """What experts take as factors, for people."""
    if not size:
        return []
    share = size["bytes"] / size["of_bytes"]
    shares = f"{sized(size['bytes'])} in the place of {sized(size['of_bytes'])} ({share:.1%})"
    told = f"experts as factors: {shares}, with {size['rows']} of {size['of_rows']} rows beside the products"
    return [
        f"{told}; no engine runs them so, and in a checkpoint they take what they took",
        "losses before are of whole experts on text that decided nothing, of untrained factors on text that chose",
    ]

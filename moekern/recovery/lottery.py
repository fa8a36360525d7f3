"""MoE lottery subnetworks: experts go in rounds, with training between them (MC-Suite, arXiv:2504.05586).

Each round scores the experts that are left on the model as it is now, drops some, and trains what stays on text of its
own, with the optimiser begun anew. The paper trains by the loss of the next token on C4: AdamW, cosine, a peak rate of
1e-6, batches of 8, tokens doubling from 0.2 M. It does not say which weights train, how long sequences are, and in how
many rounds about 1 M tokens come together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moekern.architectures import find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError, check_type
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.held_out import held_back
from moekern.evaluation.losses import ORIGINAL, row_document, row_of
from moekern.files import is_folder, is_plain
from moekern.iteration.rounds import Method, iterate, needs_text, schedule
from moekern.model.compute import Compute
from moekern.model.journal import check_same_run
from moekern.model.kept import read_kept, write_kept
from moekern.model.position import text_key
from moekern.model.precision import settled
from moekern.pruning.prune import prune
from moekern.pruning.replaced import write_replaced
from moekern.recovery.loaded import trainable
from moekern.recovery.recover import TRAINED, Losses, recover
from moekern.recovery.settings import Training
from moekern.recovery.taught import Progress
from moekern.router import kept_count
from moekern.team import ALONE

PAPER = Training(train=("all",), kl=0.0, next=1.0, rate=1e-6)  # arXiv:2504.05586; all weights: inferred
PRUNED, TRAINING, TRAINED_MODEL, DONE = "pruned", "training", "trained", "done.json"  # in a round's folder
KEY = "lottery.json"  # what is run, in the folder of all
PAPER_TOKENS, PAPER_SEQUENCES = 200_000, 8  # of the first round; of a step


@dataclass(frozen=True)
class Lottery:
    """How a model is cut and trained. tokens: of the first round; of each later one as many, or twice as many as of the
    one before (`doubling`)."""

    keep: float | int
    rounds: int = 4
    criterion: str = "gated_square"
    tokens: int = PAPER_TOKENS
    doubling: bool = False
    training: Training = Training()
    seed: int = 0

    def tokens_of(self, number: int) -> int:
        """Of a round, counted from 1."""
        return self.tokens * (2 ** (number - 1) if self.doubling else 1)

    @property
    def total(self) -> int:
        return sum(self.tokens_of(number) for number in range(1, self.rounds + 1))


@dataclass(frozen=True)
class Round:
    """What a round came to: experts left in each layer, tokens that steps were taken on, losses on text that decided
    nothing, as it was dropped and as it was trained."""

    experts: int
    tokens: int
    dropped: Losses
    trained: Losses


@dataclass(frozen=True)
class Drawn:
    """original: its losses on the same text. control: one cut, and the same tokens of training; None: not made."""

    out: Path
    original: Losses
    rounds: tuple[Round, ...]
    control: Round | None
    notes: tuple[str, ...]


def lottery(
    source: str | Path | Checkpoint,
    data: TokenData,
    method: Lottery,
    out: Path,
    folder: Path,
    compute: Compute = Compute(),
    *,
    judged: TokenData | None = None,
    control: bool = True,
    keep_rounds: bool = False,
    restart: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Drawn:
    """Cut a model in rounds with training between them, and write the last round's to the new folder `out`.

    A tenth of the text, unless `judged` is given, is judged by, and trains nothing. What is not done lies in `folder`:
    the round at work, and the checkpoint of the one before it (with `keep_rounds` of all); the same call goes on there.
    With `control` the model is also cut once and trained on all of the text, and only its losses are kept. Raises
    InputError for what the stages refuse.
    """
    check_type("method", method, Lottery)
    method.training.check()
    if method.training.top_k is not None:
        raise InputError(
            "lottery: rounds leave fewer experts; that a token chooses fewer is trained by recover (--top-k)"
        )
    if method.training.factored:
        raise InputError("lottery: --train factors: rounds score whole experts; factor what they leave, by recover")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout = find_layout(checkpoint)
    kept = kept_count(method.keep, layout.router)
    counts = schedule(layout.num_experts, kept, method.rounds, layout.n_group)
    needs_text(method.criterion)
    whole, judged = held_back(data) if judged is None else (data, judged)
    if not judged.batches:
        raise InputError("lottery: too little text to hold some back to judge by; give more (--tokens)", kind="data")
    alone = replace(settled(compute, checkpoint, layout), team=ALONE)
    with trainable(checkpoint, alone, method.training):  # what cannot be is found before anything is measured
        pass
    if restart and is_folder(folder):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _check_key(folder, {"model": checkpoint.fingerprint, "text": text_key(data), "method": asdict(method)})
    run = _Run(checkpoint, whole, judged, method, folder, compute, tell, progress)
    rounds = run.rounds(counts, keep_rounds=keep_rounds)
    once = run.cut("control", checkpoint, kept, whole, method.total) if control else None
    original = evaluate(checkpoint, judged, {}, compute)[ORIGINAL]
    run.write(f"round-{method.rounds}", out)
    there = sum(whole.tokens.values())
    notes = (
        [] if method.total <= there else [f"{method.total} tokens are asked for and {there} are there: text repeats"]
    )
    return Drawn(out, original, tuple(rounds), once, tuple(notes))


@dataclass(frozen=True)
class _Run:
    """What all cuts share. Each has a folder of its own: the pruned checkpoint, what trains of it, the trained
    checkpoint, and what it came to, which is there when it is done."""

    checkpoint: Checkpoint
    data: TokenData
    judged: TokenData
    method: Lottery
    folder: Path
    compute: Compute
    tell: Callable[[str], None]
    progress: Progress

    def rounds(self, counts: Sequence[int], *, keep_rounds: bool) -> list[Round]:
        """All rounds, from the first that is not done. Each but the last leaves its checkpoint for the next."""
        current, found, total = self.checkpoint, list[Round](), self.method.total
        for number, count in enumerate(counts, start=1):
            name, before = f"round-{number}", f"round-{number - 1}"
            past, tokens = sum(map(self.method.tokens_of, range(1, number))), self.method.tokens_of(number)
            text = _portion(self.data, past / total, (past + tokens) / total)
            found.append(self.cut(name, current, count, text, tokens))
            trained = self.folder / name / TRAINED_MODEL
            if number < len(counts) and not is_plain(self.folder / f"round-{number + 1}" / DONE):
                if not is_folder(trained):
                    self.write(name, trained)
                current = open_checkpoint(trained)
            for part in (PRUNED, TRAINING, *(() if keep_rounds else (TRAINED_MODEL,))) if number > 1 else ():
                shutil.rmtree(self.folder / before / part, ignore_errors=True)
        return found

    def cut(self, name: str, current: Checkpoint, count: int, text: TokenData, tokens: int) -> Round:
        """Score, drop and train; what an earlier run has left of that is taken over."""
        place = self.folder / name
        place.mkdir(exist_ok=True)
        if found := read_kept(place / DONE):
            return Round(count, found["tokens"], row_of(found["dropped"]), row_of(found["trained"]))
        pruned = place / PRUNED
        if not is_folder(pruned):
            way = Method(self.method.criterion, count, reestimate=False, seed=self.method.seed)
            step = lambda done, total: self.progress("measuring", done, total)  # noqa: E731
            plan = iterate(current, self.data if needs_text(way.criterion) else None, way, self.compute, progress=step)
            prune(current, plan, pruned)
        training = replace(self.method.training, epochs=tokens / max(1, _trained(text)))
        original = self.checkpoint if training.kl else None
        made = recover(
            pruned, original, text, place / TRAINING, training, self.compute,
            judged=self.judged, tell=self.tell, progress=self.progress,
        )  # fmt: skip
        dropped, trained = made.judged
        taken = sum(each.get("tokens", 0) for each in made.curve)
        said = {
            "tokens": taken,
            "dropped": row_document(dropped),
            "trained": row_document(trained),
            "record": dict(made.record),
        }
        write_kept(place / DONE, said)
        return Round(count, taken, dropped, trained)

    def write(self, name: str, out: Path) -> None:
        """The checkpoint that a round has trained, with what it was trained by."""
        place = self.folder / name
        record = {**read_kept(place / DONE)["record"], "lottery": asdict(self.method), "of_round": name}
        write_replaced(place / PRUNED, out, place / TRAINING / TRAINED, record)


def _check_key(folder: Path, key: Mapping[str, Any]) -> None:
    """Raise InputError where a run of another kind was stopped."""
    if left := read_kept(folder / KEY):
        check_same_run(folder, left, key)
    else:
        write_kept(folder / KEY, json.loads(json.dumps(key)))


def _trained(text: TokenData) -> int:
    """Tokens of a text that train, when some are held back to choose the best state."""
    return sum(held_back(text)[0].tokens.values())


def _portion(data: TokenData, start: float, stop: float) -> TokenData:
    """The sequences of each domain from a share of them to another one, at least one."""
    batches = list[Batch]()
    for domain in data.tokens:
        rows = [row for batch in data.batches if batch.domain == domain for row in batch.each()]
        first = min(int(start * len(rows)), len(rows) - 1)
        batches += rows[first : max(first + 1, round(stop * len(rows)))]
    return replace(data, batches=tuple(batches), recipe={**data.recipe, "portion": [start, stop]})

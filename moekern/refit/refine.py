"""Gradient steps within one layer, one expert at a time, towards what the layer should put out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moekern.errors import InputError, check_type
from moekern.refit.rows import Room, RowStore, check_rows
from moekern.refit.units import ROWS, square
from moekern.team import ALONE, Team


class Trainable(Protocol):
    """One expert, in float32."""

    parameters: Sequence[Tensor]  # leaves that require a gradient

    def forward(self, rows: Tensor, gates: Tensor) -> Tensor:
        """What the expert adds to the layer's output for rows [len, H] with gates [len]: float32 [len, H]."""
        ...


class TrainableExperts(Protocol):
    """The experts of a layer on this process's N tokens; the router's choice and gates do not change."""

    count: int
    hidden: int  # H, of what they put out

    def tokens(self, expert: int) -> Tensor:
        """The tokens that chose the expert, int64 [n_e], rising."""
        ...

    def inputs(self, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the expert is given for some of its tokens: rows [len, H] and gates [len], float32."""
        ...

    def trainable(self, expert: int) -> Trainable:
        """The expert with the numbers that are stored, exactly."""
        ...

    def store(self, expert: int, trained: Trainable) -> None:
        """Write its parameters to the model, rounded to the model's type, and set them to what was stored. Parameters
        that hold what was stored before must be stored with the same bits."""
        ...


@dataclass(frozen=True)
class Refine:
    """How experts are trained: Adam, whose rate rises for `warmup` steps and then falls linearly to `last` of itself.

    Raises InputError for numbers that cannot be.
    """

    rate: float = 3e-3  # of a tensor whose root mean square is USUAL, and for others in proportion to theirs
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 5  # steps
    last: float = 0.05
    batch: int = 1024  # tokens
    epochs: int = 3
    sweeps: int = 2
    later: float = 0.5  # the rate of each sweep after the first is this share of that of the one before
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "sweeps"):
            check_type(name, getattr(self, name), int)
            if getattr(self, name) < 1:
                raise InputError(f"--refine: {name} {getattr(self, name)}: expected 1 or more")
        if not 0 < self.rate < float("inf"):
            raise InputError(f"--refine: rate {self.rate}: expected a number above 0")


@dataclass(frozen=True)
class Refined:
    """What has become of a layer: squared errors, summed over rows and dimensions in float64, before and after."""

    fitted: tuple[float, float]
    held: tuple[float, float]
    improved: int  # times that an expert was stored
    put_back: int  # times that an expert was left as it was since its error did not fall
    alone: tuple[int, ...]  # experts without rows to fit or to judge by
    passes: float  # forwards of all routed rows, a backward pass counted by its products


USUAL = 0.08  # root mean square of a tensor of weights for which the published rate was measured (1 / sqrt(H), H = 128)
BACKWARD = 4 / 3  # products of a backward pass over those of the forward pass: nothing flows on to what is below


@dataclass
class _Layer:
    """What is the same for all experts."""

    experts: TrainableExperts
    residual: RowStore  # [N, H]
    held: Tensor
    judge: bool  # the rows by which an expert is judged: those that are held back, or (False) those that are not
    options: Refine
    room: Room
    name: str
    passed: float = 0.0  # rows that went forward


def refine_experts(
    experts: TrainableExperts,
    residual: RowStore | Tensor,
    held: Tensor,
    options: Refine = Refine(),  # noqa: B008
    *,
    name: str = "",
    team: Team = ALONE,
    memory: int | None = None,
    folder: Path | None = None,
    step: Callable[[], None] = lambda: None,
) -> Refined:
    """Train each expert alone against what the layer lacks, `residual` float32 [N, H], and its own output.

    The residual is brought up to date with the weights that are stored, rounded. An expert is stored when the squared
    error of its rows that are held back (`held` bool [N]; without any in the layer, of its rows) is lower with its
    rounded weights, and else stays bit for bit (steps that are large for few rows overshoot in those that are fitted,
    whose error may rise meanwhile); the epoch that is best by that error is taken, and the first that is
    worse than the one before is the last. Batches are drawn with a seed of `name`, expert and sweep. `memory` bytes may
    be taken for an expert's targets, beyond which they go to a file in `folder`. `step` is called behind each expert.
    Raises InputError for several processes, a residual that is not finite, and where there is no room.
    """
    check_alone(team)
    store = residual if isinstance(residual, RowStore) else RowStore.of(residual)
    check_rows(store, held, experts.hidden)
    layer = _Layer(experts, store, held, bool(held.any()), options, Room(memory, folder), name)
    before = _squares(store, held)
    if not all(value < float("inf") for value in before):
        raise InputError("what a layer should put out, less what it does, holds NaN or infinities", "checkpoint")
    outcomes = []
    for sweep in range(options.sweeps):
        for expert in range(experts.count):
            outcomes.append((expert, _refined(layer, expert, sweep)))
            step()
    after = _squares(store, held)
    better = [outcome for _, outcome in outcomes if outcome is not None]
    routed = sum(len(experts.tokens(expert)) for expert in range(experts.count))
    return Refined(
        fitted=(before[0], after[0]),
        held=(before[1], after[1]),
        improved=sum(better),
        put_back=len(better) - sum(better),
        alone=tuple(sorted({expert for expert, outcome in outcomes if outcome is None})),
        passes=layer.passed / max(1, routed),
    )


def check_alone(team: Team) -> None:
    """Raise InputError for several processes."""
    if team.size > 1:
        raise InputError("--refine: experts are trained by one process; run it without torchrun")


def _refined(layer: _Layer, expert: int, sweep: int) -> bool | None:
    """Whether training made one expert better; None where it has no rows to fit, or none to judge by."""
    tokens = layer.experts.tokens(expert).cpu()
    back = layer.held[tokens]
    fitted, judged = (~back).nonzero().flatten(), (back == layer.judge).nonzero().flatten()
    if not len(fitted) or not len(judged):
        return None
    with layer.room.store(len(tokens), layer.experts.hidden) as targets:
        one = _One(layer, expert, tokens, layer.experts.trainable(expert), targets)
        found = one.weights()
        for part in torch.arange(len(tokens)).split(ROWS):
            lacks = layer.residual.gather(tokens[part])
            targets.scatter(part, lacks + one.output(part).to(lacks.device))
        before = float(sum(square(layer.residual.gather(part)) for part in tokens[judged].split(ROWS)))
        scale = float(sum(square(layer.residual.gather(part)) for part in tokens[fitted].split(ROWS))) / len(fitted)
        if scale and _trained(one, sweep, fitted, judged, scale):
            layer.experts.store(expert, one.trained)
            if one.differs(found) and one.error(judged) < before:
                for part in torch.arange(len(tokens)).split(ROWS):
                    layer.residual.scatter(tokens[part], one.lacks(part))
                return True
        one.set(found)
        layer.experts.store(expert, one.trained)
        return False


@dataclass
class _One:
    """One expert in training. Rows are numbers among its tokens."""

    layer: _Layer
    expert: int
    tokens: Tensor
    trained: Trainable
    targets: RowStore  # [n_e, H]: what the expert should put out

    def output(self, rows: Tensor) -> Tensor:
        """Without autograd."""
        with torch.no_grad():
            return self.forward(rows)

    def forward(self, rows: Tensor) -> Tensor:
        self.layer.passed += len(rows)
        return self.trained.forward(*self.layer.experts.inputs(self.expert, self.tokens[rows]))

    def lacks(self, rows: Tensor) -> Tensor:
        """What the layer lacks in these rows with the expert as it is now."""
        out = self.output(rows)
        return self.targets.gather(rows).to(out) - out

    def error(self, rows: Tensor) -> float:
        """The squared error of the layer in these rows."""
        return float(sum(square(self.lacks(part)) for part in rows.split(ROWS)))

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.trained.parameters]

    def differs(self, weights: Sequence[Tensor]) -> bool:
        return not all(torch.equal(a, b) for a, b in zip(self.trained.parameters, weights, strict=True))

    def set(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.trained.parameters, weights, strict=True):
                parameter.copy_(value)


def _trained(one: _One, sweep: int, fitted: Tensor, judged: Tensor, scale: float) -> bool:
    """Train on the fitted rows, and take the epoch that is best on the judged ones; False where none is finite."""
    options = one.layer.options
    batches = -(-len(fitted) // options.batch)
    drawn = torch.Generator().manual_seed(_seed(options.seed, one.layer.name, one.expert, sweep))
    peaks = [options.rate * options.later**sweep * _size(parameter) for parameter in one.trained.parameters]
    adam = torch.optim.Adam([{"params": [parameter]} for parameter in one.trained.parameters], betas=options.betas)
    best, last, taken = float("inf"), float("inf"), list[Tensor]()
    for epoch in range(options.epochs):
        order = fitted[torch.randperm(len(fitted), generator=drawn)]
        for number, rows in enumerate(order.tensor_split(batches)):
            step = epoch * batches + number
            for group, peak in zip(adam.param_groups, peaks, strict=True):
                group["lr"] = peak * _share(options, step, options.epochs * batches)
            out = one.forward(rows)
            loss = (one.targets.gather(rows).to(out) - out).square().sum() / (len(rows) * scale)
            adam.zero_grad()
            loss.backward()
            one.layer.passed += BACKWARD * len(rows)
            adam.step()
        error = one.error(judged)
        if error < best:
            best, taken = error, one.weights()
        if not error <= last:
            break
        last = error
    if taken:
        one.set(taken)
    return bool(taken)


def _size(weights: Tensor) -> float:
    """The root mean square of weights over the usual one; 1 where all are zero."""
    return math.sqrt(float(weights.detach().double().square().mean())) / USUAL or 1.0


def _share(options: Refine, step: int, steps: int) -> float:
    """Of the peak rate at a step."""
    falling = 1 - (1 - options.last) * step / max(1, steps - 1)
    return min(1.0, (step + 1) / max(1, options.warmup)) * falling


def _seed(*named: object) -> int:
    digest = hashlib.sha256("\0".join(map(str, named)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _squares(residual: RowStore, held: Tensor) -> tuple[float, float]:
    """Of fitted and of held-back rows."""
    sides = (~held, held)
    fitted, back = (
        float(sum(square(residual.gather(part)) for part in side.nonzero().flatten().split(ROWS))) for side in sides
    )
    return fitted, back

"""The down projections of a layer's experts, fitted to what the layer should put out: ridge regression, expert by
expert (Gauss-Seidel)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moekern import kernels
from moekern.errors import InputError, check_type
from moekern.model.compute import few_tokens
from moekern.refit.rows import Room, RowStore, check_rows
from moekern.refit.units import ROWS, Features, Unit, Units, one_group
from moekern.team import ALONE, Team


class Experts(Protocol):
    """The experts of a layer on this process's N tokens. Their features phi do not depend on their down projections.

    What they put out together is the sum over experts of W_e phi_e.
    """

    count: int  # n
    width: int  # m, channels of an expert
    hidden: int  # H

    def tokens(self, expert: int) -> Tensor:
        """The tokens that chose the expert, int64 [n_e], rising."""
        ...

    def features(self, expert: int, tokens: Tensor) -> Tensor:
        """Gate x inner activation of the expert for some of its tokens, float32 [len(tokens), m]."""
        ...

    def down(self, expert: int) -> Tensor:
        """The expert's down projection as it is now, float32 [H, m]."""
        ...

    def set_down(self, expert: int, weight: Tensor) -> Tensor:
        """Store float32 [H, m], rounded to the model's type; what is stored now, float32 [H, m]. Of what it has
        returned before it must store the same bits again."""
        ...


@dataclass(frozen=True)
class Ridge:
    """How a layer is refitted. `factors`: candidates for lambda over the mean diagonal of the experts' Gram matrices.

    Raises InputError for factors that are not above 0 and for less than one sweep.
    """

    factors: tuple[float, ...] = (0.1, 0.3, 1.0)
    sweeps: int = 3

    def __post_init__(self) -> None:
        check_type("factors", self.factors, tuple)
        check_type("sweeps", self.sweeps, int)
        if not self.factors or not all(0 < factor < float("inf") for factor in self.factors):
            raise InputError(f"--ridge {self.factors}: expected one or several numbers above 0")
        if self.sweeps < 1:
            raise InputError(f"--sweeps {self.sweeps}: expected 1 or more")

    @property
    def middle(self) -> float:
        """The candidate that is taken where nothing is held back."""
        return sorted(self.factors)[len(self.factors) // 2]


@dataclass(frozen=True)
class Change:
    """Squared errors, summed over rows (tokens) and dimensions in float64, before and after."""

    rows: int
    before: float
    after: float


@dataclass(frozen=True)
class Refit:
    """What has become of a layer. `after` is `before` where it is kept as it was."""

    ridge: float  # the factor that was chosen
    weight: float  # lambda: the factor x the mean diagonal
    fitted: Change
    held: Change
    kept_as_it_was: bool
    alone: tuple[int, ...]  # experts that were left alone
    raced: tuple[tuple[float, float], ...]  # factors and the error on held-back rows after the first sweep
    passes: float  # times that the features of this process's rows were computed
    notes: tuple[str, ...]


@dataclass
class _Trial:
    """One candidate at work."""

    factor: float
    weight: float
    residual: RowStore  # [N, H]
    down: RowStore | None = None  # [n x H, m], its weights while others are in the model


@dataclass
class _Layer:
    """What all candidates share."""

    experts: Experts
    features: Features
    units: Units
    held: Tensor
    first: RowStore  # [n x H, m], the weights that were found
    grams: dict[int, Tensor] | None  # [m, m] float64 by expert, at rank 0; None: there is no room for all
    step: Callable[[], None]
    backend: str | None  # of the kernels
    alone: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def each(self) -> Iterator[int]:
        """The experts, of which each is told when it is done."""
        for expert in range(self.experts.count):
            yield expert
            self.step()

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def refit_down(
    experts: Experts,
    residual: RowStore | Tensor,
    held: Tensor,
    options: Ridge = Ridge(),  # noqa: B008
    *,
    units: Sequence[Unit] | None = None,
    team: Team = ALONE,
    memory: int | None = None,
    folder: Path | None = None,
    backend: str | None = None,
    step: Callable[[], None] = lambda: None,
) -> Refit:
    """Minimise sum over tokens of ||T - sum_e W_e phi_e||^2 + lambda sum_e ||W_e - W0_e||^2, expert by expert.

    `residual` float32 [N, H] is T less what the layer puts out; it is brought up to date with the weights that are
    stored, rounded. `held` bool [N]: rows that are not fitted; the error there chooses the factor and decides whether
    the weights stay or are put back bit for bit (without such rows the error on all decides, and the middle factor is
    taken). lambda is the factor x the mean, over experts that have fitted rows, of the mean diagonal of their Gram
    matrices. Products are those of `kernels.expert_gram` and `scatter_residual` (by `backend`, None: the device's
    first), solved in float64.

    `memory` bytes may be taken for copies of the residual and of the weights, Gram matrices and features; what has no
    room goes to a file in `folder`, or is computed anew. It changes no bit, nor does the number of processes of
    `team`, of which each has tokens, and so rows of `residual` and `held`, of its own. `step` is called when an expert
    has been gone through, once to find lambda and once a sweep. Raises InputError for a residual that is not finite and
    where there is no room.
    """
    store = residual if isinstance(residual, RowStore) else RowStore.of(residual)
    check_rows(store, held, experts.hidden)
    parts = Units(units, len(store), team)
    before = _errors(store, held, parts)
    if not torch.isfinite(before).all():
        raise InputError("what a layer should put out, less what it does, holds NaN or infinities", "checkpoint")
    factors = options.factors if before[3] else (options.middle,)
    with ExitStack() as stack:
        room = Room(memory, folder)
        copies = [stack.enter_context(room.copy(store)) for _ in factors]
        shape = (experts.count * experts.hidden, experts.width)
        first = stack.enter_context(room.store(*shape))
        downs = [stack.enter_context(room.store(*shape)) if len(factors) > 1 else None for _ in factors]
        kept = team.broadcast(room.take(8 * experts.count * experts.width**2) if team.first else False)
        grams: dict[int, Tensor] | None = {} if kept else None
        features = Features(experts, parts, held, room)
        layer = _Layer(experts, features, parts, held, first, grams, step, backend)
        for expert in range(experts.count):
            first[_rows(experts, expert)] = experts.down(expert)
        for down in downs:
            down.copy_from(first) if down is not None else None
        mean = _mean_diagonal(layer)
        trials = [_Trial(f, f * mean, r, down) for f, r, down in zip(factors, copies, downs, strict=True)]
        best, raced = _race(layer, trials)
        for _ in range(options.sweeps - 1):
            _sweep(layer, [best])
        after = _errors(best.residual, held, parts)
        judged = 1 if before[3] else 0
        better = bool(after[judged] < before[judged])
        if better:
            store.copy_from(best.residual)
        else:
            what = "held-back rows" if before[3] else "fitted rows"
            layer.notes.append(f"the squared error on {what} went from {before[judged]:.6g} to {after[judged]:.6g}")
            for expert in range(experts.count):
                experts.set_down(expert, first[_rows(experts, expert)])
            after = before
        fitted, back = (Change(int(before[2 + i]), float(before[i]), float(after[i])) for i in (0, 1))
        return Refit(
            ridge=best.factor,
            weight=best.weight,
            fitted=fitted,
            held=back,
            kept_as_it_was=not better,
            alone=tuple(sorted(layer.alone)),
            raced=raced,
            passes=layer.features.passes,
            notes=tuple(layer.notes),
        )


def _race(layer: _Layer, trials: Sequence[_Trial]) -> tuple[_Trial, tuple[tuple[float, float], ...]]:
    """One sweep of all candidates, and the one with the least error on held-back rows, whose weights are in the model
    from here on; of equal ones the first."""
    _sweep(layer, trials)
    if len(trials) == 1:
        return trials[0], ()
    found = [float(_errors(trial.residual, layer.held, layer.units)[1]) for trial in trials]
    best = min(range(len(trials)), key=lambda place: (found[place] != found[place], found[place]))
    down = trials[best].down
    assert down is not None
    for expert in range(layer.experts.count):
        layer.experts.set_down(expert, down[_rows(layer.experts, expert)])
    trials[best].down = None
    return trials[best], tuple((trial.factor, error) for trial, error in zip(trials, found, strict=True))


def _sweep(layer: _Layer, trials: Sequence[_Trial]) -> None:
    """Solve for every expert once, in the order of their numbers."""
    experts, team = layer.experts, layer.units.team
    for expert in layer.each():
        if expert in layer.alone:
            continue
        rows = _rows(experts, expert)
        now = [(experts.down(expert) if t.down is None else t.down[rows]).clone() for t in trials]
        steps, why = team.broadcast(_steps(layer, expert, trials, now))
        if why:
            layer.note(f"expert {expert}: {why}")
        if not steps:
            layer.alone.add(expert)
            continue
        changes = []
        for trial, weight, step in zip(trials, now, steps, strict=True):
            stored = _stored(layer, expert, weight, step)
            if trial.down is not None:
                trial.down[rows] = stored
            changes.append(stored - weight)
        _bring_up_to_date(layer, expert, trials, changes)


def _steps(layer: _Layer, expert: int, trials: Sequence[_Trial], now: Sequence[Tensor]) -> tuple[list[Tensor], str]:
    """At rank 0 what each candidate's weights [H, m] change by, float32, and what is to be said of it; no steps where
    there is nothing to solve."""
    residuals = [trial.residual for trial in trials]
    sums = layer.units.summed(partial(_sums, layer, expert, residuals=residuals, gram=layer.grams is None))
    if sums is None:
        return [], ""
    gram, moments = (sums[0], sums[1:]) if layer.grams is None else (layer.grams[expert].to(sums[0].device), sums)
    first = layer.first[_rows(layer.experts, expert)]
    steps, said = [], ""
    for trial, weight, moment in zip(trials, now, moments, strict=True):
        drift = (weight - first).to(moment)
        step, exact = solved(gram, moment.T, drift, trial.weight)
        if step is None:
            return [], "its Gram matrix or its errors are not finite in float32; it is left as it was"
        said = (
            said if exact else "its Gram matrix is not positive definite; directions that float32 rounds away are left"
        )
        steps.append(step.to(weight))
    return steps, said


def _sums(layer: _Layer, expert: int, place: int, *, residuals: Sequence[RowStore], gram: bool) -> list[Tensor] | None:
    """Of the fitted rows of an expert in the unit at a place, float64: A'A [m, m], if it is wanted, and A'R [m, H] for
    each residual; None where there are no such rows."""
    wanted: list[RowStore | None] = [*([None] if gram else []), *residuals]  # None: A'A
    sums: list[kernels.GramSums] = []
    m, H = layer.experts.width, layer.experts.hidden
    for chunk, features in layer.features.fitted(expert, place):
        if not sums:
            sums = [kernels.gram_sums(1, m, 0 if r is None else H, features.device, gram=r is None) for r in wanted]
        for each, residual in zip(sums, wanted, strict=True):
            rows, tokens = (None, None) if residual is None else residual.beside(features, chunk.tokens)
            kernels.expert_gram(features, rows, one_group(features), None, each, tokens=tokens, backend=layer.backend)
    return [(each.gram if r is None else each.product)[0] for each, r in zip(sums, wanted, strict=False)] or None


def solved(gram: Tensor, moment: Tensor, drift: Tensor, weight: float) -> tuple[Tensor | None, bool]:
    """The step X [H, m] float64 with X (gram + weight I) = moment - weight x drift, and whether Cholesky found it; None
    for numbers that are not finite.

    gram [m, m], moment [H, m] and drift [H, m] are float64. Where rounding has left a gram that is not positive
    definite, the step lies in the eigenvectors whose eigenvalue is above the rounding of float32. One thread factors a
    matrix, which several do with other bits.
    """
    system = gram + weight * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    right = (moment - weight * drift).T
    if not (torch.isfinite(system).all() and torch.isfinite(right).all()):
        return None, False
    with few_tokens(0, gram.device):
        factor, failed = torch.linalg.cholesky_ex(system)
    if not failed:
        return torch.cholesky_solve(right, factor).T, True
    with few_tokens(0, gram.device):
        values, vectors = torch.linalg.eigh(system)
    least = float(values[-1]) * len(gram) * torch.finfo(torch.float32).eps
    inverse = torch.where(values > least, 1 / values, 0)
    return (vectors @ (inverse[:, None] * (vectors.T @ right))).T, False


def _stored(layer: _Layer, expert: int, weight: Tensor, step: Tensor) -> Tensor:
    """What the model has of the weights after a step; those before where its type cannot hold them."""
    stored = layer.experts.set_down(expert, weight + step)
    if torch.isfinite(stored).all():
        return stored
    layer.note(f"expert {expert}: refitted weights leave the range of the model's type; it is left as it was")
    return layer.experts.set_down(expert, weight)


def _bring_up_to_date(layer: _Layer, expert: int, trials: Sequence[_Trial], changes: Sequence[Tensor]) -> None:
    """Take the change of an expert's output out of the residuals."""
    moved = [(t, change.T.contiguous()) for t, change in zip(trials, changes, strict=True) if change.any()]
    for chunk, features in layer.features.all(expert) if moved else ():
        for trial, change in moved:
            rows, tokens = trial.residual.beside(features, chunk.tokens)
            kernels.scatter_residual(
                rows, features, change.to(features), tokens, one_group(features), backend=layer.backend
            )
            if rows is not trial.residual.tensor:
                trial.residual.scatter(chunk.tokens, rows)


def _mean_diagonal(layer: _Layer) -> float:
    """The mean, over experts with fitted rows, of the mean diagonal of their Gram matrices; which of them are to be
    left alone; and, where they are kept, the matrices."""
    means = []
    for expert in layer.each():
        sums = layer.units.summed(partial(_sums, layer, expert, residuals=[], gram=True))
        if sums is not None and layer.grams is not None:
            layer.grams[expert] = sums[0].cpu()
        mean = layer.units.team.broadcast(None if sums is None else float(sums[0].diagonal().mean()))
        if mean is None or mean == 0:
            layer.alone.add(expert)
        elif not mean < float("inf"):
            layer.alone.add(expert)
            layer.note(f"expert {expert}: its inner activations are not finite; it is left as it was")
        if mean is not None and mean < float("inf"):
            means.append(mean)
    return sum(means) / max(1, len(means))


def _errors(residual: RowStore, held: Tensor, units: Units) -> Tensor:
    """Of fitted and of held-back rows the sum of squares, then the number of rows; float64 [4], over all processes."""

    def of_unit(place: int) -> list[Tensor]:
        total = torch.zeros(4, dtype=torch.float64)
        for start in range(units.own[place].start, units.own[place].stop, ROWS):
            rows = slice(start, min(start + ROWS, units.own[place].stop))
            squares, back = residual[rows].double().square().sum(1).cpu(), held[rows]
            for side, among in enumerate((~back, back)):
                total[side] += squares[among].sum()
                total[2 + side] += among.sum()
        return [total]

    sums = units.summed(of_unit)
    return units.team.broadcast(torch.zeros(4, dtype=torch.float64) if sums is None else sums[0])


def _rows(experts: Experts, expert: int) -> slice:
    """Where an expert's weights lie in a store of those of all."""
    return slice(expert * experts.hidden, (expert + 1) * experts.hidden)

"""G, the gradients of a layer's experts: added up in one order by any number of processes, and what is held of it.

Chunks of a segment add up in order, and segments of a domain in order; the domains make the joint G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moekern.data.batches import Segment, TokenData, dealt
from moekern.errors import InputError
from moekern.model.experts import experts_of
from moekern.model.paged import paged_zeros
from moekern.statistics.folding import folded
from moekern.team import Team

COLUMNS = 1 << 22  # numbers of all experts' G that are looked at together
PIECE = 1 << 20  # numbers of one expert's G that are
SENT = 1 << 24  # numbers of G that are sent to the first process at a time


@dataclass(frozen=True)
class Shares:
    """The segments of the text in their order, and which of several processes has each; the first adds them up."""

    team: Team
    segments: Sequence[tuple[Segment, int]]

    @classmethod
    def of(cls, data: TokenData, team: Team) -> Shares:
        """Of text in chunks."""
        return cls.of_units(data.units(), team)

    @classmethod
    def of_units(cls, units: Sequence[Segment], team: Team) -> Shares:
        """Of some segments of such text."""
        return cls(team, list(zip(units, dealt([unit.tokens for unit in units], team.size), strict=True)))

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(unit.domain for unit, _ in self.segments))

    def within(self, domain: str) -> Shares:
        """Of one domain."""
        return Shares(self.team, [(unit, owner) for unit, owner in self.segments if unit.domain == domain])

    def own(self) -> list[int]:
        """Numbers of this process's chunks."""
        return [chunk for unit, owner in self.segments if owner == self.team.rank for chunk in unit.chunks]


@dataclass(frozen=True)
class Totals:
    """Gradients [experts, rows, columns] float32, one tensor for each of some `Matrix`: of the segment at work, and, in
    the first of several processes, of its domain so far."""

    segment: list[Tensor]
    domain: list[Tensor]

    def of(self, experts: slice) -> Totals:
        return Totals([each[experts] for each in self.segment], [each[experts] for each in self.domain])

    def add(
        self,
        shares: Shares,
        gradients: Callable[[int], Sequence[Tensor | None]],
        done: Callable[[Segment, list[Tensor]], None],
    ) -> None:
        """The gradients of a domain's chunks, by number: those of a segment add up in order, and so do segments,
        whichever process has each. This process's own segments are `done` with their G."""
        team = shares.team
        for unit, owner in shares.segments:
            if owner != team.rank:
                if team.first:
                    for total in _pieces(self.domain):
                        total += torch.from_numpy(team.receive(owner))
                continue
            for number, chunk in enumerate(unit.chunks):
                for total, gradient in zip(self.segment, gradients(chunk), strict=True):
                    if number == 0:
                        _put(total, gradient)
                    elif gradient is not None:
                        add_to(total, gradient)
            done(unit, self.segment)
            if not team.first:
                for piece in _pieces(self.segment):
                    team.send(piece.numpy())
            else:
                for total, segment in zip(self.domain, self.segment, strict=True):
                    add_to(total, segment)


def _pieces(totals: list[Tensor]) -> Iterator[Tensor]:
    """Some experts at a time, so that little of them is copied to be sent."""
    for total in totals:
        yield from total.split(max(1, SENT // total[0].numel()))


class SegmentSums:
    """Sums of a domain, [E] float64 for each segment."""

    def __init__(self, shares: Shares, E: int) -> None:
        self.shares = shares
        own = [unit for unit, owner in shares.segments if owner == shares.team.rank]
        self.sums = {unit.number: torch.zeros(E, dtype=torch.float64) for unit in own}
        self.unit_of = {chunk: unit.number for unit in own for chunk in unit.chunks}

    def add(self, chunk: int, sums: Tensor, experts: slice = slice(None)) -> None:
        """Of one chunk, or of a segment of which this is one; of some `experts`."""
        self.sums[self.unit_of[chunk]][experts] += sums

    def total(self) -> Tensor:
        """Of all segments, in the first of several processes; elsewhere 0."""
        found: dict[int, Tensor] = {}
        for each in self.shares.team.gather(self.sums):
            found |= each
        return folded(found)


@dataclass(frozen=True)
class Matrix:
    """One stacked weight of a layer's experts: expert e's rows follow one another along the first axis."""

    weight: nn.Parameter
    shape: tuple[int, int]  # of one expert's part
    hidden_axis: int  # which of the two is the hidden dimension


def matrices(layer: nn.Module, E: int, H: int) -> list[Matrix]:
    """The weights of a decoder layer's experts, biases and routers left out."""
    experts = experts_of(layer)
    assert experts is not None
    stacked = [(name, p) for name, p in experts.named_parameters() if p.ndim == 3 and len(p) == E]
    if not stacked:  # DBRX keeps rows of all experts in one matrix
        stacked = [(n, p) for n, p in experts.named_parameters() if p.ndim == 2 and not len(p) % E and len(p) > E]
    if not stacked:
        raise InputError(f"--tier gradient: {type(experts).__name__} keeps its experts' weights in no form known here")
    transposed = bool(getattr(experts, "is_transposed", False)) or type(experts).__name__ == "Llama4TextMoe"
    found = []
    for name, weight in stacked:
        rows, columns = weight.numel() // E // weight.shape[-1], weight.shape[-1]
        if (rows == H) != (columns == H):
            axis = 0 if rows == H else 1
        else:  # [out, in], and H comes out of the last one
            axis = int(any(word in name for word in ("down", "output", "w2")) == transposed)
        found.append(Matrix(weight, (rows, columns), axis))
    return found


@contextmanager
def accumulators(parts: list[Matrix], E: int, folder: Path | None, name: str) -> Iterator[list[Tensor]]:
    """Zeros [E, rows, columns] float32 for each matrix, in memory or in a file each."""
    with ExitStack() as stack:
        totals = []
        for number, part in enumerate(parts):
            shape = (E, *part.shape)
            if folder is None:
                totals.append(torch.zeros(shape))
                continue
            path = folder / f"G-{name}-{number}"
            stack.callback(path.unlink, missing_ok=True)
            totals.append(paged_zeros(path, shape, "gradients"))
        yield totals


def add_to(total: Tensor, gradient: Tensor) -> None:
    """total [E, rows, columns] += gradient, an expert at a time."""
    for mine, theirs in zip(total, gradient.view_as(total), strict=True):
        mine += theirs.to("cpu", torch.float32)


def _put(total: Tensor, gradient: Tensor | None) -> None:
    """total = gradient (None: 0), so that nothing has to be read before."""
    if gradient is None:
        total.zero_()
    else:
        total.copy_(gradient.view_as(total))


def joint_fields(of_joint: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The fields of a joint G of `count` domains, from its `functionals`."""
    names = ("gradient_norm", "gradient_cosine", "gradient_log_std", "gradient_outlier")
    return {"joint_gradients": torch.tensor([count]), **{f"joint_{n}": of_joint[f"{n}_sum"] for n in names}}


def unknown(E: int) -> dict[str, Tensor]:
    """The fields of G that are no sums, and of a joint one, where they are not known."""
    vector, square, count = torch.zeros(E, dtype=torch.float64), torch.zeros(E, E, dtype=torch.float64), torch.zeros(1)
    of = {"norm": vector, "cosine": square, "log_std": vector, "outlier": vector.long()}
    own = {"gradients": count.long(), **{f"gradient_{name}_sum": value for name, value in of.items()}}
    return own | joint_fields(own, 0)


def functionals(axes: Sequence[int], totals: list[Tensor]) -> dict[str, Tensor]:
    """What the gradient tier holds of one G, without weights: totals are [E, rows, columns] float32, and `axes` say
    which of each one's last two is the hidden dimension."""
    E = len(totals[0])
    n = sum(total[0].numel() for total in totals)
    gram, total = torch.zeros(E, E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for columns in _columns(totals):
        gram += columns @ columns.T
        total += columns.sum(1)
    norm = gram.diagonal().sqrt()
    unit = torch.where(norm > 0, 1 / norm, 0)
    mean = total / n
    sigma = (gram.diagonal() / n - mean.square()).clamp(min=0).sqrt()
    outliers = torch.zeros(E, dtype=torch.int64)
    for columns in _columns(totals):
        outliers += ((columns - mean[:, None]).abs() > 3 * sigma[:, None]).sum(1)
    return {
        "gradients": torch.ones(1, dtype=torch.int64),
        "gradient_norm_sum": norm,
        "gradient_cosine_sum": gram * unit[:, None] * unit,
        "gradient_log_std_sum": torch.stack([_log_std(axes, [total[e] for total in totals]) for e in range(E)]),
        "gradient_outlier_sum": outliers,
    }


def _columns(totals: list[Tensor]) -> Iterator[Tensor]:
    """All experts' G in pieces [E, some], float64."""
    for total in totals:
        flat = total.flatten(1)
        for piece in flat.split(max(1, COLUMNS // len(flat)), dim=1):
            yield piece.double()


def taylor(parts: list[Matrix], totals: list[Tensor]) -> Tensor:
    """[E] float64: sum of weights x G."""
    E = len(totals[0])
    found = torch.zeros(E, dtype=torch.float64)
    for part, total in zip(parts, totals, strict=True):
        found += torch.stack([_dot(part.weight.view(E, -1)[e], total[e]) for e in range(E)])
    return found


def _dot(weight: Tensor, total: Tensor) -> Tensor:
    pieces = zip(weight.detach().split(PIECE), total.flatten().split(PIECE), strict=True)
    products = [own.to("cpu", torch.float64) @ theirs.double() for own, theirs in pieces]
    return sum(products[1:], products[0])


def _log_std(axes: Sequence[int], mine: list[Tensor]) -> Tensor:
    """Sum over hidden dimensions of log std of the entries of one expert's G that belong to them.

    A dimension that never varies counts as the least normal number, as in eae.
    """
    count, total, square = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for axis, G in zip(axes, mine, strict=True):
        other = 1 - axis
        wide = G.double()
        count += G.shape[other]
        total, square = total + wide.sum(other), square + wide.square().sum(other)
    variance = square / count - (total / count).square()
    return variance.clamp(min=torch.finfo(torch.float64).tiny).log().sum() / 2

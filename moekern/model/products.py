"""Rows that are grouped by expert, and their products with the experts' weights.

On a CPU each product has the same bits whatever the number of threads: torch's threads share the rows of a product and
the numbers of an activation, and where a share ends in the middle of a vector its last numbers are rounded by other
instructions; a product of few rows takes other roads. So rows are gathered with others behind them (`gathered`), and
each expert's product takes in those that follow its own, up to a multiple of EVEN and to FEW at least; what comes of
these is overwritten by the next expert's, or left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from moekern.model import transformers_api
from moekern.model.aligned import aligned

FEW, EVEN = 16, 8  # rows of a product: at least so many, and a multiple of these
SHARES = 120  # rows of an activation are a multiple of these, which 1 to 6 and 8 threads share evenly
PIECE = 1 << 22  # bytes of rows that are gathered together: what comes of them stays in a cache, in memory used before
LINE = 64  # bytes: MKL rounds otherwise where a matrix begins elsewhere
ONEDNN = "onednn"
# (vendor, family) of a CPU -> the library whose float32 products were measured to be the fastest there, where it is
# another than torch's choice. AMD's family 26 (Zen 5): oneDNN 209 to 232 GFLOP/s on a core, MKL 100 to 112.
FASTEST = {("AuthenticAMD", 26): ONEDNN}


def gathered(hidden: Tensor, tokens: Tensor, scales: Tensor | None = None) -> Tensor:
    """Rows hidden[tokens] times scales [N]; on a CPU with rows of zeros behind them, see the module's text."""
    if hidden.device.type != "cpu":
        rows = hidden[tokens]
        return rows if scales is None else rows * scales[:, None]
    N = len(tokens)
    rows = hidden.new_empty(-(-(N + FEW) // SHARES) * SHARES, hidden.shape[1])
    rows[N:].zero_()
    torch.index_select(hidden, 0, tokens, out=rows[:N])
    if scales is not None:
        rows[:N].mul_(scales[:, None])
    return rows


def grouped_linear(
    rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None, is_transposed: bool = False
) -> Tensor:
    """Products [N, R] of rows [N, C] with their expert's weight, of [E, R, C] or, transposed, [E, C, R]; bias [E, R].

    Expert e's rows end at ends[e]. Rows that stand behind all of these are not products of their own: there the result
    may be anything. Without such rows these are transformers' products, which have a gradient.
    """
    if rows.device.type != "cpu" or len(rows) == int(ends[-1]):
        each = None if bias is None else bias.repeat_interleave(_sizes(ends), dim=0, output_size=len(rows))
        if all(aligned(size, weight) for size in weight.shape[1:]):
            return transformers_api.grouped_linear(rows, weight, ends, each, is_transposed)
        made = _one_by_one(rows, weight if is_transposed else weight.mT, ends)
        return made if each is None else made + each
    weight = weight if is_transposed else weight.mT
    rows, library = rows.to(weight.dtype), library_of(weight.dtype)
    bounds = [0, *ends.tolist()]
    out = rows.new_empty(len(rows), weight.shape[2])
    out[bounds[-1] :].zero_()
    for e, ((start, stop), own) in enumerate(zip(pairwise(bounds), weight.unbind(), strict=True)):
        if stop > start:
            count = filled(stop - start)
            _multiply(rows.narrow(0, start, count), own, out.narrow(0, start, count), library)
            if bias is not None:
                out[start:stop].add_(bias[e])
    return out


def pieces(bounds: Sequence[int], most: int) -> Iterator[slice]:
    """The rows that are divided by expert at these bounds, in whole experts of up to `most` rows together, or one."""
    start = stop = bounds[0]
    for end in bounds[1:]:
        if end - start > most and stop > start:
            yield slice(start, stop)
            start = stop
        stop = end
    yield slice(start, stop)


def filled(count: int) -> int:
    """Rows of an expert's product."""
    return -(-max(count, FEW) // EVEN) * EVEN


def library_of(dtype: torch.dtype) -> str | None:
    """The library of `FASTEST` that makes products of a type on this CPU; None: the one that torch chooses."""
    known = dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    cpu = _cpu() if known else None
    return None if cpu is None else FASTEST.get(cpu)


def _one_by_one(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Products with weight [E, C, R] of any sizes, which have a gradient; of rows behind the last zeros."""
    bounds, rows = [0, *ends.tolist()], rows.to(weight.dtype)
    made = [rows[start:stop] @ own for (start, stop), own in zip(pairwise(bounds), weight, strict=True) if stop > start]
    return torch.cat([*made, rows.new_zeros(len(rows) - bounds[-1], weight.shape[2])])


def _sizes(ends: Tensor) -> Tensor:
    return ends.diff(prepend=ends.new_zeros(1))


def _multiply(rows: Tensor, weight: Tensor, out: Tensor, library: str | None) -> None:
    """out = rows times weight."""
    rows = rows if rows.data_ptr() % LINE == 0 else rows.clone()
    if library == ONEDNN:
        out.copy_(torch.ops.mkldnn._linear_pointwise(rows, weight.T, None, "none", [], ""))
    elif out.data_ptr() % LINE == 0:
        torch.mm(rows, weight, out=out)
    else:
        out.copy_(torch.mm(rows, weight))


@cache
def _cpu() -> tuple[str, int] | None:
    """Vendor and family of this machine's CPU, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    told = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    family = told.get("cpu family", "").strip()
    return (told.get("vendor_id", "").strip(), int(family)) if family.isdecimal() else None

"""What a least-squares fit of each expert's down-projection needs: A'A and A'R of its rows."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from moekern.kernels.checks import BOOL, I64, check_grouped, check_tensors
from moekern.kernels.dispatch import backend_for, implementation
from moekern.kernels.sums import Sum, as_arguments, zeros

F32 = (torch.float32,)


class GramSums(NamedTuple):
    """Sums over each expert's counted rows."""

    gram: Annotated[Tensor, Sum("E M? M?")]  # Σ aᵢaⱼ, symmetric
    product: Annotated[Tensor, Sum("E M H")]  # Σ aᵢrₕ


def gram_sums(E: int, M: int, H: int = 0, device: torch.device | str = "cpu", *, gram: bool = True) -> GramSums:
    """Zeros for E experts of M channels and targets of H columns; without `gram` A'A is left unmeasured."""
    return zeros(GramSums, {"E": E, "M": M, "H": H, "M?": M if gram else 0}, device)


def expert_gram(
    a: Tensor,
    r: Tensor | None,
    offsets: Tensor,
    mask: Tensor | None,
    sums: GramSums,
    *,
    tokens: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Add A'A and A'R of each expert's rows to the sums, in place.

    a [N, M] float32 is grouped by expert: rows offsets[e]:offsets[e+1] are expert e's (offsets [E+1] int64). r [N, H]
    float32 has a row for each row of a; with tokens [N] int64 it is [T, H], row n of a goes with row tokens[n], and no
    gathered copy of r is made; r None: A'A alone. mask [N] bool keeps the rows that count. Rows from offsets[E] on are
    not read. Of the given gram, which may be left out, the upper triangle is added to, and the lower one becomes its
    mirror image. No gradient passes.

    Products are summed in float32 over at most 256 rows, one fused multiply-add after the other, and these sums in
    float64 in the rows' order, so each is wrong by at most 256·2⁻²⁴·Σ|aᵢaⱼ| (or Σ|aᵢrₕ|). Natively masked rows change
    no bit of what the others give; on a GPU chunks are of 256 rows with those that do not count.
    Raises ValueError for a wrong argument (on a CPU also for wrong values in offsets and tokens), NotImplementedError
    for a backend that has no such op.
    """
    op = "expert_gram"
    if r is None:
        r, tokens = a.new_zeros(len(a), 0), None
    sizes = check_tensors(op, {
        "a": (a, "N M", F32),
        "r": (r, "N H" if tokens is None else "T H", F32),
        "offsets": (offsets, "E+1", I64),
        "tokens": (tokens, "N", I64),
        "mask": (mask, "N", BOOL),
        **as_arguments(GramSums, sums),
    })  # fmt: skip
    name = backend_for(op, a.device.type, backend)
    if name != "native" and a.device.type == "cpu":
        check_grouped(op, offsets, sizes["N"], tokens, len(r))
    implementation(name, op)(a.detach(), r.detach(), offsets, mask, sums, tokens=tokens)

"""What goes into experts' down-projections, times the gates, and the energy of its channels."""

from __future__ import annotations

from torch import Tensor

from moekern.kernels.checks import BOOL, F64, FLOATS, I64, check_grouped, check_tensors
from moekern.kernels.dispatch import backend_for, implementation


def gated_energy(
    rows: Tensor, gates: Tensor, offsets: Tensor, mask: Tensor | None, energy: Tensor, *, backend: str | None = None
) -> Tensor:
    """A [N, M] float32, each expert's inner activations times the gates; Σ A² of its channels is added to energy.

    rows [N, M] (float32, bfloat16 or float16), what the model's own code gives the down-projection, are grouped by
    expert, rows offsets[e]:offsets[e+1] expert e's (offsets [E+1] int64), and gates [N] (any of these) their gates;
    energy [E, M] is float64. All rows of experts are computed, mask [N] bool keeps those that energy counts; rows of A
    from offsets[E] on are zero. No gradient passes.

    Products are float32; squares are summed in float32 over at most 256 rows and in float64 across, in the rows' order.
    A's bits are the same in every backend.
    Raises ValueError for a wrong argument (on a CPU also for wrong values in offsets), NotImplementedError for a
    backend that has no such op.
    """
    op = "gated_energy"
    sizes = check_tensors(op, {
        "energy": (energy, "E M", F64),
        "offsets": (offsets, "E+1", I64),
        "rows": (rows, "N M", FLOATS),
        "gates": (gates, "N", FLOATS),
        "mask": (mask, "N", BOOL),
    })  # fmt: skip
    name = backend_for(op, rows.device.type, backend)
    if name != "native" and rows.device.type == "cpu":
        check_grouped(op, offsets, sizes["N"])
    a: Tensor = implementation(name, op)(rows.detach(), gates.detach(), offsets, mask, energy)
    return a

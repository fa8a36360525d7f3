"""What goes into experts' down-projections, times the gates, and the energy of its channels."""

from __future__ import annotations

from torch import Tensor

from moekern.kernels import reference
from moekern.kernels.checks import BOOL, F64, FLOATS, I64, check_grouped, check_tensors
from moekern.kernels.dispatch import backend_for, implementation

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def gated_energy(
    rows: Tensor,
    gates: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    energy: Tensor,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A [N, M] float32, each expert's inner activations times the gates; Σ A² of its channels is added to energy.

    rows (float32, bfloat16 or float16) are grouped by expert, rows offsets[e]:offsets[e+1] expert e's (offsets [E+1]
    int64), and gates [N] (any of these) their gates. energy [E, M] float64 says how many channels M there are:
    without an activation rows are [N, M], what the model's own code gives the down-projection, and A = gate·rows; with
    one they are [N, 2M], gate's projection then up's, and A = gate·(act(rows[:, :M])·rows[:, M:]), or [N, M] of experts
    that have no gate's projection, and A = gate·act(rows). activation is named as in a model's config: silu, gelu (with
    erf) or gelu_pytorch_tanh. All rows of experts are computed, mask [N] bool keeps those that energy counts; rows of
    A from offsets[E] on are zero. No gradient passes.

    Everything is float32, act(x) good to 16·2⁻²⁴·|x|, each product rounded; squares are summed in float32 over at most
    256 rows and in float64 across, in the rows' order. A's bits are the same in every backend but the reference.
    Raises ValueError for a wrong argument (on a CPU also for wrong values in offsets), NotImplementedError for a
    backend that has no such op.
    """
    op = "gated_energy"
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"[{op}] activation: expected one of {', '.join(ACTIVATIONS)} or None, got {activation}")
    sizes = check_tensors(op, {
        "energy": (energy, "E M", F64),
        "offsets": (offsets, "E+1", I64),
        "rows": (rows, "N W", FLOATS),
        "gates": (gates, "N", FLOATS),
        "mask": (mask, "N", BOOL),
    })  # fmt: skip
    widths = {sizes["M"]} if activation is None else {sizes["M"], 2 * sizes["M"]}
    if sizes["W"] not in widths:
        expected = " or ".join(map(str, sorted(widths)))
        raise ValueError(f"[{op}] rows: expected {expected} columns, got {sizes['W']}")
    name = backend_for(op, rows.device.type, backend)
    if name != "native" and rows.device.type == "cpu":
        check_grouped(op, offsets, sizes["N"])
    run = implementation(name, op)
    a: Tensor = run(rows.detach(), gates.detach(), offsets, mask, energy, activation=activation)
    return a

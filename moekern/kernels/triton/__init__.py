"""The ops in Triton, for any GPU that it compiles for. On a CPU its interpreter runs them (TRITON_INTERPRET=1): a test.

No value is read on the host and no size depends on one, so that a call can be captured in a CUDA graph. Floats are
never added by atomics. Multiplication and addition are never fused, so that a GPU rounds as the CPU does.
"""

from __future__ import annotations

import triton

from moekern.kernels.triton.combine_and_measure import combine_and_measure, row_of_kernel
from moekern.kernels.triton.expert_gram import expert_gram
from moekern.kernels.triton.gated_energy import gated_energy
from moekern.kernels.triton.grouped_mlp import grouped_mlp
from moekern.kernels.triton.mixture_stats import mixture_stats
from moekern.kernels.triton.router_stats import router_stats
from moekern.kernels.triton.scatter_residual import scatter_residual
from moekern.kernels.triton.sort_by_expert import sort_by_expert

__all__ = (
    "combine_and_measure", "expert_gram", "gated_energy", "grouped_mlp", "mixture_stats", "obstacle",
    "router_stats", "scatter_residual", "sort_by_expert",
)  # fmt: skip


def obstacle(device: str) -> str | None:
    """Why none of this runs on a device of this type; None where it does."""
    if device == "cuda" or not isinstance(row_of_kernel, triton.JITFunction):
        return None
    return "on a CPU it needs Triton's interpreter, with TRITON_INTERPRET=1 in the environment"

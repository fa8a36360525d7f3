"""The Triton backend: what a GPU would be given, and that moekern works without it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
KERNELS = {
    "add_chunks_kernel", "combine_kernel", "contributions_kernel", "count_kernel", "dimensions_kernel",
    "distances_kernel", "down_kernel", "energy_kernel", "gate_up_kernel", "gates_kernel", "gram_kernel",
    "logits_kernel", "measure_kernel", "mixture_kernel", "move_kernel", "pairs_kernel", "products_kernel",
    "row_of_kernel", "slots_kernel", "subtract_kernel",
}  # fmt: skip
PRODUCTS = {"down_kernel", "gate_up_kernel", "gram_kernel", "products_kernel", "subtract_kernel"}
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}  # what a program may have (8.6 and 8.9 have no more than that)


@NEEDS_TRITON
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(["few", "90"], id="few 90"),
        pytest.param(["90"], id="90", marks=pytest.mark.whole),
        pytest.param(["mlp", "80"], id="mlp 80", marks=pytest.mark.whole),  # neither FP8 nor Hopper's products
    ],
)
def test_every_kernel_compiles_for_a_gpu_without_reading_a_value(tmp_path: Path, chosen: list[str]) -> None:
    command = [sys.executable, "-m", "tests.helpers.compile_triton", *chosen]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    compiled = {line["kernel"] for line in found}
    assert compiled == KERNELS if "mlp" not in chosen else compiled > {"down_kernel", "gate_up_kernel"}
    # A fused product, a flushed subnormal or an atomic sum would be other bits than the CPU's, or than the next run's.
    # Matrix products may fuse: their order is fixed, and no other backend's bits are asked of them.
    for line in found:
        assert not line["flushed"], line
        assert not line["float_atomics"], line
        assert not line["fused"] or line["kernel"] in PRODUCTS, line
        assert line["shared"] <= SHARED_MEMORY[line["architecture"]], line


def test_kernels_work_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from moekern import kernels\n"
        "backends = kernels.available()['router_stats']['cpu']\n"
        "sys.exit(backends != ('native', 'reference') or kernels.serves('triton', 'router_stats', 'cuda'))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_triton_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, moekern.kernels as k; k.backend_for('router_stats', 'cpu'); sys.exit('triton' in sys.modules)"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0

"""The CUDA kernels through nvcc, where there is one: the build compiles for sm_80 and sm_90, this for newer GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import ROOT

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")
FLAGS = (
    "-std=c++17", "-O1", "-fmad=false", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra",
    '-DMOEKERN_CUDA_ARCHITECTURES="test"', "-ptx",
)  # fmt: skip


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_every_kernel_compiles_without_a_warning_and_without_float_atomics(tmp_path: Path) -> None:
    known = subprocess.run([str(NVCC), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    newest = [name for name in ("compute_90", "compute_100") if name in known][-1]

    def compiled(source: Path) -> str:
        out = tmp_path / f"{source.stem}.ptx"
        command = [str(NVCC), *FLAGS, f"-arch={newest}", str(source), "-o", str(out)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr + result.stdout
        return out.read_text()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, ptx in zip(SOURCES, pool.map(compiled, SOURCES), strict=True):
            assert ".entry" in ptx, source
            # An atomic sum would be other bits on the next run, a fused or flushed one others than the CPU's.
            assert not re.search(r"\b(?:atom|red)\.\S*\.b?f\d+", ptx), source
            assert not re.search(r"\b(?:add|mul|sub)\S*\.ftz\.", ptx), source
            assert "fmaf(" in "".join(read_with_includes(source)) or not re.search(r"\bfma\.rn\.f32", ptx), source


def read_with_includes(source: Path) -> list[str]:
    """The text of a source and of the headers beside it that it includes."""
    text = source.read_text()
    return [
        text,
        *(t for name in re.findall(r'#include "(\w+\.h)"', text) for t in read_with_includes(source.parent / name)),
    ]

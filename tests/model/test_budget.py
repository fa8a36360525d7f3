"""How much memory may be taken: what a person allows, what is free, and the limits around the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moekern.errors import InputError
from moekern.model import budget
from moekern.model.budget import Budget, budget_of, groups_left, resident
from moekern.model.compute import Compute
from moekern.model.memory import return_freed_memory

GIB = 1 << 30
CPU = Compute(device="cpu")
UNLIMITED = 9223372036854771712


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No limit around the process but what the machine has: 32 GiB free."""
    monkeypatch.setattr(budget, "available", lambda: 32 * GIB)
    monkeypatch.setattr(budget, "groups_left", lambda: [])
    monkeypatch.setattr(budget, "limits_left", lambda: [])
    monkeypatch.setattr(budget, "resident", lambda: GIB)


@pytest.mark.usefixtures("alone")
def test_what_is_allowed_counts_the_process_and_what_is_free_leaves_a_part() -> None:
    assert budget_of(CPU) == Budget(30 * GIB)
    assert budget_of(Compute(device="cpu", memory=4 * GIB)) == Budget(3 * GIB)
    assert budget_of(Compute(device="cpu", memory=99 * GIB)).host == 98 * GIB  # a person may know better
    with pytest.raises(InputError, match=r"--memory 512.0 MiB: the process has 1.0 GiB before it reads a weight"):
        budget_of(Compute(device="cpu", memory=GIB // 2))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("limit", ["groups_left", "limits_left"])
def test_no_flag_lifts_a_limit_around_the_process(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, limit, lambda: [16 * GIB, 8 * GIB])
    assert budget_of(CPU).host == budget_of(Compute(device="cpu", memory=64 * GIB)).host == 8 * GIB * 15 // 16


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def process(root: Path, cgroup: str, *mounts: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text("".join(f"{mount}\n" for mount in mounts))


def test_groups_of_version_2_within_groups(tmp_path: Path) -> None:
    process(tmp_path, "0::/box/job\n", "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
    top = tmp_path / "sys/fs/cgroup"
    stat = "anon 500\ninactive_file 150\nactive_file 50"
    group(top / "box", memory__max=1000, memory__current=700, memory__stat=stat)
    group(top / "box/job", memory__max="max", memory__high=900, memory__current=100)
    assert list(groups_left(tmp_path)) == [800, 500]


def test_groups_of_version_1_as_a_container_sees_them(tmp_path: Path) -> None:
    process(
        tmp_path, "9:cpu:/x\n4:hugetlb,memory:/docker/abc/inner\n0::/\n",
        "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
        "36 31 0:33 /docker/abc /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
        "37 31 0:34 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
    )  # fmt: skip
    top = tmp_path / "sys/fs/cgroup/memory"
    (tmp_path / "sys/fs/cgroup/unified").mkdir(parents=True)
    stat = "inactive_file 1\ntotal_inactive_file 40\ntotal_active_file 10"
    group(top, memory__limit_in_bytes=500, memory__usage_in_bytes=450, memory__stat=stat)
    group(top / "inner", memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes=400)
    assert list(groups_left(tmp_path)) == [100]


@pytest.mark.parametrize("cgroup", ["", "0::/../elsewhere\n", "0::/gone\n"])
def test_groups_that_are_not_seen_are_no_limit(tmp_path: Path, cgroup: str) -> None:
    process(tmp_path, cgroup, "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    assert list(groups_left(tmp_path)) == []
    assert list(groups_left(tmp_path / "none")) == []


@pytest.mark.parametrize("kind", ["RLIMIT_AS", pytest.param("RLIMIT_DATA", marks=pytest.mark.whole)])
def test_a_limit_of_the_process_is_seen(kind: str) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.{kind}, ({64 * GIB}, {64 * GIB}))\n"
        "from moekern.model.budget import *\n"
        "(left,) = limits_left()\n"
        f"assert 32 * {GIB} < left < {64 * GIB}, left\n"
        f"assert budget_of(Compute(device='cpu', memory={640 * GIB})).host < left\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_the_process_holds_is_known() -> None:
    return_freed_memory()  # or what is held is memory that was used before
    before = resident()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert resident() >= before + held.nbytes // 2


def test_a_budget_of_a_gpu_caps_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    capped: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda place: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda place: 0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, place: capped.append(share))
    assert budget_of(Compute(device="cuda:0")).gpu == 75 * GIB
    assert capped == []
    assert budget_of(Compute(device="cuda:0", gpu_memory=20 * GIB)).gpu == 20 * GIB
    assert capped == [0.25]
    with pytest.raises(InputError, match="--gpu-memory: layers are computed on cpu, which is no GPU"):
        budget_of(Compute(device="cpu", gpu_memory=GIB))

"""Tensors that no range of the source holds: made when they are written, once, and known by their recipes before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekern.errors import InputError
from moekern.files import work_path
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning import cuts
from moekern.pruning.copying import CHECKSUMS
from moekern.pruning.pieces import Computed, computed, made_from, recipe
from moekern.pruning.prune import MANIFEST, prune
from moekern.verification.tensors import verify
from tests.helpers.digest import xxh3
from tests.helpers.synthetic import deepseek_v4, read, tree, write

KEPT = (1, 2, 5, 6)
PLAN = Plan({str(layer): LayerPlan(KEPT) for layer in range(3)}, {"criterion": "test"})
TABLES, BIAS = ["layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.tid2eid"], "layers.2.ffn.gate.bias"
MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in", *deepseek_v4(), shards=5)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor was computed."""
    counter: Counter[str] = Counter()
    for name in ("_remapped", "_inner_rows"):
        function = getattr(cuts, name)

        def counted(entry: Any, *rest: Any, function: Any = function) -> bytes:
            counter[entry.name] += 1
            return bytes(function(entry, *rest))

        monkeypatch.setattr(cuts, name, counted)
    return counter


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


def test_each_is_made_once(source: Path, tmp_path: Path, made: Counter[str]) -> None:
    prune(source, PLAN, tmp_path / "out", reread=True)
    assert made == Counter([*TABLES, BIAS])
    assert verify(source, PLAN, tmp_path / "out").problems == ()
    before, after = read(source), read(tmp_path / "out")
    bias = np.frombuffer(before[BIAS][2], "<f4").reshape(2, -1)[:, list(KEPT)]
    assert after[BIAS] == ("F32", [2, len(KEPT)], bias.tobytes())


def test_what_a_resumed_run_takes_over_is_not_made(source: Path, tmp_path: Path, made: Counter[str]) -> None:
    prune(source, PLAN, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done > 0.6 * total:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        prune(source, PLAN, tmp_path / "out", progress=stop)
    lines = (work_path(tmp_path / "out") / "manifest.jsonl").read_text().splitlines()
    proved = Counter(name for line in lines for name in json.loads(line)["computed"])
    assert proved
    made.clear()
    prune(source, PLAN, tmp_path / "out")
    assert made == Counter([*TABLES, BIAS]) - proved
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("checksum", CHECKSUMS)
@pytest.mark.parametrize("copy", ["stream", "kernel"])
def test_the_manifest_tells_what_was_computed(source: Path, tmp_path: Path, copy: Any, checksum: Any) -> None:
    prune(source, PLAN, tmp_path / "out", copy=copy, checksum=checksum)
    lines, after = manifest(tmp_path / "out"), read(tmp_path / "out")
    assert [name for line in lines for name in line["computed"]] == [*TABLES, BIAS]
    for line in lines:
        for name in line["computed"]:
            if checksum == "xxh3":  # these pass through memory however the rest is copied
                assert line["tensors"][name] == xxh3(after[name][2]).hex()
            assert (line["tensors"][name] is None) == (checksum == "none")


def test_an_older_manifest_is_taken_over_where_nothing_is_computed(source: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        prune(source, PLAN, tmp_path / "out", progress=stop)
    path = work_path(tmp_path / "out") / "manifest.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in x.items() if k != "computed"}) + "\n" for x in lines))
    plain = [line for line in lines if not line["computed"]]
    report = prune(source, PLAN, tmp_path / "out")
    assert report.reused >= sum(line["size"] for line in plain) > 0


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_length_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int) -> None:
    right = cuts._inner_rows
    monkeypatch.setattr(cuts, "_inner_rows", lambda *a: (right(*a) + b"x")[: 32 + change])
    with pytest.raises(InputError, match=f"{BIAS}: {32 + change} bytes were computed, .* is 32 bytes long") as error:
        prune(source, PLAN, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert prune(source, PLAN, tmp_path / "out").reused > 0
    assert verify(source, PLAN, tmp_path / "out").problems == ()


def test_a_table_that_is_wrong_is_known_before_anything_is_written(tmp_path: Path) -> None:
    config, tensors = deepseek_v4()
    dtype, shape, raw = tensors[TABLES[1]]
    tensors[TABLES[1]] = dtype, shape, raw[:-8] + (8).to_bytes(8, "little")
    source = write(tmp_path / "in", config, tensors, shards=5)
    with pytest.raises(InputError, match=f"{TABLES[1]}: expected expert numbers from 0 to 7"):
        prune(source, PLAN, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_recipe_is_all_that_decides_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    ranges = [(str(path), 0, 4), (str(path), 6, 2)]
    first = recipe("sum", ranges, kept=(1, 2), dtype="F32")
    assert recipe("sum", ranges, dtype="F32", kept=(1, 2)) == first
    others = [
        recipe("mean", ranges, kept=(1, 2), dtype="F32"),
        recipe("sum", ranges[::-1], kept=(1, 2), dtype="F32"),
        recipe("sum", ranges[:1], kept=(1, 2), dtype="F32"),
        recipe("sum", ranges, kept=(2, 1), dtype="F32"),
        recipe("sum", ranges, kept=(1, 2), dtype="F16"),
    ]
    os.utime(path, ns=(5, 5))
    others.append(recipe("sum", ranges, kept=(1, 2), dtype="F32"))
    path.write_bytes(b"01234567890")
    os.utime(path, ns=(5, 5))
    others.append(recipe("sum", ranges, kept=(1, 2), dtype="F32"))
    assert len({first, *others}) == 8


def test_what_a_file_is_made_from_needs_no_making() -> None:
    def never() -> bytes:
        raise AssertionError

    pieces = [b"head", computed("x", "a" * 64, 3, never)]
    assert made_from(pieces) == made_from([b"head", Computed("a" * 64, 3, never)])
    assert len({made_from([b"head", computed("x", r * 64, n, never)]) for r in "ab" for n in (3, 4)}) == 4


def test_a_source_that_changes_meanwhile_is_refused(source: Path, tmp_path: Path) -> None:
    """The recipe is taken again when the bytes are there."""
    last = sorted(source.glob("*.safetensors"))[-1]
    with pytest.raises(InputError, match=f"{last.name} in {source} changed while it was copied"):
        prune(source, PLAN, tmp_path / "out", progress=lambda done, total: os.utime(last, ns=(done, done)))


def test_two_big_ones_are_never_held_together(tmp_path: Path) -> None:
    """Peak memory of a process that writes two of 64 MiB in one shard: one of them and the buffers (32 MiB)."""
    config, tensors = deepseek_v4()
    big = {"big.a": ("U8", [64 * MIB], b"a"), "big.b": ("U8", [64 * MIB], b"b")}
    header, offset = {}, 0
    for name, (dtype, shape, raw) in {**tensors, **big}.items():
        size = 64 * MIB if name in big else len(raw)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    folder = write(tmp_path / "in", config, tensors, shards=1)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(raw for _, _, raw in tensors.values()))
        file.truncate(8 + len(text) + offset)
    script = f"""
import numpy
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.cuts import OutputTensor
from moekern.pruning.pieces import computed
from moekern.pruning.prune import prune
is_computed, piece = OutputTensor.is_computed, OutputTensor.computed
OutputTensor.is_computed = property(lambda t: t.name.startswith("big.") or is_computed.fget(t))
OutputTensor.computed = lambda t, checkpoint: piece(t, checkpoint) if not t.name.startswith("big.") else [computed(
    t.name, "0" * 64, t.nbytes, lambda: memoryview(numpy.full(t.nbytes, ord(t.name[-1]), "u1")))]
plan = Plan({{str(layer): LayerPlan({KEPT}) for layer in range(3)}})
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
prune({str(folder)!r}, plan, {str(tmp_path / "out")!r})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = read(tmp_path / "out")
    for name in big:
        assert after[name][2] == name[-1].encode() * (64 * MIB)
    assert 64 * MIB / 1024 < int(done.stdout) < (64 + 32 + 16) * MIB / 1024

"""What is read equals the file's bytes, one buffer serves every layer, and the page cache stays as it was."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moekern import _C
from moekern.architectures import ExpertTensor, MoeLayer, find_layout
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.checkpoint.header import Shard
from moekern.errors import InputError
from moekern.model import reader
from moekern.model.reader import LayerReader, read_experts, read_tensors
from tests.helpers import synthetic

CPU = torch.device("cpu")
MIB = 1 << 20
Maker = Callable[[], tuple[dict[str, Any], synthetic.Tensors]]
MAKERS: list[Maker] = [
    *(functools.partial(synthetic.qwen3, companions) for companions in ("bf16", "fp8_static", "gptq")),
    synthetic.gpt_oss_mxfp4,
    synthetic.deepseek_v3,
]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def made(
    folder: Path, tensors: synthetic.Tensors, shards: int = 1, pad: int = 0, interleave: bool = False
) -> Checkpoint:
    return open_checkpoint(synthetic.write(folder, {}, tensors, shards, pad, interleave))


def numbered(shapes: Sequence[Sequence[int]], dtype: str = "U8") -> synthetic.Tensors:
    rng = np.random.default_rng(0)
    return {f"t{i:03d}": synthetic.data(rng, dtype, shape) for i, shape in enumerate(shapes)}


def assert_equal(found: dict[str, Tensor], tensors: synthetic.Tensors, names: Sequence[str] | None = None) -> None:
    assert set(found) == set(tensors if names is None else names)
    for name, tensor in found.items():
        _, shape, data = tensors[name]
        assert list(tensor.shape) == shape, name
        assert raw(tensor) == data, name


@pytest.mark.parametrize("dtype", sorted(reader.DTYPES))
def test_every_dtype(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width = reader.DTYPES[dtype].itemsize
    monkeypatch.setitem(synthetic.BITS, dtype, 8 * width)
    rng = np.random.default_rng(1)
    values = {"a": [3, 5], "b": [0, 4], "c": []}
    tensors = {name: (dtype, shape, bytes(rng.integers(0, 2, int(np.prod(shape)) * width, np.uint8)))
               for name, shape in values.items()}  # fmt: skip
    checkpoint = made(tmp_path / "m", tensors)
    found = read_tensors(checkpoint, tensors)
    assert {t.dtype for t in found.values()} == {reader.DTYPES[dtype]}
    assert_equal(found, tensors)
    with LayerReader(checkpoint, [list(tensors)], CPU) as layers:
        layers.start(0)
        assert_equal(layers.take(), tensors)


@pytest.mark.parametrize("pad", [0, 1, 7, 8, 100])  # places of the data in its page, odd ones too
@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("shards", [1, 2])
def test_layers_of_large_and_small_tensors(tmp_path: Path, pad: int, threads: int, shards: int) -> None:
    shapes = [[5 * MIB + 3], [2], [0], [4 * MIB], [70_000], [1], [65_537]]
    tensors = numbered(shapes) | {"f": ("F32", [3], np.arange(3, dtype="<f4").tobytes())}
    checkpoint = made(tmp_path / "m", tensors, shards, pad, interleave=True)
    names = list(tensors)
    groups = [names, names[::2], names[1::2], []]
    with LayerReader(checkpoint, groups, CPU, threads) as layers:
        for i, group in enumerate(groups):
            layers.start(i)
            assert_equal(layers.take(), tensors, group)
            layers.release(nn.Module())
    assert_equal(read_tensors(checkpoint, names[::-1]), tensors)


def test_a_layer_in_use_survives_the_next_reads(tmp_path: Path) -> None:
    tensors = numbered([[100, 100], [100, 100], [100, 100]])
    checkpoint = made(tmp_path / "m", tensors)
    model = nn.ParameterList()
    with LayerReader(checkpoint, [[name] for name in tensors], CPU) as layers:
        for i, name in enumerate(tensors):
            layers.start(i)
            view = layers.take()[name]
            model.append(nn.Parameter(view, requires_grad=False))
            layers.release(model)
            assert layers.buffer is not None
            layers.buffer.fill_(0)
        assert_equal({name: p.data for name, p in zip(tensors, model, strict=True)}, tensors)


def test_one_buffer_no_larger_than_the_largest_layer(tmp_path: Path) -> None:
    tensors = numbered([[100_000], [3_000_000], [200_000], [50]])
    checkpoint = made(tmp_path / "m", tensors, shards=2)
    with LayerReader(checkpoint, [["t000"], ["t001", "t002"], ["t003"]], CPU) as layers:
        assert layers.buffer is None
        places = set()
        for i in (0, 1, 2, 1, 0):
            layers.start(i)
            layers.take()
            assert layers.buffer is not None
            places.add(layers.buffer.data_ptr())
            assert layers.buffer.nbytes == layers.nbytes <= 3_200_000 + 2 * 2 * reader.PAGE  # two runs: two files
            layers.release(nn.Module())
        assert len(places) == 1
    assert layers.buffer is None


def test_a_file_that_shrinks_is_named_with_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shard, "check_unchanged", lambda self: None)  # it shrinks just afterwards
    tensors = numbered([[6 * MIB], [6 * MIB]])
    checkpoint = made(tmp_path / "m", tensors)
    path = checkpoint.shards[0].path
    with LayerReader(checkpoint, [["t000"], ["t001"], list(tensors)], CPU) as layers:
        layers.start(0)
        assert_equal(layers.take(), tensors, ["t000"])
        layers.release(nn.Module())
        end = checkpoint.tensors["t001"].start + 5_000_001
        os.truncate(path, end)
        layers.start(1)
        with pytest.raises(InputError, match=rf"model\.safetensors: ends at byte {end}, more was expected"):
            layers.take()
        layers.cancel()
        layers.start(0)  # what is left can still be read
        assert_equal(layers.take(), tensors, ["t000"])
    with pytest.raises(InputError, match=f"ends at byte {end}"):
        read_tensors(checkpoint, ["t001"])
    path.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: No such file"):
        read_tensors(checkpoint, ["t000"])


def test_a_dtype_torch_lacks_is_refused_before_reading(tmp_path: Path) -> None:
    checkpoint = made(tmp_path / "m", {"x": ("F4", [2], b"1")})
    with pytest.raises(InputError, match="x has dtype F4, which torch cannot hold"):
        LayerReader(checkpoint, [["x"]], CPU)


def test_read_ranges_reads_overlaps_and_checks_its_arguments(tmp_path: Path) -> None:
    data, path = np.random.default_rng(0).bytes(10_000), str(tmp_path / "f")
    Path(path).write_bytes(data)
    out = torch.zeros(10_000, dtype=torch.uint8)
    address = out.data_ptr()
    _C.read_ranges([(path, 5, 100, address), (path, 50, 200, address + 100), (path, 9_999, 1, address + 300)], 2)
    assert raw(out[:301]) == data[5:105] + data[50:250] + data[9_999:]
    _C.read_ranges([(path, 0, 10_000, address)], 1, keep_cache=True)
    assert raw(out) == data
    _C.read_ranges([], 1)
    with pytest.raises(ValueError, match="threads: expected 1 or more, got 0"):
        _C.read_ranges([], 0)
    with pytest.raises(ValueError, match="expected offset and length >= 0"):
        _C.read_ranges([(path, -1, 1, address)], 1)
    with pytest.raises(OSError, match="ends at byte 10000") as caught:
        _C.read_ranges([(path, 9_999, 2, address)], 1)
    assert caught.value.filename == path


def test_what_progress_raises_ends_the_reading(tmp_path: Path) -> None:
    path, seen = tmp_path / "f", list[int]()
    path.write_bytes(bytes(100))
    out = torch.zeros(100, dtype=torch.uint8)

    def stop(nbytes: int) -> None:
        seen.append(nbytes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _C.read_ranges([(str(path), 0, 100, out.data_ptr())], 2, progress=stop)
    assert seen == [100]


def resident(path: Path) -> int:
    """Bytes of a file in the page cache."""
    libc, size = ctypes.CDLL(None, use_errno=True), path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        status = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages)
        del start
    if status:
        pytest.skip(f"mincore: {os.strerror(ctypes.get_errno())}")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def empty_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("this file system cannot be emptied from the page cache")


@pytest.mark.parametrize("way", ["layer", "own memory"])
def test_nothing_stays_in_the_page_cache(tmp_path: Path, way: str) -> None:
    tensors = numbered([[8 * MIB + 5], [3], [9 * MIB], [100]])
    checkpoint = made(tmp_path / "m", tensors)
    path = checkpoint.shards[0].path
    empty_cache(path)
    if way == "layer":
        with LayerReader(checkpoint, [list(tensors)], CPU) as layers:
            layers.start(0)
            layers.take()
    else:
        read_tensors(checkpoint, tensors)
    assert resident(path) == 0
    out = torch.empty(path.stat().st_size, dtype=torch.uint8)
    _C.read_ranges([(str(path), 0, out.nbytes, out.data_ptr())], 2, keep_cache=True)
    assert resident(path) >= out.nbytes


def check_experts(checkpoint: Checkpoint, layer: MoeLayer, experts: Sequence[int]) -> dict[str, Tensor]:
    found = read_experts(checkpoint, layer, experts)
    whole = read_tensors(checkpoint, [tensor.name for tensor in layer.of_role("expert")])
    want = {}
    for tensor in layer.of_role("expert"):
        if tensor.action == "slice":
            rows = [expert * tensor.rows + i for expert in experts for i in range(tensor.rows)]
            want[tensor.name] = whole[tensor.name].index_select(tensor.axis, torch.tensor(rows, dtype=torch.int64))
        elif tensor.expert in experts:
            want[tensor.name] = whole[tensor.name]
    assert found.keys() == want.keys()
    for name in want:
        assert found[name].shape == want[name].shape
        assert raw(found[name]) == raw(want[name]), name
    return found


@pytest.mark.parametrize("experts", [[0], [7, 2], [1, 2, 3, 6], list(range(8)), []])
@pytest.mark.parametrize("make", MAKERS)
def test_experts_are_those_of_the_whole_tensors(tmp_path: Path, make: Maker, experts: list[int]) -> None:
    config, tensors = make()
    checkpoint = open_checkpoint(synthetic.write(tmp_path / "m", config, tensors, interleave=True))
    layers = find_layout(checkpoint).layers
    for layer in layers.values():
        found = check_experts(checkpoint, layer, experts)
        assert bool(found) == bool(experts) or config["model_type"] == "gpt_oss"


@pytest.mark.parametrize(("shape", "axis", "rows", "trailing"), [
    ([3, 8, 5], 1, 1, 0), ([2, 3, 16], 2, 2, 0), ([4, 9], 1, 1, 1), ([24, 2], 0, 3, 0), ([0, 8], 1, 1, 0),
])  # fmt: skip
def test_experts_on_any_axis(tmp_path: Path, shape: list[int], axis: int, rows: int, trailing: int) -> None:
    checkpoint = made(tmp_path / "m", {"t": synthetic.data(np.random.default_rng(0), "BF16", shape)})
    tensor = ExpertTensor("t", "slice", "expert", None, "t", axis, rows, trailing)
    check_experts(checkpoint, MoeLayer("0", "", 8, False, (tensor,)), [5, 0, 1])


@pytest.mark.parametrize("experts", [[8], [-1], [1, 1]])
def test_experts_that_are_not_there_are_refused(tmp_path: Path, experts: list[int]) -> None:
    checkpoint = made(tmp_path / "m", numbered([[8, 2]]))
    with pytest.raises(ValueError, match="different numbers below 8"):
        read_experts(checkpoint, MoeLayer("0", "", 8, False, ()), experts)


@pytest.mark.parametrize("what", ["rewritten", "replaced", "a pipe", "gone"])
def test_a_file_that_is_not_what_was_opened_is_refused(tmp_path: Path, what: str) -> None:
    tensors = numbered([(3,), (4,)])
    checkpoint = made(tmp_path / "model", tensors)
    path = checkpoint.shards[0].path
    with LayerReader(checkpoint, [tensors], CPU) as layers:
        layers.start(0)
        assert_equal(layers.take(), tensors)
        if what == "rewritten":
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
            os.utime(path, ns=(0, checkpoint.shards[0].mtime_ns + 1))  # type: ignore[operator]
        else:
            path.unlink()
        if what == "replaced":
            os.replace(made(tmp_path / "other", numbered([(3,), (5,)])).shards[0].path, path)
        elif what == "a pipe":
            os.mkfifo(path)
        layers.start(0)
        for read in (layers.take, lambda: read_tensors(checkpoint, tensors)):
            with pytest.raises(InputError, match="No such file" if what == "gone" else "was changed or replaced"):
                read()

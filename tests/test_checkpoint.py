import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moekern import checkpoint as module
from moekern.checkpoint import HEADER_CAP, open_checkpoint
from moekern.errors import InputError
from tests.layouts import header_of, write_checkpoint, write_shard

TENSORS = {"a": ("BF16", [4, 8]), "b.weight": ("F32", [3]), "c": ("U8", [0]), "d": ("F8_E4M3", [2, 2])}
INDEX = "model.safetensors.index.json"


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def single(folder: Path, content: bytes) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", {"model_type": "x"}, TENSORS, shards=2)


def edit_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_single_file(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 5), "y": torch.arange(7, dtype=torch.int32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"hidden_size": 5}')
    found = open_checkpoint(tmp_path)
    assert found.config == {"hidden_size": 5}
    assert found.index is None
    assert found.shards[0].metadata == {"format": "pt"}
    assert found.tensors["x"].dtype == "F32"
    assert found.tensors["x"].shape == (3, 5)
    assert found.read("y") == tensors["y"].numpy().tobytes()
    assert found.nbytes == sum(found.tensors[name].nbytes for name in tensors) == 88


def test_shards_in_name_order_and_tensors_in_offset_order(sharded: Path) -> None:
    found = open_checkpoint(str(sharded))
    assert [shard.name for shard in found.shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert [[t.name for t in shard.tensors] for shard in found.shards] == [["a", "c"], ["b.weight", "d"]]
    assert found.tensors["c"].nbytes == 0
    first = found.shards[0]
    assert first.tensors[0].start == first.data_start
    assert first.tensors[-1].stop == first.size


def test_links_into_a_hub_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in sharded.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert open_checkpoint(snapshot).fingerprint == open_checkpoint(sharded).fingerprint


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "F32"),
        (torch.bfloat16, "BF16"),
        (torch.float16, "F16"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.float8_e4m3fnuz, "F8_E4M3FNUZ"),
        (torch.float8_e5m2fnuz, "F8_E5M2FNUZ"),
        (torch.float8_e8m0fnu, "F8_E8M0"),
    ],
)
def test_array_is_what_torch_reads(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    value = codes.view(dtype) if dtype.itemsize == 1 and dtype != torch.bool else (codes - 8).to(dtype)
    value = value.reshape(2, -1)
    single(
        tmp_path, raw({"t": entry(0, value.nbytes, name, list(value.shape))}, value.view(torch.uint8).numpy().tobytes())
    )
    got = open_checkpoint(tmp_path).array("t")
    want = value.to(torch.float32 if value.is_floating_point() and dtype != torch.float16 else dtype).numpy()
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_packed_dtypes_are_read_as_bytes_only(tmp_path: Path) -> None:
    found = open_checkpoint(single(tmp_path, raw({"t": entry(0, 4, "F4", [2, 4])}, b"1234")))
    assert found.read("t") == b"1234"
    with pytest.raises(InputError, match="t: packed dtype F4"):
        found.array("t")


def test_fingerprint(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}": torch.randn(40, 50, generator=generator) for i in range(100)}

    def fingerprint(name: str, values: dict[str, torch.Tensor], parts: int, config: str = "{}") -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config)
        weight_map = {}
        for i in range(parts):
            names = list(values)[i::parts]
            save_file({n: values[n] for n in names}, folder / f"{i}.safetensors")
            weight_map |= dict.fromkeys(names, f"{i}.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return open_checkpoint(folder).fingerprint

    original = fingerprint("original", tensors, 1)
    assert original == fingerprint("sharded", tensors, 3, '{"other": 1}')
    assert len(original) == 64
    tuned = {name: value + 1e-3 for name, value in tensors.items()}
    assert original != fingerprint("tuned", tuned, 1)
    assert original != fingerprint("renamed", {**tensors, "more": torch.zeros(1)}, 1)


def test_side_files(sharded: Path) -> None:
    copied = ["tokenizer.json", "modeling_x.py", "chat_template.jinja", "additional_chat_templates/tool.jinja"]
    left = ["pytorch_model.bin", "x.gguf", "consolidated.safetensors", "original/params.json", ".cache/x", "a.pth"]
    left += ["pytorch_model.bin.index.json"]
    for name in copied + left:
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).write_text("x")
    assert open_checkpoint(sharded).side_files == tuple(sorted(copied))


def test_many_tensors_open_in_seconds(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.w1.weight": ("BF16", [2, 2]) for i in range(50_000)}
    folder = write_checkpoint(tmp_path, {}, tensors, shards=8)
    started = os.times().user
    assert len(open_checkpoint(folder).tensors) == 50_000
    assert os.times().user - started < 5


BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated: 0 bytes"),
    "half a length": (b"\1\0\0", "truncated: 3 bytes"),
    "header longer than the file": (struct.pack("<Q", 100) + b"{}", "truncated: 10 bytes, the header alone takes 108"),
    "huge header": (struct.pack("<Q", 2**63), f"more than the limit of {HEADER_CAP}"),
    "not json": (raw(b"{]"), "header: not valid JSON"),
    "not utf-8": (raw(b'{"\xff": 1}'), "header: not valid JSON"),
    "a list": (raw([]), "expected a JSON object, found list"),
    "deep nesting": (raw(b"[" * 200_000), "header: not valid JSON"),
    "a number of many digits": (raw(b'{"t": ' + b"9" * 10_000 + b"}"), "not valid JSON|is not an object"),
    "duplicate key": (raw(b'{"t": 1, "t": 2}'), "duplicate key 't'"),
    "lone surrogate": (raw(b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'), "not valid Unicode"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__ is not a map of strings"),
    "entry is no object": (raw({"t": 3}), "tensor 't': its header entry is not an object"),
    "no dtype": (raw({"t": {"shape": [], "data_offsets": [0, 1]}}), "tensor 't': unknown dtype None"),
    "unknown dtype": (raw({"t": entry(0, 1, "F9")}, b"x"), "tensor 't': unknown dtype 'F9'"),
    "dtype is no name": (raw({"t": entry(0, 1, ["U8"])}, b"x"), "tensor 't': unknown dtype"),
    "negative size": (raw({"t": entry(0, 1, shape=[-1])}, b"x"), r"tensor 't': bad shape \[-1\]"),
    "fractional size": (raw({"t": entry(0, 1, shape=[1.0])}, b"x"), "tensor 't': bad shape"),
    "boolean size": (raw({"t": entry(0, 1, shape=[True])}, b"x"), "tensor 't': bad shape"),
    "no shape": (raw({"t": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "tensor 't': bad shape None"),
    "product overflows": (raw({"t": entry(0, 0, shape=[2**40, 2**40, 0])}), "tensor 't': shape .* overflows"),
    "one offset": (raw({"t": {"dtype": "U8", "shape": [], "data_offsets": [0]}}), "tensor 't': bad data_offsets"),
    "negative offset": (raw({"t": entry(-1, 0)}), "tensor 't': bad data_offsets"),
    "offsets reversed": (raw({"t": entry(4, 2, shape=[2])}, b"1234"), "tensor 't': bad data_offsets"),
    "bytes do not match": (
        raw({"t": entry(0, 4, "F32", [2])}, b"1234"),
        r"F32 \[2\] takes 8 bytes, data_offsets give 4",
    ),
    "half a byte": (raw({"t": entry(0, 1, "F4", [3])}, b"1"), "takes 1.5 bytes, data_offsets give 1"),
    "overlap": (raw({"s": entry(0, 3), "t": entry(2, 4)}, b"1234"), "tensor 't' overlaps the tensor before it"),
    "hole": (raw({"s": entry(0, 1), "t": entry(2, 4)}, b"1234"), "tensor 't' leaves 1 bytes unused"),
    "hole at the start": (raw({"t": entry(1, 4)}, b"1234"), "tensor 't' leaves 1 bytes unused"),
    "truncated data": (raw({"t": entry(0, 4)}, b"123"), r"truncated: \d+ bytes, tensor 't' ends at"),
    "trailing bytes": (raw({"t": entry(0, 4)}, b"12345"), "1 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header(tmp_path: Path, case: str) -> None:
    content, message = BAD_HEADERS[case]
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(single(tmp_path, content))
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_header_cap_is_checked_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = raw({"t": entry(0, 1)}, b"x")
    monkeypatch.setattr(module, "HEADER_CAP", len(content) - 10)
    with pytest.raises(InputError, match="more than the limit"):
        open_checkpoint(single(tmp_path, content))


BAD_INDEXES: dict[str, tuple[Any, str]] = {
    "outside": (
        lambda m: m.update(a="../model.safetensors"),
        "'../model.safetensors', which is not a file of this folder",
    ),
    "absolute": (lambda m: m.update(a="/etc/x.safetensors"), "not a file of this folder"),
    "subfolder": (lambda m: m.update(a="sub/x.safetensors"), "not a file of this folder"),
    "control character": (lambda m: m.update(a="x\n.safetensors"), "not a file of this folder"),
    "pickle": (lambda m: m.update(a="pytorch_model.bin"), "not a safetensors file"),
    "no name": (lambda m: m.update(a=3), "not a safetensors file"),
    "missing shard": (
        lambda m: m.update(a="other.safetensors"),
        r"missing shard other.safetensors \(1 of 3 are missing\)",
    ),
    "unknown key": (
        lambda m: m.update(z="model-00001-of-00002.safetensors"),
        "'z' should be in .* which does not hold it",
    ),
    "other shard": (lambda m: m.update(a="model-00002-of-00002.safetensors"), "'a' should be in .*, but is in"),
    "key left out": (lambda m: m.pop("a"), "'a' of model-00001-of-00002.safetensors is not listed"),
    "empty": (lambda m: m.clear(), "weight_map is missing or empty"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index(sharded: Path, case: str) -> None:
    change, message = BAD_INDEXES[case]
    edit_index(sharded, change)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(sharded)
    assert "\n" not in str(caught.value)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config.json: No such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json: expected a JSON object, found list"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle"):
        open_checkpoint(tmp_path)
    write_shard(tmp_path / "part.safetensors", TENSORS)
    with pytest.raises(InputError, match=r"part.safetensors is there, but neither model.safetensors nor"):
        open_checkpoint(tmp_path)


def test_missing_and_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors: truncated: .* tensor 'd' ends at"):
        open_checkpoint(sharded)
    shard.unlink()
    with pytest.raises(InputError, match=r"missing shard model-00002-of-00002.safetensors \(1 of 2"):
        open_checkpoint(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    write_shard(sharded / "model-00002-of-00002.safetensors", {**TENSORS})
    with pytest.raises(InputError, match=r"tensor 'a' is also in model-00001-of-00002.safetensors"):
        open_checkpoint(sharded)


def test_single_file_beside_an_index(sharded: Path) -> None:
    write_shard(sharded / "model.safetensors", TENSORS)
    with pytest.raises(InputError, match="has both"):
        open_checkpoint(sharded)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        open_checkpoint(tmp_path)


def test_a_shard_that_shrinks_after_opening(sharded: Path) -> None:
    found = open_checkpoint(sharded)
    os.truncate(sharded / found.tensors["d"].shard, found.tensors["d"].start)
    with pytest.raises(InputError, match="d: the file has shrunk"):
        found.read("d")


HEADER, DATA_SIZE = header_of(TENSORS, {"format": "pt"})


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(HEADER) - 1), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 3),
)
def test_mutated_headers_open_equal_or_are_refused(tmp_path: Path, edits: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(HEADER + bytes(DATA_SIZE))
    for position, value in edits:
        content[position] = value
    folder = single(tmp_path, bytes(content[: len(content) - cut]))
    try:
        found = open_checkpoint(folder)
    except InputError:
        return
    shard = found.shards[0]
    assert shard.size == shard.data_start + DATA_SIZE
    position = shard.data_start
    for tensor in shard.tensors:
        assert tensor.start == position
        assert len(found.read(tensor.name)) == tensor.nbytes
        position = tensor.stop
    assert position == shard.size
    if bytes(content[: len(HEADER)]) == HEADER:
        assert {name: (t.dtype, list(t.shape)) for name, t in found.tensors.items()} == TENSORS


names = st.text(min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=3)
dtypes = st.sampled_from(["BF16", "F32", "U8", "F8_E4M3", "I64"])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.dictionaries(names.filter(lambda n: n != "__metadata__"), st.tuples(dtypes, shapes), max_size=6))
def test_any_valid_header_opens_equal(tmp_path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    try:
        "".join(tensors).encode()
    except UnicodeEncodeError:
        return
    found = open_checkpoint(write_checkpoint(tmp_path, {}, tensors))
    assert {name: (t.dtype, list(t.shape)) for name, t in found.tensors.items()} == tensors

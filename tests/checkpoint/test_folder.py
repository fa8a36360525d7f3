import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moekern.checkpoint import header as module
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from tests.helpers.bad_files import entry, raw, single
from tests.helpers.layouts import write_checkpoint

TENSORS = {"a": ("BF16", [4, 8]), "b.weight": ("F32", [3]), "c": ("U8", [0]), "d": ("F8_E4M3", [2, 2])}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", {"model_type": "x"}, TENSORS, shards=2)


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


def test_many_tensors_open_in_seconds(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.w1.weight": ("BF16", [2, 2]) for i in range(50_000)}
    folder = write_checkpoint(tmp_path, {}, tensors, shards=8)
    started = os.times().user
    assert len(open_checkpoint(folder).tensors) == 50_000
    assert os.times().user - started < 5


def test_header_cap_is_checked_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = raw({"t": entry(0, 1)}, b"x")
    monkeypatch.setattr(module, "HEADER_CAP", len(content) - 10)
    with pytest.raises(InputError, match="more than the limit"):
        open_checkpoint(single(tmp_path, content))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_missing_and_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors: truncated: .* tensor 'd' ends at"):
        open_checkpoint(sharded)
    shard.unlink()
    with pytest.raises(InputError, match=r"missing shard model-00002-of-00002.safetensors: not there \(1 of 2"):
        open_checkpoint(sharded)


def test_files_that_only_the_index_knows_are_not_looked_for_one_by_one(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= {f"t{n}": f"{n}.safetensors" for n in range(1000)}
    (sharded / INDEX).write_text(json.dumps(index))
    looked: list[object] = []
    monkeypatch.setattr(os.path, "exists", lambda path: looked.append(path) or True)
    with pytest.raises(InputError, match=r"missing shard 0.safetensors: not there \(1000 of 1002"):
        open_checkpoint(sharded)
    assert len(looked) <= 2


def test_a_shard_that_shrinks_after_opening(sharded: Path) -> None:
    found = open_checkpoint(sharded)
    os.truncate(sharded / found.tensors["d"].shard, found.tensors["d"].start)
    with pytest.raises(InputError, match="d: the file has shrunk"):
        found.read("d")


names = st.text(max_size=12).filter(str.isprintable)
shapes = st.lists(st.integers(0, 4), max_size=3)
dtypes = st.sampled_from(["BF16", "F32", "U8", "F8_E4M3", "I64"])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.dictionaries(names.filter(lambda n: n != "__metadata__"), st.tuples(dtypes, shapes), max_size=6))
def test_any_valid_header_opens_equal(tmp_path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    found = open_checkpoint(write_checkpoint(tmp_path, {}, tensors))
    assert {name: (t.dtype, list(t.shape)) for name, t in found.tensors.items()} == tensors

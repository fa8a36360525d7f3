"""Ranges against numpy on random checkpoints, and the shapes that few families have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern import _C
from moekern.architectures import ExpertTensor, Layout, MoeLayer
from moekern.architectures.id_tables import replace_experts
from moekern.architectures.table import FAMILIES
from moekern.checkpoint.folder import open_checkpoint
from moekern.checkpoint.header import DTYPE_BITS
from moekern.errors import InputError
from moekern.pruning.cuts import strongest
from moekern.pruning.expert_names import Renamer
from moekern.pruning.shards import output_shards
from moekern.router import Router
from tests.helpers.synthetic import EXPERTS, Tensors, data, read_shard, write


def layout_of(tensors: Sequence[ExpertTensor], n_group: int = 1) -> Layout:
    """A model with one MoE layer "0" of 8 experts that holds the given tensors."""
    layer = MoeLayer("0", "model.layers.0", EXPERTS, False, tuple(tensors))
    return Layout(
        family=FAMILIES[0], layers={"0": layer}, mtp={}, mtp_prefixes=(), router=Router(EXPERTS, 2, n_group),
        count_paths=(("num_experts",),), mtp_paths=(),
    )  # fmt: skip


def sliced(name: str, axis: int = 0, rows: int = 1, trailing: int = 0, role: Any = "expert") -> ExpertTensor:
    return ExpertTensor(name, "slice", role, None, name, axis, rows, trailing)


def cut_and_read(folder: Path, tensors: Tensors, layout: Layout, keep: Sequence[int], shards: int = 1) -> Tensors:
    """Write a source, cut it, read the files back; checks the format's rules on the way."""
    checkpoint = open_checkpoint(write(folder / "in", {}, tensors, shards=shards, pad=5))
    found: Tensors = {}
    for shard in output_shards(checkpoint, layout, {"0": tuple(keep)}, "prune"):
        path = folder / shard.name
        _C.write_file(str(path), shard.pieces(checkpoint))
        part, header = read_shard(path)
        assert header.pop("__metadata__") == {"format": "pt"}
        assert path.stat().st_size == len(shard.header()) + shard.data_bytes
        assert len(shard.header()) % 8 == 0
        assert shard.spans() == [tuple(len(shard.header()) + at for at in e["data_offsets"]) for e in header.values()]
        stop = 0
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            bits = DTYPE_BITS[entry["dtype"]]
            assert start == stop
            assert start % max(1, bits // 8) == 0, f"{name} is not aligned"
            assert (end - start) * 8 == int(np.prod(entry["shape"], dtype=np.int64)) * bits
            stop = end
        found |= part
    return found


@pytest.mark.parametrize(
    ("dtype", "shape", "axis", "rows", "trailing"),
    [
        ("BF16", [EXPERTS, 6, 4], 0, 1, 0),
        ("F32", [1, EXPERTS], 1, 1, 0),
        ("F32", [2, EXPERTS], 1, 1, 0),
        ("BF16", [5, EXPERTS], 1, 1, 0),
        ("U8", [3, EXPERTS, 5], 1, 1, 0),
        ("BF16", [EXPERTS * 3, 4], 0, 3, 0),
        ("F32", [EXPERTS + 2, 4], 0, 1, 2),
        ("F32", [EXPERTS + 1], 0, 1, 1),
        ("BF16", [3, EXPERTS * 2 + 1], 1, 2, 1),
        ("F4", [EXPERTS, 3, 2], 0, 1, 0),
        ("BF16", [EXPERTS, 0], 0, 1, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("keep", [(0, 1, 2, 3, 4, 5, 6, 7), (0, 7), (1, 2, 3, 6), (5, 6)], ids=str)
def test_a_slice_keeps_the_rows_of_kept_experts(tmp_path, dtype, shape, axis, rows, trailing, keep):
    rng = np.random.default_rng(1)
    tensors = {"before": data(rng, "BF16", [3]), "t": data(rng, dtype, shape), "after": data(rng, "BF16", [3])}
    found = cut_and_read(tmp_path, tensors, layout_of([sliced("t", axis, rows, trailing)]), keep)

    index = [e * rows + r for e in keep for r in range(rows)] + [EXPERTS * rows + r for r in range(trailing)]
    outer = int(np.prod(shape[:axis], dtype=np.int64))
    whole = np.frombuffer(tensors["t"][2], np.uint8).reshape(outer, shape[axis], -1 if tensors["t"][2] else 0)
    assert found["t"] == (dtype, [*shape[:axis], len(index), *shape[axis + 1 :]], whole[:, index].tobytes())
    assert found["before"] == tensors["before"]
    assert found["after"] == tensors["after"]


def test_a_slice_that_splits_a_byte_is_refused(tmp_path):
    tensors = {"t": data(np.random.default_rng(0), "F4", [EXPERTS, 3])}
    with pytest.raises(InputError, match=r"model.safetensors: t \(F4\): an expert's rows are not whole bytes"):
        cut_and_read(tmp_path, tensors, layout_of([sliced("t")]), (0, 1))


@pytest.mark.parametrize(("shape", "axis"), [([7, 2], 0), ([8], 1), ([8, 9], 1)])
def test_a_shape_without_the_experts_is_refused(tmp_path, shape, axis):
    tensors = {"t": data(np.random.default_rng(0), "F32", shape)}
    with pytest.raises(InputError, match=rf"t has shape .*; expected 8 on axis {axis} for 8 experts"):
        cut_and_read(tmp_path, tensors, layout_of([sliced("t", axis)]), (0, 1))


def test_an_odd_cut_leaves_every_tensor_aligned(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "odd": data(rng, "U8", [EXPERTS, 3]), "a": data(rng, "BF16", [2]), "b": data(rng, "F32", [3]),
        "c": data(rng, "U8", [5]),
    }  # fmt: skip
    found = cut_and_read(tmp_path, tensors, layout_of([sliced("odd")]), (1, 4, 6))
    assert list(found) == ["b", "a", "odd", "c"]
    assert {name: found[name] for name in "abc"} == {name: tensors[name] for name in "abc"}


def test_numbers_past_the_routed_experts_stay_past_them(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"e.{e}.w": data(rng, "U8", [4]) for e in range(EXPERTS + 2)}
    layout = layout_of([ExpertTensor(name, "drop", "expert", e, "e.{}.w") for e, name in enumerate(tensors)])
    found = cut_and_read(tmp_path, tensors, layout, (2, 5, 6))
    assert found == {f"e.{new}.w": tensors[f"e.{old}.w"] for new, old in enumerate((2, 5, 6, 8, 9))}
    rename = Renamer("config.json", tensors, layout, {"0": (2, 5, 6)}, drop_mtp=False)
    assert [rename(f"model.e.{e}.w") for e in (1, 2, 9)] == [(), ("model.e.0.w",), ("model.e.4.w",)]


def test_ranges_that_touch_are_joined(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"e.{e}": data(rng, "U8", [16]) for e in range(EXPERTS)}
    layout = layout_of([ExpertTensor(f"e.{e}", "drop", "expert", e, "e.{}") for e in range(EXPERTS)])
    checkpoint = open_checkpoint(write(tmp_path / "in", {}, tensors, shards=1))
    (shard,) = output_shards(checkpoint, layout, {"0": (0, 1, 2, 5, 6)}, "prune")
    start = checkpoint.shards[0].data_start
    assert [p[1:] for p in shard.pieces(checkpoint)[1:]] == [(start, 48), (start + 80, 32)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_checkpoints_agree_with_numpy(tmp_path_factory, data_):
    seed = data_.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    keep = tuple(sorted(data_.draw(st.sets(st.integers(0, EXPERTS - 1), min_size=1))))
    tensors: Tensors = {}
    roles: list[ExpertTensor] = []
    for i in range(data_.draw(st.integers(1, 12))):
        kind = data_.draw(st.sampled_from(["plain", "slice", "expert"]))
        shape = data_.draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = data_.draw(st.sampled_from(["U8", "BF16", "F32", "I64"]))
        if kind == "plain":
            tensors[f"p{i}"] = data(rng, dtype, shape)
        elif kind == "slice":
            tensors[f"s{i}"] = data(rng, dtype, [EXPERTS, *shape])
            roles.append(sliced(f"s{i}"))
        else:
            for e in range(EXPERTS):
                tensors[f"x{i}.{e}.w"] = data(rng, dtype, shape)
                roles.append(ExpertTensor(f"x{i}.{e}.w", "drop", "expert", e, f"x{i}.{{}}.w"))
    order = data_.draw(st.permutations(list(tensors)))
    tensors = {name: tensors[name] for name in order}
    shards = data_.draw(st.integers(1, min(3, len(tensors))))
    found = cut_and_read(tmp_path_factory.mktemp("cut"), tensors, layout_of(roles), keep, shards)

    want: Tensors = {}
    for name, (dtype, shape, raw) in tensors.items():
        if name.startswith("p"):
            want[name] = dtype, shape, raw
        elif name.startswith("s"):
            size = len(raw) // EXPERTS
            rows = b"".join(raw[e * size : (e + 1) * size] for e in keep)
            want[name] = dtype, [len(keep), *shape[1:]], rows
        elif int(name.split(".")[1]) in keep:
            head, e, tail = name.split(".")
            want[f"{head}.{keep.index(int(e))}.{tail}"] = dtype, shape, raw
    assert found == want


@given(
    keep=st.sets(st.integers(0, 15), min_size=4, max_size=16).map(sorted),
    seed=st.integers(0, 100),
    dtype=st.sampled_from([np.int64, np.int32]),
)
@settings(deadline=None)
def test_a_table_keeps_what_it_can_and_stays_distinct(keep, seed, dtype):
    rng = np.random.default_rng(seed)
    table = np.argsort(rng.random((50, 16)), axis=1)[:, :4].astype(dtype)
    out = replace_experts(table, keep, 16)
    assert out.dtype == dtype
    assert out.min() >= 0
    assert out.max() < len(keep)
    assert all(len(set(row)) == 4 for row in out.tolist())
    for old, new in zip(table.ravel().tolist(), out.ravel().tolist(), strict=True):
        if old in keep:
            assert keep[new] == old


def test_a_table_spreads_the_dropped_experts_over_the_kept():
    table = np.arange(256).repeat(4).reshape(-1, 1)
    out = replace_experts(table, range(128), 256)
    assert np.bincount(out[512:, 0], minlength=128).tolist() == [0] * 64 + [8] * 64
    assert replace_experts(np.array([[1, 0], [3, 1]]), [0, 1], 4).tolist() == [[1, 0], [0, 1]]


def test_the_strongest_experts_come_from_every_group(tmp_path):
    weight = np.zeros((EXPERTS, 4), "<f4")
    weight[:, 0] = [8, 7, 6, 5, -4, 1, 1, 0]
    tensors: Tensors = {"gate": ("F32", [EXPERTS, 4], weight.tobytes()), "turned": ("F32", [4, 8], weight.T.tobytes())}
    checkpoint = open_checkpoint(write(tmp_path / "in", {}, tensors, shards=1))
    for tensor in (sliced("gate", role="router"), sliced("turned", 1, role="router")):
        layer = layout_of([tensor]).layers["0"]
        assert strongest(checkpoint, layer, 4, 1) == (0, 1, 2, 3)
        assert strongest(checkpoint, layer, 4, 2) == (0, 1, 4, 5)
    with pytest.raises(InputError, match="no router is known to rank its experts by; use --mtp drop or --mtp keep"):
        strongest(checkpoint, layout_of([sliced("gate")]).layers["0"], 4, 1)


def test_metadata_and_names_survive_any_alphabet(tmp_path):
    tensors = {"größe.☃": data(np.random.default_rng(0), "U8", [3])}
    assert cut_and_read(tmp_path, tensors, layout_of([]), (0,)) == tensors
    assert json.loads((tmp_path / "model.safetensors").read_bytes()[8:-3])["größe.☃"]["shape"] == [3]

"""The checkpoints that streaming is timed on are the published ones, and all its roads end at the same tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from bench import checkpoints, roads, streaming
from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.plan.document import Plan
from moekern.plan.fits_model import check_plan
from moekern.pruning.prune import prune
from tests.helpers import synthetic

# Tensors, parameters and files that others count in the published checkpoints; bytes follow from dtypes and shapes.
PUBLISHED = {
    "deepseek-v3": (91_991, 684_531_386_000, 163, 688_574_839_360),
    "kimi-k2": (139_644, 1_026_470_731_056, 61, 1_029_173_256_720),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    whole = checkpoints.MODELS[name]()
    assert (len(whole.tensors), whole.elements, len(whole.shards), whole.nbytes) == PUBLISHED[name]
    assert sum(map(len, whole.shards.values())) == len(whole.tensors)


def test_shards_have_the_published_sizes() -> None:
    """In the rounded-up GiB of a listing; the others have 4.1."""
    tenths = {}
    for number, tensors in enumerate(checkpoints.deepseek_v3().shards.values(), 1):
        tenths[number] = -(-10 * sum(map(checkpoints.nbytes, tensors.values())) // 2**30)
    odd = {1: 49, 12: 13, 34: 17, 56: 17, 78: 17, 100: 17, 122: 17, 141: 30, 160: 49, 163: 62}
    assert tenths == {**dict.fromkeys(range(1, 164), 41), **odd}


@pytest.mark.parametrize(
    ("name", "layers", "experts", "mtp"), [("deepseek-v3", 4, 256, ["4"]), ("kimi-k2", 3, 384, [])]
)
def test_a_sparse_checkpoint_is_valid_and_recognised(
    tmp_path: Path, name: str, layers: int, experts: int, mtp: list[str]
) -> None:
    blueprint = checkpoints.MODELS[name](layers)
    folder = checkpoints.write(tmp_path / "model", blueprint)
    for shard, tensors in blueprint.shards.items():
        with safe_open(folder / shard, framework="np") as file:
            assert set(file.keys()) == set(tensors)
            for key, (dtype, shape) in tensors.items():
                assert (file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()) == (dtype, list(shape))
    assert streaming.on_disk(folder) < 1e-3 * blueprint.nbytes

    checkpoint = open_checkpoint(folder)
    sizes = {key: checkpoints.nbytes(tensor) for key, tensor in blueprint.tensors.items()}
    assert {key: entry.nbytes for key, entry in checkpoint.tensors.items()} == sizes
    layout = find_layout(checkpoint)
    first = 3 if mtp else 1
    assert (layout.family.name, layout.num_experts, list(layout.mtp)) == ("deepseek_v3", experts, mtp)
    assert list(layout.layers) == [str(number) for number in range(first, layers)]

    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(checkpoints.half_plan(blueprint)))
    check_plan(Plan.load(plan), layout, checkpoint.fingerprint)
    assert {len(layer.keep) for layer in Plan.load(plan).layers.values()} == {experts // 2}


def test_the_fingerprint_of_many_tensors_is_by_its_definition(tmp_path: Path) -> None:
    blueprint = checkpoints.kimi_k2(3)
    rows = [[name, *tensor] for name, tensor in sorted(blueprint.tensors.items())]
    digest = hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode())
    for number in range(64):
        name = rows[number * len(rows) // 64][0]
        digest.update(bytes(min(4096, checkpoints.nbytes(blueprint.tensors[name]))))  # its data are zeros
    assert open_checkpoint(checkpoints.write(tmp_path / "model", blueprint)).fingerprint == digest.hexdigest()


def test_the_dense_checkpoint_has_real_shapes_and_fits(tmp_path: Path) -> None:
    size = 3 * 10**9
    blueprint = checkpoints.qwen3_moe(size)
    assert size / 2 < blueprint.nbytes <= size
    assert len(blueprint.shards) == 3
    checkpoint = open_checkpoint(checkpoints.write(tmp_path / "model", blueprint))
    assert checkpoint.tensors["model.layers.1.mlp.experts.127.down_proj.weight"].shape == (2048, 768)
    assert (find_layout(checkpoint).family.name, find_layout(checkpoint).num_experts) == ("qwen3_moe", 128)


def test_random_pieces_are_as_long_as_asked_and_repeatable() -> None:
    size = checkpoints.CHUNK + 5
    data = b"".join(checkpoints.random_pieces(size, seed=1))
    assert len(data) == size
    assert data == b"".join(checkpoints.random_pieces(size, seed=1))
    assert data[:64] != b"".join(checkpoints.random_pieces(64, seed=2))


@pytest.mark.parametrize("road", ["load_file + save_file", "safe_open + save_file"])
def test_scripts_make_what_moekern_makes(tmp_path: Path, road: str) -> None:
    source = synthetic.write(tmp_path / "model", *synthetic.qwen3())
    plan, ours = tmp_path / "plan.json", tmp_path / "ours"
    keep = {"0": {"keep": [0, 3, 5, 7]}, "1": {"keep": [1, 2, 4, 6]}}
    plan.write_text(json.dumps({"format": "moekern.plan/1", "layers": keep}))
    prune(source, Plan.load(plan), ours)
    roads.prepared(road, [str(path) for path in (source, plan, tmp_path / "theirs", ours)])()
    assert synthetic.read(tmp_path / "theirs") == synthetic.read(ours)
    assert open_checkpoint(tmp_path / "theirs").config["num_experts"] == 4


@pytest.mark.parametrize("road", ["cp", "raw ring"])
def test_raw_copies_copy(tmp_path: Path, road: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    sizes = (0, 5, roads.CHUNK, roads.BUFFERS * roads.CHUNK + 1)
    for number, size in enumerate(sizes):
        (raw / str(number)).write_bytes(b"".join(checkpoints.random_pieces(size, seed=number)))
    roads.prepared(road, ["", "", str(tmp_path / "out"), str(raw)])()
    assert synthetic.tree(tmp_path / "out") == synthetic.tree(raw)


def test_a_ratio_compares_runs_of_the_same_round() -> None:
    def runs(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": s, "rss_before_mib": 1.0, "rss_mib": 10.0 * s} for s in seconds]

    times = {"cp": runs(1.0, 2.0, 9.0), "moekern": runs(2.0, 2.0, 3.0), "load_file + save_file": runs(4.0, 4.0, 4.0)}
    line = {line["road"]: line for line in streaming.summary(times, 10**9, {})}["moekern"]
    assert (line["seconds"], line["gb_s"], line["s_per_100_gb"], line["rss_mib"]) == (2.0, 0.5, 200.0, 30.0)
    assert line["of_cp"] == 1.0  # the median of 1/2, 2/2 and 9/3
    assert line["over_save_file"] == 2.0

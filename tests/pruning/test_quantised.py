"""Every quantised layout, pruned and compared bit by bit, both sides read by the safetensors library."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors import deserialize

from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.verification.tensors import verify
from tests.helpers.quantised_layouts import EXPERTS, INDEXED, LAYOUTS, indexed, write_spread
from tests.helpers.synthetic import Tensors, gpt_oss_mxfp4, shard_bytes

KEEP = {"0": (1, 2, 5, 7), "1": (0, 3, 4, 6)}
PLAN = Plan({key: LayerPlan(keep) for key, keep in KEEP.items()}, {})
ROWS = re.compile(r"model\.layers\.(\d)\.mlp\.(?:gate|router|experts)\b.*")

Library = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype, shape and bytes, as the library reads them


def library_read(folder: Path) -> Library:
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in deserialize(path.read_bytes())
    }


def expected(source: Library) -> Library:
    """The pruned checkpoint, one tensor and one expert at a time."""
    want = {}
    for name, (dtype, shape, raw) in source.items():
        expert, rows = INDEXED.fullmatch(name), ROWS.fullmatch(name)
        if expert:
            keep = KEEP[expert[1]]
            if int(expert[2]) in keep:
                new = keep.index(int(expert[2]))
                want[f"model.layers.{expert[1]}.mlp.experts.{new}.{expert[3]}"] = dtype, shape, raw
        elif rows:
            size = len(raw) // EXPERTS
            kept = b"".join(raw[e * size : (e + 1) * size] for e in KEEP[rows[1]])
            want[name] = dtype, (4, *shape[1:]), kept
        else:
            want[name] = dtype, shape, raw
    return want


def metadata_of(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


def check(folder: Path, out: Path) -> Library:
    source = library_read(folder)
    prune(folder, PLAN, out)
    got = library_read(out)
    assert got == expected(source)
    assert verify(folder, PLAN, out).problems == ()
    return got


@pytest.mark.parametrize("pad", [0, 1, 4101])  # spaces behind the header, whose length is any, as of old writers
@pytest.mark.parametrize("layout", LAYOUTS)
def test_companions_go_with_their_expert(tmp_path: Path, layout: str, pad: int) -> None:
    folder = write_spread(tmp_path / "in", *indexed(layout), shards=2, pad=pad)
    got = check(folder, tmp_path / "out")
    assert sum(INDEXED.fullmatch(name) is not None for name in got) == 2 * 4 * 3 * len(LAYOUTS[layout])
    for path in folder.glob("*.safetensors"):
        assert metadata_of(tmp_path / "out" / path.name) == metadata_of(path)


@pytest.mark.parametrize("pad", [0, 1])
def test_stacked_blocks_scales_and_biases_are_cut_by_expert(tmp_path: Path, pad: int) -> None:
    got = check(write_spread(tmp_path / "in", *gpt_oss_mxfp4(), shards=3, pad=pad), tmp_path / "out")
    stacked = [shape for name, (_, shape, _) in got.items() if ".experts." in name]
    assert len(stacked) == 2 * 2 * 3
    assert {shape[0] for shape in stacked} == {4}


def test_each_expert_in_a_shard_of_its_own(tmp_path: Path) -> None:
    """Half of the shards lose every tensor; the rest are numbered anew."""
    config, tensors = indexed("modelopt_nvfp4")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    parts: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        found = INDEXED.fullmatch(name)
        parts.setdefault(f"{found[1]}{found[2]}" if found else "rest", {})[name] = tensor
    weight_map = {}
    for i, part in enumerate(parts.values(), 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        (folder / file).write_bytes(shard_bytes(part, {"format": "pt"}))
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check(folder, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00009.safetensors" for i in range(1, 10)]

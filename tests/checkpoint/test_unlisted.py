"""Files that the index does not name, and tensors that two files hold."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.errors import InputError
from tests.helpers.layouts import write_checkpoint, write_shard

Tensors = Mapping[str, tuple[str, list[int]]]

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "x", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
LISTED = {f"model.layers.{i}.{name}": ("BF16", [4]) for i in (0, 1) for name in ("a", "b")}
MTP = {f"model.layers.2.{name}": ("BF16", [4]) for name in ("a", "eh_proj.weight")}
OTHER_MTP = {"mtp.layers.0.a": ("BF16", [4])}


def opened(folder: Path, extra: Tensors, config: Mapping[str, Any] = CONFIG, shards: int = 2) -> Checkpoint:
    write_checkpoint(folder, config, LISTED, shards)
    write_shard(folder / "model-mtp.safetensors", extra)
    return open_checkpoint(folder)


@pytest.mark.parametrize("mtp", [MTP, OTHER_MTP], ids=["next layer", "named mtp"])
@pytest.mark.parametrize("shards", [1, 2])
def test_an_mtp_layer_in_a_file_of_its_own_is_taken(tmp_path: Path, mtp: Tensors, shards: int) -> None:
    found = opened(tmp_path, mtp, shards=shards)
    assert found.tensors.keys() == LISTED.keys() | mtp.keys()
    assert [shard.name for shard in found.shards][-1 if shards == 2 else 0] == "model-mtp.safetensors"
    assert found.notes == ("model-mtp.safetensors: no index names it; taken for the MTP layer that config.json counts",)
    assert not found.strays


@pytest.mark.parametrize(
    ("extra", "config"),
    [
        (MTP, {**CONFIG, "num_nextn_predict_layers": 0}),
        (MTP, {**CONFIG, "num_hidden_layers": 3}),
        ({"vision.a": ("BF16", [4])}, CONFIG),
    ],
    ids=["config counts none", "no next layer", "other tensors"],
)
def test_other_weights_are_left_out_and_named(tmp_path: Path, extra: Tensors, config: dict[str, Any]) -> None:
    found = opened(tmp_path, extra, config)
    assert found.tensors.keys() == LISTED.keys()
    assert found.contents.left_out == {"model-mtp.safetensors": "weights that the index does not name"}


def test_where_the_index_lists_an_mtp_layer_another_is_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, LISTED | MTP, 2)
    write_shard(tmp_path / "more.safetensors", {"model.layers.3.a": ("BF16", [4])})
    found = open_checkpoint(tmp_path)
    assert found.contents.left_out == {"more.safetensors": "weights that the index does not name"}


def test_second_copies_adapters_and_broken_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, LISTED, 2)
    write_shard(tmp_path / "copy.safetensors", LISTED)
    (tmp_path / "consolidated-1.safetensors").write_bytes(b"")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    assert open_checkpoint(tmp_path).contents.left_out == {
        "adapter_model.safetensors": "an adapter, made for all experts",
        "broken.safetensors": "not named by the index, and not readable",
        "consolidated-1.safetensors": "a second copy of the weights",
        "copy.safetensors": "a second copy of the weights",
    }


def test_an_mtp_layer_among_other_tensors_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model-mtp.safetensors: no index names it, .* MTP .* weight_map"):
        opened(tmp_path, MTP | {"vision.a": ("BF16", [4])})


def overlaid(folder: Path, name: str) -> Path:
    """The index sends one tensor to a file of this name; the shard still holds the old one."""
    write_checkpoint(folder, CONFIG, LISTED, 2)
    write_shard(folder / name, {"model.layers.0.a": ("F32", [4])})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.0.a"] = name
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_an_overlay_that_index_and_order_agree_on_supersedes(tmp_path: Path) -> None:
    found = open_checkpoint(overlaid(tmp_path, "model-overlay.safetensors"))
    assert found.tensors["model.layers.0.a"].dtype == "F32"
    assert found.nbytes == sum(entry.nbytes for entry in found.tensors.values()) == 16 + 3 * 8
    assert sorted(t.name for shard in found.shards for t in shard.tensors) == sorted(LISTED)
    (note,) = found.notes
    assert note.startswith("model-overlay.safetensors: supersedes what model-00001-of-00002.safetensors holds")


def test_an_overlay_that_loaders_disagree_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model-00001-of-00002.safetensors: tensor 'model.layers.0.a' is also in a"):
        open_checkpoint(overlaid(tmp_path, "abliterated.safetensors"))


def test_transformers_reads_the_overlay_too(tmp_path: Path) -> None:
    """The rule is the loader's: of the files that the index names, the last in name order has the say."""
    from transformers.utils.hub import get_checkpoint_shard_files

    files, _ = get_checkpoint_shard_files(str(tmp_path), str(overlaid(tmp_path, "model-overlay.safetensors") / INDEX))
    assert Path(files[-1]).name == "model-overlay.safetensors"

"""What comes along with the weights, what does not, and what is said about it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moekern.errors import InputError
from moekern.estimation.overview import overview
from moekern.plan.document import LayerPlan, Mtp, Plan
from moekern.pruning.prune import prune
from moekern.verification.tensors import verify
from tests.helpers.commands import moekern
from tests.helpers.synthetic import deepseek_v3, qwen3, read, shard_bytes, tree, write

PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))}, {"criterion": "test"})
MTP_PLAN = Plan({"1": LayerPlan((0, 3, 5, 6)), "2": LayerPlan((1, 2, 4, 7))})  # of deepseek_v3()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write(tmp_path / "in", *qwen3())
    (folder / "tokenizer.json").write_text("{}")
    return folder


def add(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_folders_come_along_and_weights_in_them_are_named(source: Path, tmp_path: Path) -> None:
    add(source, encoding__encode_dot_py="x = 1\n", encoding__v_dot_npz="n", original__model_dot_safetensors="w")
    add(source, adapter_config_dot_json="{}", adapter_model_dot_safetensors="a", params_dot_json='{"moe": {}}')
    report = prune(source, PLAN, tmp_path / "out")
    assert (tmp_path / "out/encoding/encode.py").read_text() == "x = 1\n"
    names = {"adapter_config.json", "adapter_model.safetensors", "encoding/v.npz", "original/", "params.json"}
    assert report.left_out.keys() == names
    assert not any((tmp_path / "out" / name).exists() for name in names)
    found = verify(source, PLAN, tmp_path / "out")
    assert found.problems == ()
    assert found.left_out == report.left_out
    add(tmp_path / "out", adapter_config_dot_json="{}")
    assert verify(source, PLAN, tmp_path / "out").problems == ("adapter_config.json: should not be there",)


def test_the_summary_and_the_document_tell_what_was_not_copied(source: Path, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    add(source, pytorch_model_dot_bin="p", README_dot_md="128 experts")
    done = moekern("prune", source, tmp_path / "plan.json", "--out", tmp_path / "a")
    assert "not copied: pytorch_model.bin (the weights in another form)" in " ".join(done.stderr.split())
    assert "the original's card, as it was, is README.original.md" in " ".join(done.stderr.split())
    done = moekern("prune", source, tmp_path / "plan.json", "--out", tmp_path / "b", "--json")
    document = json.loads(done.stdout)
    assert document["left_out"] == {"pytorch_model.bin": "the weights in another form"}
    assert [note for note in document["notes"] if note.startswith("README.md")]
    done = moekern("verify", source, tmp_path / "plan.json", tmp_path / "b")
    assert "pytorch_model.bin" in done.stderr


@pytest.mark.parametrize("card", [b"---\nlicense: mit\n---\n# Model\n", b"\xff\xfe odd", b""])
def test_the_original_card_stays_as_it_is_beside_the_new_one(source: Path, tmp_path: Path, card: bytes) -> None:
    add(source, README_dot_md=card)
    prune(source, PLAN, tmp_path / "out")
    assert (tmp_path / "out/README.original.md").read_bytes() == card
    assert PLAN.digest in (tmp_path / "out/README.md").read_text()
    assert verify(source, PLAN, tmp_path / "out").problems == ()
    with (tmp_path / "out/README.md").open("a") as file:
        file.write("what a person has to say\n")
    assert verify(source, PLAN, tmp_path / "out").problems == ()
    assert prune(source, PLAN, tmp_path / "out", again=True).already
    (tmp_path / "out/README.md").write_text("of another plan")
    (tmp_path / "out/README.original.md").write_bytes(card + b"!")
    assert verify(source, PLAN, tmp_path / "out").problems == (
        "README.original.md: differs from the source's", f"README.md: does not name the plan (sha256 {PLAN.digest})",
    )  # fmt: skip


def test_a_model_pruned_twice_keeps_both_cards(source: Path, tmp_path: Path) -> None:
    add(source, README_dot_md="text", recipe_dot_yaml="of a quantiser", moekern_recipe_dot_yaml="of another run")
    prune(source, PLAN, tmp_path / "once")
    again = Plan({"0": LayerPlan((0, 1)), "1": LayerPlan((2, 3))})
    prune(tmp_path / "once", again, tmp_path / "twice")
    assert (tmp_path / "twice/README.original.md").read_text() == "text"
    assert (tmp_path / "twice/README.original-2.md").read_text() == (tmp_path / "once/README.md").read_text()
    assert again.digest in (tmp_path / "twice/README.md").read_text()
    assert not (tmp_path / "twice/moekern_recipe.yaml").exists()
    assert (tmp_path / "twice/recipe.yaml").read_text() == "of a quantiser"
    assert verify(tmp_path / "once", again, tmp_path / "twice").problems == ()


def test_a_link_out_of_the_checkpoint_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (source / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"'special_tokens_map.json': a link out of the checkpoint, to '/"):
        prune(source, PLAN, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "secret"]


def changed(path: Path) -> None:
    path.write_text("[]")
    os.utime(path, ns=(1, 1))


def cut_short(path: Path) -> None:
    os.truncate(path, 1)


@pytest.mark.parametrize("change", [changed, cut_short, Path.unlink])
def test_a_side_file_that_changes_while_it_is_copied(
    source: Path, tmp_path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = sys.modules["moekern.pruning.writing"]
    write_side_files = module._write_side_files

    def first(*arguments: Any) -> None:
        change(source / "tokenizer.json")
        write_side_files(*arguments)

    monkeypatch.setattr(module, "_write_side_files", first)
    with pytest.raises(InputError, match=r"out: not finished: .*tokenizer\.json"):
        prune(source, PLAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    add(source, tokenizer_dot_json="[1]")
    prune(source, PLAN, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "[1]"
    assert verify(source, PLAN, tmp_path / "out").problems == ()


@pytest.mark.parametrize("shards", [1, 3])
def test_an_mtp_layer_that_no_index_names_comes_along(tmp_path: Path, shards: int) -> None:
    config, tensors = deepseek_v3()
    mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")}
    whole = write(tmp_path / "whole", config, tensors)
    prune(whole, MTP_PLAN, tmp_path / "want")
    rest = {name: tensor for name, tensor in tensors.items() if name not in mtp}
    apart = write(tmp_path / "apart", config, rest, shards)
    (apart / "mtp.safetensors").write_bytes(shard_bytes(mtp, {"format": "pt"}))
    report = prune(apart, MTP_PLAN, tmp_path / "out")
    assert read(tmp_path / "out") == read(tmp_path / "want")
    assert any(note.startswith("mtp.safetensors: ") for note in report.notes)
    assert report.mtp.startswith("MTP layer 3: 4 experts kept")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert any(name.startswith("model.layers.3.") for name in index)
    assert verify(apart, MTP_PLAN, tmp_path / "out").problems == ()


def test_a_model_without_mtp_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", *deepseek_v3(mtp=False))
    assert prune(folder, MTP_PLAN, tmp_path / "out", mtp="drop").mtp == "no MTP layer has experts"


@pytest.mark.parametrize("mtp", ["prune", "drop"])
def test_mtp_layers_that_only_the_config_has_are_told(tmp_path: Path, mtp: Mtp) -> None:
    config, tensors = deepseek_v3(mtp=False)
    folder = write(tmp_path / "in", config | {"mtp_num_layers": 1}, tensors)
    report = prune(folder, MTP_PLAN, tmp_path / "out", mtp=mtp)
    first, *others = report.notes
    assert first == "config.json: num_nextn_predict_layers is 1, but the files hold no MTP layers"
    left = "config.json: may count the MTP layers that are gone; left as it is: mtp_num_layers"
    assert others == ([left] if mtp == "drop" else [])
    assert overview(folder).notes == report.notes[:1]
    config, tensors = deepseek_v3()
    folder = write(tmp_path / "one", config | {"num_nextn_predict_layers": 2}, tensors)
    assert overview(folder).notes == ("config.json: num_nextn_predict_layers is 2, but the files hold 1 MTP layers",)
    assert overview(write(tmp_path / "right", *deepseek_v3())).notes == ()


def test_an_overlay_supersedes_in_the_pruned_model(source: Path, tmp_path: Path) -> None:
    """Also where a run is taken over that began before the overlay was there."""
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    old = read(source)

    def enough(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, PLAN, tmp_path / "out", progress=enough)
    new = old[name][0], old[name][1], bytes(len(old[name][2]))
    (source / "model-overlay.safetensors").write_bytes(shard_bytes({name: new}, {"format": "pt"}))
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = "model-overlay.safetensors"
    index.write_text(json.dumps(content))
    report = prune(source, PLAN, tmp_path / "out")
    assert read(tmp_path / "out")[name.replace("experts.3", "experts.2")] == new
    assert any("supersede" in note for note in report.notes)
    assert verify(source, PLAN, tmp_path / "out").problems == ()
    prune(source, PLAN, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")

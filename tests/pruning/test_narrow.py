"""Plans that take channels from experts: bytes, config, and what the result computes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekern.architectures import find_layout
from moekern.architectures.widths import narrow_problem
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.team import Part
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families
from tests.helpers.in_flight import REFUSED
from tests.helpers.narrow import narrow_plan

MakeCheckpoint = Callable[[str], Path]
WIDTH = 16
SOME = ("qwen3_moe", "gpt_oss", "deepseek_v3", "dbrx", "longcat_flash", "aria", "jetmoe", "granitemoe", "nemotron_h")
NAMES = [
    pytest.param(name, marks=[] if name in SOME else [pytest.mark.whole])
    for name in families.FAMILIES
    if name not in REFUSED
]


def planned(folder: Path, width: int = WIDTH) -> Plan:
    layout = find_layout(open_checkpoint(folder))
    half = layout.num_experts // 2
    step = layout.num_experts // layout.n_group
    keep = tuple(e for e in range(layout.num_experts) if e % step >= step - half // layout.n_group)
    return narrow_plan(layout, keep, width, seed=3)


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_checkpoint_computes_what_the_masked_original_does(
    name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = family_checkpoint(name)
    checkpoint = open_checkpoint(source)
    layout = find_layout(checkpoint)
    plan = planned(source)
    problem = narrow_problem(checkpoint, layout)
    if problem is not None:
        with pytest.raises(InputError, match="take a plan of whole experts"):
            prune(source, plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    mtp = "drop" if layout.mtp_prefixes else "prune"
    report = prune(source, plan, tmp_path / "out", mtp=mtp)
    assert (report.channels_before, report.channels_after) == (24, WIDTH)
    assert verify(source, plan, tmp_path / "out").problems == ()
    found = find_layout(open_checkpoint(tmp_path / "out"))
    assert (found.width, found.num_experts) == (WIDTH, len(plan.layers[next(iter(plan.layers))].keep))
    if not layout.family.only_pruned:
        assert compare_forward(source, plan, tmp_path / "out").equal


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def source(family_checkpoint: MakeCheckpoint) -> Path:
    return family_checkpoint("deepseek_v3")


def test_shared_experts_follow_with_zeros_behind_them(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    times = config["n_shared_experts"]
    prune(source, planned(source), tmp_path / "out", mtp="drop")
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert (after["moe_intermediate_size"], after["n_shared_experts"]) == (WIDTH, -(-times * 24 // WIDTH))
    name = next(n for n in open_checkpoint(source).tensors if n.endswith("shared_experts.down_proj.weight"))
    before, new = (everything(folder)[name] for folder in (source, tmp_path / "out"))
    assert new.shape[1] == WIDTH * after["n_shared_experts"] > before.shape[1]
    assert torch.equal(new[:, : before.shape[1]], before)
    assert not new[:, before.shape[1] :].any()


SPOIL = {
    "a channel": ("experts.1.down_proj.weight", lambda t: t[:, [1, 0, *range(2, t.shape[1])]]),
    "a row": ("experts.0.up_proj.weight", lambda t: t[[1, 0, *range(2, len(t))]]),
    "what follows": ("shared_experts.down_proj.weight", lambda t: t + torch.eye(*t.shape).flip(1)),
}


@pytest.mark.parametrize("what", SPOIL)
def test_verify_finds_what_is_not_the_channels_of_the_plan(what: str, source: Path, tmp_path: Path) -> None:
    plan, (ending, change) = planned(source), SPOIL[what]
    prune(source, plan, tmp_path / "out", mtp="drop")
    name = next(n for n in everything(tmp_path / "out") if n.endswith(ending))
    file = next(path for path in (tmp_path / "out").glob("*.safetensors") if name in load_file(path))
    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file, {"format": "pt"})
    problems = verify(source, plan, tmp_path / "out").problems
    assert any(line.startswith(f"{name}: ") for line in problems)


def test_verify_finds_another_width_in_the_config(source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    prune(source, plan, tmp_path / "out", mtp="drop")
    path = tmp_path / "out/config.json"
    path.write_text(path.read_text().replace(f'"moe_intermediate_size": {WIDTH}', '"moe_intermediate_size": 24'))
    assert any(
        "moe_intermediate_size is 24, expected 16" in line for line in verify(source, plan, path.parent).problems
    )


def test_parts_and_shards_of_a_new_size_hold_the_same(source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    prune(source, plan, tmp_path / "whole", mtp="drop")
    for number in (1, 2):
        prune(source, plan, tmp_path / "parts", mtp="drop", part=Part(number, 2))
    prune(source, plan, tmp_path / "small", mtp="drop", max_shard_size=20_000, checksum="blake3")
    whole, parts = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.safetensors")} for n in ("whole", "parts"))
    assert parts == whole
    assert verify(source, plan, tmp_path / "small").problems == ()


def test_mtp_layers_keep_their_strongest_channels_or_go(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = mtp_source(family_checkpoint)
    plan = planned(source)
    report = prune(source, plan, tmp_path / "out")
    assert f"the {WIDTH} channels with the largest weights" in report.mtp
    assert verify(source, plan, tmp_path / "out").problems == ()
    with pytest.raises(InputError, match="--mtp keep: config.json has one width for all layers"):
        prune(source, plan, tmp_path / "kept", mtp="keep")


def mtp_source(family_checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint whose MTP layer is a copy of its last one."""
    source = family_checkpoint("glm4_moe")
    tensors = everything(source)
    last = max(int(n.split(".")[2]) for n in tensors if n.startswith("model.layers."))
    more = {n.replace(f"layers.{last}.", f"layers.{last + 1}."): t.clone() for n, t in tensors.items()
            if f"layers.{last}." in n}  # fmt: skip
    folder = source.with_name(f"{source.name}-mtp")
    folder.mkdir(exist_ok=True)
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}, indent=2))
    return folder


def test_channels_that_experts_do_not_have_are_one_line(source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    key, layer = next(iter(plan.layers.items()))
    assert layer.channels is not None
    wrong = replace(layer, channels=(*layer.channels[:-1], "0" * 6 + "ffff"))
    with pytest.raises(InputError, match=f"layer {key}: channel 39 is out of range; experts have 0 to 23"):
        prune(source, Plan({**plan.layers, key: wrong}), tmp_path / "out")
    lacking = LayerPlan(layer.keep)
    last = list(plan.layers)[-1]
    with pytest.raises(InputError, match=f"layer {last}: says nothing of channels"):
        prune(source, Plan({**plan.layers, last: lacking}), tmp_path / "out")

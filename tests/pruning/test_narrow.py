"""Plans that take channels from experts: bytes, config, and what the result computes."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moekern.architectures import find_layout
from moekern.architectures.widths import narrow_problem
from moekern.checkpoint.folder import open_checkpoint
from moekern.errors import InputError
from moekern.plan.channels import channel_ids, channel_text
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.narrow import strongest_channels
from moekern.pruning.prune import MANIFEST, prune
from moekern.pruning.shards import bytes_after
from moekern.team import Part
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families, synthetic
from tests.helpers.faulty import Bench, benches_in_memory, finished, nothing_or_all
from tests.helpers.in_flight import REFUSED
from tests.helpers.layouts import GUD, moe_keys, write_checkpoint
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
    asked = replace(plan, provenance={**plan.provenance, "mtp": mtp})
    assert bytes_after(checkpoint, layout, asked) == open_checkpoint(tmp_path / "out").nbytes
    assert (found.width, found.num_experts) == (WIDTH, len(plan.layers[next(iter(plan.layers))].keep))
    if not layout.family.only_pruned:
        assert compare_forward(source, plan, tmp_path / "out").equal


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def plain(ids: np.ndarray) -> np.ndarray:
    return ids


def halves(ids: np.ndarray) -> np.ndarray:
    return np.concatenate([ids, ids + 24])


def alternating(ids: np.ndarray) -> np.ndarray:
    return np.array([place for c in ids for place in (2 * c, 2 * c + 1)])


# Of a family's tensors: the axis of one expert's part on which channels lie, and their places there.
FORMS: dict[str, dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]]] = {
    "qwen3_moe": {"gate_proj": (0, plain), "up_proj": (0, plain), "down_proj": (1, plain)},
    "gpt_oss": {"gate_up_proj": (1, alternating), "gate_up_proj_bias": (0, alternating), "down_proj": (0, plain)},
    "aria": {"fc1": (1, halves), "fc2": (0, plain)},
    "granitemoe": {"input_linear": (0, halves), "output_linear": (1, plain)},
    "dbrx": {"w1": (0, plain), "v1": (0, plain), "w2": (0, plain)},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_cut_byte_by_byte(name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Against the plan written out in numpy."""
    source = family_checkpoint(name)
    plan, before = planned(source), {key: value.numpy() for key, value in everything(source).items()}
    prune(source, plan, tmp_path / "out")
    after, seen = {key: value.numpy() for key, value in everything(tmp_path / "out").items()}, 0
    for key, value in before.items():
        parts = key.removesuffix(".weight").split(".")
        form = FORMS[name].get(parts[-1])
        if form is None or not {"experts", "block_sparse_moe"} & {*parts}:
            continue
        layer = plan.layers[next(part for part in parts if part.isdecimal())]
        channels = {e: form[1](channel_ids(text)) for e, text in zip(layer.keep, layer.channels or (), strict=True)}
        if parts[-2].isdecimal():
            expert = int(parts[-2])
            if expert not in layer.keep:
                continue
            new = key.replace(f"experts.{expert}.", f"experts.{layer.keep.index(expert)}.")
            want = value.take(channels[expert], form[0])
        else:
            own = value.reshape(8, 24, 32) if name == "dbrx" else value
            new, want = key, np.stack([own[e].take(channels[e], form[0]) for e in layer.keep])
            want = want.reshape(-1, 32) if name == "dbrx" else want
        assert after[new].shape == want.shape
        assert after[new].tobytes() == want.tobytes()
        seen += 1
    assert seen == len(FORMS[name]) * len(plan.layers) * (4 if name == "qwen3_moe" else 1)


def test_a_plan_that_names_all_channels_moves_the_bytes_that_one_of_whole_experts_does(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Ranges of the source, nothing that is made; the MTP layers too."""
    source = family_checkpoint("deepseek_v3")
    narrow = planned(source, 24)
    plain = Plan({key: replace(layer, channels=None) for key, layer in narrow.layers.items()})
    for name, plan in {"narrow": narrow, "plain": plain}.items():
        prune(source, plan, tmp_path / name)
        assert verify(source, plan, tmp_path / name).problems == ()
    made = {name: (tmp_path / name / MANIFEST).read_text().splitlines() for name in ("narrow", "plain")}
    computed = {name: [json.loads(line).get("computed") for line in lines] for name, lines in made.items()}
    assert computed["narrow"] == computed["plain"]
    for path in (tmp_path / "plain").iterdir():
        if path.suffix == ".safetensors" or path.name == "config.json":
            assert path.read_bytes() == (tmp_path / "narrow" / path.name).read_bytes()


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


def test_files_that_say_how_wide_the_originals_experts_are_are_told(source: Path, tmp_path: Path) -> None:
    """In any format, under the keys of config.json and those of other programs; the shared expert's too."""
    folder = tmp_path / "in"
    shutil.copytree(source, folder)
    times = json.loads((source / "config.json").read_text())["n_shared_experts"]
    texts = {
        "inference.json": (f'{{"moe_inter_dim": 24, "n_shared_experts": {times}}}', ["moe_inter_dim: 24", "n_shared"]),
        "train.yaml": ("moe_ffn_hidden_size: 24\n", ["experts have 24 channels (moe_ffn_hidden_size: 24)"]),
        "same.toml": ("moe_intermediate_size = [24, 24]\n", ["experts have 24 channels"]),
        "other.json": ('{"moe_intermediate_size": 240, "intermediate_size": 24, "n_shared_experts": 99}', []),
    }
    for name, (text, _) in texts.items():
        (folder / name).write_text(text)
    notes = prune(folder, planned(source), tmp_path / "out", mtp="drop").notes
    for name, (_, said) in texts.items():
        lines = [note for note in notes if note.startswith(f"{name}: copied as it is")]
        assert len(lines) == len(said)
        assert all(words in line for words, line in zip(said, lines, strict=True))
    whole = Plan({key: replace(layer, channels=None) for key, layer in planned(source).layers.items()})
    for name, plan in {"whole": whole, "all": planned(source, 24)}.items():
        assert not any("channels" in note for note in prune(folder, plan, tmp_path / name, mtp="drop").notes)


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


def test_channels_that_are_alike_go_by_their_numbers(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """In an MTP layer every three channels have the same numbers, each in an order of its own."""
    source = shutil.copytree(mtp_source(family_checkpoint), tmp_path / "in")
    layer = next(iter(find_layout(open_checkpoint(source)).mtp.values()))
    tensors, generator = everything(source), torch.Generator().manual_seed(0)
    for tensor in layer.tensors:
        if tensor.channel_axis is not None:
            rows = tensors[tensor.name].movedim(tensor.channel_axis, 0)
            for c in range(len(rows)):
                rows[c] = rows[c - c % 3][torch.randperm(rows.shape[1], generator=generator)]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = planned(source)
    prune(source, plan, tmp_path / "out")
    assert verify(source, plan, tmp_path / "out").problems == ()
    for text in strongest_channels(open_checkpoint(source), layer, range(8), WIDTH).values():
        ids = {*channel_ids(text).tolist()}
        firsts = [c for c in ids if c % 3 == 0]
        assert len(firsts) == 6  # five whole threes, and the first of another
        assert all(c % 3 == 0 or c - 1 in ids for c in ids)


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


def test_plans_of_a_program_are_checked_as_files_are(source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    first, *_, last = plan.layers
    layer = plan.layers[last]
    assert layer.channels is not None
    fewer = tuple(channel_text(channel_ids(text)[1:], 24) for text in layer.channels)
    for key, spoilt, line in [
        (last, replace(layer, channels=fewer), f"layer {last}: experts that keep other than the 16 channels"),
        (last, replace(layer, channels=(fewer[0], *layer.channels[1:])), "keep other than the 16 channels"),
        (last, replace(layer, channels=layer.channels[1:]), f"layer {last}: channels of 3 experts, and 4 are kept"),
        (first, LayerPlan(layer.keep), f"layer {first}: says nothing of channels"),
    ]:
        with pytest.raises(InputError, match=line):
            prune(source, Plan({**plan.layers, key: spoilt}), tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_what_is_made_of_holes_takes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
    keys = moe_keys("model.layers.0.mlp.", GUD)
    sizes = {name: ("BF16", [32, 512] if "down" in name else [512, 32]) for name in keys if "experts" in name}
    folder = write_checkpoint(tmp_path / "in", config, keys | sizes)
    text = channel_text(np.arange(0, 512, 2), 512)
    plan = Plan({"0": LayerPlan(tuple(range(8)), None, (text,) * 8)})
    found = list(os.statvfs(folder))
    found[4] = 200 * 1024 // found[1]  # blocks that are free
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: os.statvfs_result(found))
        with pytest.raises(InputError, match=r"needs [34]\d\d\.\d KiB, and .* free"):
            prune(folder, plan, tmp_path / "out")
    prune(folder, plan, tmp_path / "out")
    assert verify(folder, plan, tmp_path / "out").problems == ()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Three shards of experts that lose channels."""
    with benches_in_memory(tmp_path_factory, shards=3) as made:
        config, tensors = synthetic.qwen3(layers=3)
        rng = np.random.default_rng(1)
        for name in tensors:
            if ".experts." in name:
                tensors[name] = synthetic.data(rng, "BF16", [4, 640] if "down" in name else [640, 4])
        folder = synthetic.write(made.folder / "narrow", {**config, "moe_intermediate_size": 640}, tensors, shards=3)
        texts = tuple(channel_text(np.sort(rng.permutation(640)[:320]), 640) for _ in range(4))
        plan = Plan({str(layer): LayerPlan((0, 2, 3, 7), None, texts) for layer in range(3)})
        plan.save(made.folder / "narrow.json")
        yield replace(made, source=folder, plan=made.folder / "narrow.json")


@pytest.mark.parametrize("copy", ["stream", "kernel"])
def test_killed_while_channels_are_cut(bench: Bench, copy: str) -> None:
    """What was proved is taken over, and the rest made again, to the same bytes."""
    options = ("--copy", copy)
    want = bench.want(*options)
    changes = bench.changes(*options)
    for k in range(1, len(changes) + 1, 3):
        out = bench.fresh()
        assert bench.prune(out, *options, rules=f"change:{k}:KILL").code < 0
        if nothing_or_all(out, want):
            assert "exists already" in bench.prune(out, *options).line
        else:
            ended = bench.prune(out, *options)
            assert ended.code == 0, ended.said
        assert finished(out) == want


def test_other_channels_are_another_shard(bench: Bench, tmp_path: Path) -> None:
    """What a stopped run has left is not taken over by a plan of the same experts with other channels."""
    plan = Plan.load(bench.plan)
    texts = tuple(channel_text(np.arange(320), 640) for _ in range(4))
    Plan({key: replace(layer, channels=texts) for key, layer in plan.layers.items()}).save(tmp_path / "other.json")
    other, out = replace(bench, plan=tmp_path / "other.json"), bench.fresh()
    assert bench.prune(out, rules="open@model-00003:1:KILL").code < 0
    assert other.prune(out).code == 0
    assert finished(out) == other.want()

"""The stage: what becomes of checkpoints whose experts are merged, on every way of storing them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli.app import app
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL
from moekern.merging.groups import merging_plan
from moekern.merging.merge import merge_experts
from moekern.model.compute import Compute
from moekern.model.experts import experts_of
from moekern.model.projections import views
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.router_rows import RouterRow, rows_document
from moekern.pruning.prune import MANIFEST, prune
from moekern.refit import Ridge
from moekern.refit.refit import refit
from moekern.refit.variants import Variant
from moekern.statistics.file import Statistics
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families, killed
from tests.helpers.commands import model_and_ids
from tests.helpers.digest import xxh3
from tests.helpers.in_flight import REFUSED
from tests.helpers.refitted import computed
from tests.helpers.synthetic import gpt_oss_mxfp4, read, read_shard, shard_bytes, write

MakeCheckpoint = Callable[[str], Path]
# Tensors of their own; a stack, turned, gate and up alternating, biases; a stack turned; rows of one matrix.
SOME = ("qwen3_moe", "gpt_oss", "llama4_text", "dbrx")
KEPT, TWIN, OTHER = 3, 5, 6
KEEP = (0, 3, 4, 7)
FLOAT32 = Compute(dtype="float32")


def blocks(model: Any) -> list[Any]:
    found = [experts_of(layer) for layer in model.model.layers] if hasattr(model, "model") else []
    found = found or [experts_of(layer) for layer in model.transformer.blocks]
    return [block for block in found if block is not None]


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A family's checkpoint in which expert TWIN is expert KEPT with its channels in another order."""
    model = families.build(name, 0, dtype)
    for block in blocks(model):
        of = views(block)
        order = torch.randperm(of.up.shape[1], generator=torch.Generator().manual_seed(1))
        for field, value in vars(of).items():
            if value is not None:
                moved = value[KEPT] if field == "down_bias" else value[KEPT].index_select(int(field == "down"), order)
                value[TWIN].copy_(moved.clone())
    model.save_pretrained(folder)
    return folder


def plan_of(source: Path, group: tuple[tuple[int, float], ...] = (), align: str = "weights") -> Plan:
    groups = tuple(group if e == KEPT and group else ((e, 1.0),) for e in KEEP)
    layers = find_layout(open_checkpoint(source)).layers
    plan = Plan({key: LayerPlan(KEEP, groups=groups if group else None) for key in layers})
    return replace(plan, provenance={"merge": {"align": align}} if group else {})


def merged(source: Path, plan: Plan, folder: Path) -> tuple[Plan, Path]:
    """What `merge-experts` does."""
    whole = merge_experts(open_checkpoint(source), plan, folder / "layers")
    prune(source, whole, folder / "out", refitted=folder / "layers")
    report = verify(source, whole, folder / "out", full=True)
    assert report.problems == ()
    assert report.recomputed == report.computed > 0
    return whole, folder / "out"


@pytest.mark.parametrize("name", SOME)
def test_an_expert_and_its_permuted_copy_are_that_expert(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "model")
    prune(source, plan_of(source), tmp_path / "plain")
    _, out = merged(source, plan_of(source, ((KEPT, 2.0), (TWIN, 1.0))), tmp_path)
    assert read(out) == read(tmp_path / "plain")
    _, other = merged(source, plan_of(source, ((KEPT, 2.0), (TWIN, 1.0)), "none"), tmp_path / "as-they-lie")
    assert read(other) != read(out)


@pytest.mark.parametrize("name", SOME)
def test_experts_are_weighted_means(name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = family_checkpoint(name)
    plan = plan_of(source, ((1, 3.0), (2, 0.0), (KEPT, 2.0), (OTHER, 5.0)), "none")
    one, *others = plan.layers
    plan = replace(plan, layers={one: replace(plan.layers[one], groups=None), **{k: plan.layers[k] for k in others}})
    _, out = merged(source, plan, tmp_path)
    before, after = families.load(source), families.load(out)
    for number, (old, new) in enumerate(zip(blocks(before), blocks(after), strict=True)):
        have = vars(views(new))
        for field, value in vars(views(old)).items():
            if value is not None:
                want = 0.3 * value[1] + 0.2 * value[KEPT] + 0.5 * value[OTHER]
                torch.testing.assert_close(have[field][1], want if number else value[KEPT])
                assert torch.equal(have[field][[0, 2, 3]], value[[0, 4, 7]])


@pytest.mark.whole
@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in REFUSED])
def test_every_family_is_merged_written_and_verified_or_refused(
    name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = family_checkpoint(name)
    layout = find_layout(open_checkpoint(source))
    step = layout.num_experts // layout.n_group
    keep = tuple(e for e in range(layout.num_experts) if e % step >= step // 2)
    groups = ((((0, 1.0), (1, 3.0), (keep[0], 2.0))), *(((e, 1.0),) for e in keep[1:]))
    plan = Plan({key: LayerPlan(keep, groups=groups) for key in layout.layers})
    text = TokenData((Batch("a", families.input_ids(name, 2, 12)),), {}, 4)
    try:
        _, out = merged(source, plan, tmp_path)
        if layout.family.only_pruned:
            return
        written = evaluate(out, text, {}, FLOAT32)[ORIGINAL]["a"]
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert name in ("deepseek_v4", "jetmoe", "openai_privacy_filter"), error  # noqa: PT017
        return
    assert evaluate(source, text, {"merged": plan}, FLOAT32)["merged"]["a"].nll == written.nll


def test_a_plan_on_the_fly_is_what_is_written_and_a_refit_goes_on_from_it(tmp_path: Path) -> None:
    source = save("qwen3_moe", tmp_path / "model")
    plan = plan_of(source, ((1, 3.0), (KEPT, 2.0), (OTHER, 5.0)))
    whole, out = merged(source, plan, tmp_path)
    batches = tuple(Batch("a", families.input_ids("qwen3_moe", 1, 12, seed)) for seed in range(20))
    losses = evaluate(source, TokenData(batches[:4], {}, 4), {"merged": plan, "dropped": plan_of(source)}, FLOAT32)
    assert losses["merged"] != losses["dropped"]
    written = evaluate(out, TokenData(batches[:4], {}, 4), {}, FLOAT32)[ORIGINAL]["a"]
    assert written.nll == losses["merged"]["a"].nll

    variants = [Variant("plain", whole), Variant("new", whole, ridge=Ridge(sweeps=1), folder=tmp_path / "refit")]
    made = refit(source, TokenData(batches, {}, 4), variants, FLOAT32).plans["new"]
    assert made.layers == whole.layers
    new = computed(tmp_path / "refit")
    assert {name.split(".")[-2] for name in new} == {"gate_proj", "up_proj", "down_proj"}
    prune(source, made, tmp_path / "refitted", refitted=tmp_path / "refit")
    assert all(new[name] == tensor for name, tensor in read(out).items() if "gate_proj" in name)
    assert verify(source, made, tmp_path / "refitted").problems == ()
    assert compare_forward(open_checkpoint(source), made, tmp_path / "refitted", compute=FLOAT32).equal


def test_a_stopped_merge_goes_on_with_the_layers_that_are_left(tmp_path: Path) -> None:
    source = save("qwen3_moe", tmp_path / "model")
    plan = plan_of(source, ((KEPT, 2.0), (OTHER, 1.0)))
    checkpoint, folder = open_checkpoint(source), tmp_path / "stopped"

    def stop(done: float, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_experts(checkpoint, plan, folder, stop)
    left = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(left) == 2
    merge_experts(checkpoint, plan, folder)
    assert left.items() <= {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}.items()
    merge_experts(checkpoint, plan, tmp_path / "whole")
    assert computed(folder) == computed(tmp_path / "whole")
    merge_experts(checkpoint, plan_of(source, ((KEPT, 1.0), (OTHER, 1.0))), folder)
    assert computed(folder) != computed(tmp_path / "whole")
    assert len(list(folder.iterdir())) == len(plan.layers)


def test_what_cannot_be_merged_is_refused(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    quantised = write(tmp_path / "in", *gpt_oss_mxfp4())
    group = ((1, 1.0), (KEPT, 1.0))
    with pytest.raises(InputError, match="_blocks: stored as mxfp4, and only plain numbers are merged"):
        merge_experts(open_checkpoint(quantised), plan_of(quantised, group), tmp_path / "layers")
    plain = family_checkpoint("qwen3_moe")
    for nothing in (plan_of(plain), plan_of(plain, ((1, 0.0), (KEPT, 1.0)))):
        with pytest.raises(InputError, match="no expert is merged into another"):
            merge_experts(open_checkpoint(plain), nothing, tmp_path / "layers")
    for wrong in (
        Variant("x", plan_of(plain, group), 16, Ridge()),
        Variant("x", plan_of(quantised, group), None, Ridge()),
    ):
        source = plain if wrong.width else quantised
        with pytest.raises(InputError, match="merges experts: .* neither narrowed|only plain numbers are merged"):
            refit(source, TokenData((Batch("a", families.input_ids("qwen3_moe", 4, 12)),), {}, 4), [wrong], FLOAT32)
    assert not (tmp_path / "layers").exists()


def test_what_a_plan_merges_and_was_not_computed_is_not_passed_over(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, layers = family_checkpoint("qwen3_moe"), tmp_path / "layers"
    plan = plan_of(source, ((KEPT, 2.0), (OTHER, 1.0)))
    one, *others = plan.layers
    part = replace(plan, layers=plan.layers | {key: replace(plan.layers[key], groups=None) for key in others})
    whole = merge_experts(open_checkpoint(source), part, layers)
    more = replace(plan, provenance=whole.provenance)
    with pytest.raises(InputError, match=f"does not say that those of layer '{others[0]}' were: .*merge-experts"):
        prune(source, more, tmp_path / "out", refitted=layers)
    rows = {one: {KEPT: RouterRow((0.5,) * families.EXPERTS)}}
    routed = replace(whole, provenance=whole.provenance | {"merge": {"router": rows_document("log-sum", rows)}})
    with pytest.raises(InputError, match="was computed for other router rows than the plan has"):
        prune(source, routed, tmp_path / "out", refitted=layers)
    prune(source, whole, tmp_path / "out", refitted=layers)
    for wrong in (more, plan):
        with pytest.raises(InputError, match="does not say that those of layer"):
            verify(source, wrong, tmp_path / "out")
    none = plan_of(source, ((KEPT, 2.0), (OTHER, 0.0)))
    prune(source, none, tmp_path / "none")
    prune(source, plan_of(source), tmp_path / "dropped")
    assert read(tmp_path / "none") == read(tmp_path / "dropped")


@pytest.mark.parametrize("align", ["weights", "none"])
def test_weights_that_are_not_finite_are_refused(align: str, tmp_path: Path) -> None:
    model = families.build("qwen3_moe")
    views(blocks(model)[1]).up[OTHER, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    plan = plan_of(tmp_path / "model", ((KEPT, 2.0), (OTHER, 1.0)), align)
    with pytest.raises(InputError, match="layer [0-9]: expert 3: weights of its group are not finite"):
        merge_experts(open_checkpoint(tmp_path / "model"), plan, tmp_path / "layers")


def test_another_merged_tensor_with_its_own_checksum_is_found_out(tmp_path: Path) -> None:
    source = save("qwen3_moe", tmp_path / "model", torch.bfloat16)
    whole, out = merged(source, plan_of(source, ((KEPT, 2.0), (OTHER, 1.0))), tmp_path)
    path, name = out / "model.safetensors", "model.layers.1.mlp.experts.1.up_proj.weight"
    tensors, header = read_shard(path)
    dtype, shape, raw = tensors[name]
    tensors[name] = (dtype, shape, bytes([raw[0] ^ 1]) + raw[1:])
    path.write_bytes(shard_bytes(tensors, header["__metadata__"]))
    line = json.loads((out / MANIFEST).read_text())
    line["tensors"][name], line["size"] = xxh3(tensors[name][2]).hex(), path.stat().st_size
    (out / MANIFEST).write_text(json.dumps(line) + "\n")
    problems = verify(source, whole, out, full=True).problems
    assert [problem for problem in problems if "computed again" in problem] == [
        f"{name}: differs from what is computed again"
    ]


def test_the_command_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = save("qwen3_moe", tmp_path / "model"), tmp_path / "out"
    plan_of(source, ((KEPT, 2.0), (OTHER, 1.0))).save(tmp_path / "plan.json")
    command = ["merge-experts", str(source), "--plan", str(tmp_path / "plan.json"), "--out", str(out), "--json"]
    with monkeypatch.context() as patch:
        patch.setattr("moekern.cli.pipeline.verify_both", lambda *given, **options: 1 / 0)
        assert CliRunner().invoke(app, command).exit_code == 1
    assert out.is_dir()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verify"]["good"]
    assert [path.name for path in (tmp_path / "out.moekern").iterdir()] == ["plan.json"]
    again = CliRunner().invoke(app, command)
    assert again.exit_code != 0
    for wrong in (["--statistics", "s"], ["--data", f"a={source}"], ["--keep", "4"], ["--budget", "adaptive"]):
        assert CliRunner().invoke(app, [*command[:-3], "--out", str(tmp_path / "other"), *wrong]).exit_code != 0


@pytest.mark.whole
def test_a_command_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = save("qwen3_moe", tmp_path / "model")
    plan_of(source, ((KEPT, 2.0), (OTHER, 1.0))).save(tmp_path / "plan.json")

    def command(out: Path, kill_at: int | None = None) -> Any:
        given = ("merge-experts", source, "--plan", tmp_path / "plan.json", "--out", out)
        return killed.command(given, tmp_path / "told", kill_at)

    assert command(tmp_path / "whole").returncode == 0
    calls = killed.calls(tmp_path / "told")
    for share in (0.3, 0.7):
        out = tmp_path / f"out-{share}"
        assert command(out, int(share * calls)) is None
        assert command(out).returncode == 0
        assert read(out) == read(tmp_path / "whole")
        assert {path.name for path in (tmp_path / f"out-{share}.moekern").iterdir()} == {"plan.json"}


def test_what_cannot_be_merged_is_refused_before_any_text_is_read(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    command = ["merge-experts", str(family_checkpoint("deepseek_v4")), "--data", str(tmp_path / "text.npy")]
    np.save(tmp_path / "text.npy", np.zeros(0, np.int64))  # of which no sequence could be made
    done = CliRunner().invoke(app, [*command, "--keep", "4", "--method", "m-smoe", "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, InputError)
    assert "a table of ids chooses its experts, so that none are merged" in str(done.exception)
    uneven = [*command, "--keep", "0.5", "--method", "m-smoe", "--budget", "adaptive", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, uneven).exception
    assert "different numbers of experts, which no engine loads; add --allow-nonuniform" in str(refused)


def test_groups_that_cannot_be_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = families.FAMILIES["qwen3_moe"]()
    config.num_experts = 40
    families.build("qwen3_moe", config=lambda: config).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", families.input_ids("qwen3_moe", 4, 32).numpy())
    monkeypatch.setattr("moekern.cli.pipeline.measured", lambda *given, **options: 1 / 0)
    command = ["merge-experts", str(tmp_path / "model"), "--data", f"a={tmp_path / 'ids.npy'}"]
    command += ["--sequence-length", "32", "--out", str(tmp_path / "out")]
    for wrong, line in (
        (["--keep", "99", "--method", "m-smoe"], "--keep 99: more than the 40 experts there are"),
        (["--keep", "2", "--method", "ream"], "2 groups of 16 experts have no place for 40"),
        (["--keep", "20", "--method", "m-smoe", "--domain", "b"], "--domain b: the text has no such domain; it has a"),
    ):
        done = CliRunner().invoke(app, [*command, *wrong])
        assert isinstance(done.exception, InputError), done.exception
        assert line in str(done.exception)


@pytest.mark.whole
def test_text_is_measured_first_and_used_again(tmp_path: Path) -> None:
    source = model_and_ids(tmp_path) / "model"
    command = ["merge-experts", str(source), "--data", f"a={tmp_path / 'ids.npy'}", "--sequence-length", "40"]
    command += ["--keep", "0.5", "--json"]
    done = CliRunner().invoke(app, [*command, "--method", "hc-smoe", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    statistics = tmp_path / "out.moekern/statistics.safetensors"
    plan = merging_plan(Statistics.load(statistics), "hc-smoe", 0.5)
    written = Plan.load(tmp_path / "out.moekern/plan.json")
    assert {key: layer.groups for key, layer in written.layers.items()} == {
        key: layer.groups for key, layer in plan.layers.items()
    }
    shutil.rmtree(tmp_path / "out")
    before = statistics.stat().st_mtime_ns
    done = CliRunner().invoke(app, [*command, "--method", "m-smoe", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert statistics.stat().st_mtime_ns == before

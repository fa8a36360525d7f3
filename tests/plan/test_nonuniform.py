"""Plans that keep different numbers of experts in different layers: written, verified, run, and refused by engines."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekern.architectures import Layout, find_layout
from moekern.checkpoint.folder import PLAN_FILE, open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.plan.document import NONUNIFORM, LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families, synthetic

MakeCheckpoint = Callable[[str], Path]
# Indexed and stacked experts, groups, selection biases, MTP layers, dense first layers, DBRX's folded rows.
RUN = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "dbrx", "granitemoe", "glm4_moe", "qwen3_next")


def stepped_plan(layout: Layout) -> Plan:
    """Fewer experts in each layer than in the one before, by whole groups, down to half; the last ones of a group."""
    size, layers = layout.num_experts // layout.n_group, {}
    for i, key in enumerate(layout.layers):
        quota = max(size // 2, size - 1 - i)
        groups = (range((g + 1) * size - quota, (g + 1) * size) for g in range(layout.n_group))
        layers[key] = LayerPlan(tuple(e for group in groups for e in group))
    return Plan(layers, {NONUNIFORM: True})


@pytest.mark.parametrize("name", RUN)
def test_different_counts_are_written_and_run(name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, out = family_checkpoint(name), tmp_path / "out"
    layout = find_layout(open_checkpoint(source))
    plan = stepped_plan(layout)
    counts = {key: len(layer.keep) for key, layer in plan.layers.items()}
    assert len(set(counts.values())) > 1
    assert prune(source, plan, out).experts_after == max(counts.values())
    assert verify(source, plan, out).problems == ()
    found = find_layout(open_checkpoint(out))
    assert {key: layer.num_experts for key, layer in found.layers.items()} == counts
    assert found.num_experts == max(counts.values())
    batches = (Batch("d", families.input_ids(name, 2, 16)),)
    verdict = compare_forward(source, plan, out, batches)
    assert verdict.equal, verdict
    other = Plan({**plan.layers, next(iter(plan.layers)): LayerPlan(_moved(plan, layout))}, plan.provenance)
    assert not compare_forward(source, other, out, batches).equal


def _moved(plan: Plan, layout: Layout) -> tuple[int, ...]:
    """The first layer's experts with the first of each group exchanged for a dropped one."""
    size = layout.num_experts // layout.n_group
    keep = next(iter(plan.layers.values())).keep
    dropped = [min(set(range(g * size, (g + 1) * size)) - set(keep)) for g in range(layout.n_group)]
    firsts = [min(e for e in keep if e // size == g) for g in range(layout.n_group)]
    return tuple(sorted(set(keep) - set(firsts) | set(dropped)))


def test_evaluation_on_the_fly_is_that_of_the_written_checkpoint(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, out = family_checkpoint("deepseek_v3"), tmp_path / "out"
    plan = stepped_plan(find_layout(open_checkpoint(source)))
    prune(source, plan, out)
    data = TokenData((Batch("d", families.input_ids("deepseek_v3", 3, 20)),), {})
    masked = evaluate(source, data, {"plan": plan})
    written = evaluate(out, data, {})["original"]["d"].nll
    # 57 tokens' losses from float32 logits of order 1, whose sums take another order
    assert abs(masked["plan"]["d"].nll - written) < 1e-5 < abs(masked["original"]["d"].nll - written)


def test_the_second_pruning_starts_from_each_layers_own_count(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = family_checkpoint("qwen3_moe")
    plan = stepped_plan(find_layout(open_checkpoint(source)))
    prune(source, plan, tmp_path / "once")
    half = Plan({key: LayerPlan(tuple(range(4))) for key in plan.layers})
    prune(tmp_path / "once", half, tmp_path / "twice")
    direct = Plan({key: LayerPlan(layer.keep[:4]) for key, layer in plan.layers.items()})
    prune(source, direct, tmp_path / "direct")
    tensors = [open_checkpoint(tmp_path / name) for name in ("twice", "direct")]
    assert set(tensors[0].tensors) == set(tensors[1].tensors)
    assert all(tensors[0].read(name) == tensors[1].read(name) for name in tensors[0].tensors)


def test_config_says_the_largest_count_and_engines_refuse_it(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, out = family_checkpoint("qwen3_moe"), tmp_path / "out"
    plan = stepped_plan(find_layout(open_checkpoint(source)))
    prune(source, plan, out)
    config = json.loads((out / "config.json").read_bytes())
    counts = [len(layer.keep) for layer in plan.layers.values()]
    assert {config[key] for key in ("num_experts", "num_local_experts") if key in config} == {max(counts)}
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatch"), torch.no_grad():
        families.load(out)


def test_a_list_of_counts_says_each_layers_own(tmp_path: Path) -> None:
    config, tensors = synthetic.qwen3()
    source = synthetic.write(tmp_path / "in", config | {"num_experts": [8, 8], "num_local_experts": 8}, tensors)
    plan = Plan({"0": LayerPlan((1, 3, 5)), "1": LayerPlan((0, 2, 4, 6))}, {NONUNIFORM: True})
    prune(source, plan, tmp_path / "out")
    assert verify(source, plan, tmp_path / "out").problems == ()
    after = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert (after["num_experts"], after["num_local_experts"]) == ([3, 4], 4)
    assert find_layout(open_checkpoint(tmp_path / "out")).num_experts == 4
    after["num_experts"] = [3, 5]
    (tmp_path / "out" / "config.json").write_text(json.dumps(after))
    with pytest.raises(InputError, match=r"num_experts is \[3, 5\], but the tensors hold 4 experts"):
        find_layout(open_checkpoint(tmp_path / "out"))
    assert verify(source, plan, tmp_path / "out").problems


def test_without_the_plan_beside_it_such_a_checkpoint_is_damaged(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, out = family_checkpoint("qwen3_moe"), tmp_path / "out"
    prune(source, stepped_plan(find_layout(open_checkpoint(source))), out)
    text = (out / PLAN_FILE).read_text()
    spoiled = {"[]": "JSON object", "{}": "counts differ", '{"plan": 3}': "counts differ", "": "JSON"}
    spoiled |= {
        '{"plan": {"layers": {"0": {"keep": 3}}}}': "counts differ",
        '{"plan": {"layers": []}}': "counts differ",
    }
    for content, message in spoiled.items():
        (out / PLAN_FILE).write_text(content)
        with pytest.raises(InputError, match=message):
            find_layout(open_checkpoint(out))
    (out / PLAN_FILE).write_text(text)
    find_layout(open_checkpoint(out))
    (out / PLAN_FILE).unlink()
    with pytest.raises(InputError, match="expert counts differ between layers"):
        find_layout(open_checkpoint(out))


def test_without_permission_a_plan_with_different_counts_is_refused(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = family_checkpoint("qwen3_moe")
    plan = stepped_plan(find_layout(open_checkpoint(source)))
    for provenance in ({}, {NONUNIFORM: 1}, {NONUNIFORM: "yes"}, {NONUNIFORM: False}):
        with pytest.raises(
            InputError, match="keeps .* engines load one expert count for all layers.*--allow-nonuniform"
        ):
            prune(source, Plan(plan.layers, provenance), tmp_path / "out")
    assert not (tmp_path / "out").exists()

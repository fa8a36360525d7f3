"""`moekern run`, and the comparison with the masked original that it ends in."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moekern.architectures import Layout, find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli import console
from moekern.cli.app import app
from moekern.data.batches import Batch
from moekern.errors import InputError, NoRoomForText
from moekern.model import layerwise
from moekern.model.compute import Compute
from moekern.model.masking import masked
from moekern.model.stepwise import Stepwise, Tangled
from moekern.model.transformers_api import loader_of
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.verification.logits import compare_forward, dropped_experts
from tests.helpers import families
from tests.helpers.in_flight import random_plan
from tests.helpers.narrow import narrow_plan, random_channels, save_narrow
from tests.helpers.tight import little_room, tighten

MakeCheckpoint = Callable[[str], Path]
TOLERANCE = 5e-5  # float32 logits of size 1: rounding of sums taken in another order

RUN = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss",
    "minimax_m2", "ernie4_5_moe", "granitemoe", "hunyuan_v1_moe", "llama4_text", "llama4", "dbrx",
)  # fmt: skip


def difference_from_masked(original: Any, layout: Layout, plan: Plan, pruned: Path, name: str) -> tuple[float, float]:
    """Largest logit difference of the pruned model to the masked original, and of the plain original to it."""
    result, info = families.load(pruned, loading_info=True)
    assert not any(info.values()), info
    ids = families.input_ids(name, 4, 16, 7)
    plain = families.forward(original, ids)
    with masked(loader_of(original), layout, dropped_experts(layout, plan)):
        want = families.forward(original, ids)
    assert torch.equal(families.forward(original, ids), plain)
    got = families.forward(result, ids)
    return float((got - want).abs().max()), float((plain - want).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", RUN)
def test_one_command_from_checkpoint_to_verified_checkpoint(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any], tmp_path: Path
) -> None:
    source, out = family_checkpoint(name), tmp_path / "pruned"
    rows = families.input_ids(name, 8, 40, 11).tolist()
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    arguments = ["run", str(source), "--data", f"d={tmp_path / 'ids.jsonl'}", "--sequence-length", "40"]
    arguments += ["--keep", "0.5", "--criterion", "reap", "--out", str(out), "--json"]
    with console.output(False):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["verify"]["good"] is True
    assert document["verify"]["forward"]["equal"] is True
    assert document["pruned"]["experts_after"] == 4
    plan = Plan.load(document["plan"])
    difference, effect = difference_from_masked(
        whole_model(name), find_layout(open_checkpoint(source)), plan, out, name
    )
    assert difference < TOLERANCE
    assert effect > 100 * TOLERANCE


def test_a_wrong_checkpoint_is_not_equal(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = family_checkpoint("qwen3_moe")
    plan = random_plan(find_layout(open_checkpoint(source)), 0)
    other = Plan({**plan.layers, "2": LayerPlan((0, 1, 2, 5))})
    prune(source, plan, tmp_path / "out")
    batches = (Batch("d", families.input_ids("qwen3_moe", 2, 16)),)
    assert compare_forward(source, plan, tmp_path / "out", batches).equal
    assert not compare_forward(source, other, tmp_path / "out", batches).equal


@pytest.mark.parametrize(("memory", "disk", "groups"), [(60, 1 << 30, 1), (0, 70, 2)])
def test_any_room_gives_the_same_numbers(
    memory: int,
    disk: int,
    groups: int,
    family_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Logits of the original wait in a file beyond half of the memory; what does not fit is taken in groups."""
    source, told = family_checkpoint("qwen3_moe"), list[tuple[float, int]]()
    layout = find_layout(open_checkpoint(source))
    prune(source, random_plan(layout, 0), tmp_path / "out")
    wrong = random_plan(layout, 1)
    batches = tuple(Batch("d", families.input_ids("qwen3_moe", 1, length, length)) for length in (9, 30, 70))
    whole = compare_forward(source, wrong, tmp_path / "out", batches)
    token = 4 * (families.VOCAB + 32)
    little_room(monkeypatch, memory * token, disk * token)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    tell = lambda done, total: told.append((done, total))  # noqa: E731
    with caplog.at_level("INFO", "moekern"):
        assert compare_forward(source, wrong, tmp_path / "out", batches, progress=tell) == whole
    assert told[-1] == (8 * groups, 8 * groups)
    assert sum(f"it is compared in {groups} groups" in line for line in caplog.messages) == (groups > 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_batch_that_there_is_no_room_for_is_refused(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = family_checkpoint("qwen3_moe")
    little_room(monkeypatch, 0, 1000)
    with pytest.raises(
        NoRoomForText, match=r"16 tokens take 2.0 KiB of hidden states and .* KiB of logits: memory has"
    ):
        compare_forward(source, random_plan(find_layout(open_checkpoint(source)), 0), source,
                        (Batch("d", families.input_ids("qwen3_moe", 2, 8)),))  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("name", "width"), [("qwen3_moe", 16), ("deepseek_v3", 16), ("qwen3_moe", 10)])
def test_a_narrow_checkpoint_is_the_original_with_channels_silent(
    name: str, width: int, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any], tmp_path: Path
) -> None:
    source, keep = family_checkpoint(name), (0, 2, 5, 7)
    layout = find_layout(open_checkpoint(source))
    plan, other = (narrow_plan(layout, keep, width, seed) for seed in (0, 1))
    channels = random_channels(layout, dict.fromkeys(layout.layers, keep), width, 0)
    out = save_narrow(whole_model(name), layout, plan, channels, tmp_path / "out")
    batches = (Batch("d", families.input_ids(name, 2, 16)),)
    assert compare_forward(source, plan, out, batches).equal
    assert not compare_forward(source, other, out, batches).equal


def test_channels_are_not_masked_where_experts_run_in_groups(
    family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = family_checkpoint("qwen3_moe")
    plan = narrow_plan(find_layout(open_checkpoint(source)), (0, 1, 2, 3), 16, 0)
    tighten(monkeypatch, source, Compute(dtype="float32"))
    with pytest.raises(InputError, match=r"layer 0: its experts run in groups, .* give more \(--memory"):
        compare_forward(source, plan, source, (Batch("d", families.input_ids("qwen3_moe", 1, 8)),))


def test_progress_is_that_of_both_models_and_within_their_layers(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source, told = family_checkpoint("qwen3_moe"), list[tuple[float, int]]()
    plan = random_plan(find_layout(open_checkpoint(source)), 0)
    prune(source, plan, tmp_path / "out")
    batches = tuple(Batch("d", families.input_ids("qwen3_moe", 1, 8, seed)) for seed in range(4))
    compare_forward(source, plan, tmp_path / "out", batches, progress=lambda done, total: told.append((done, total)))
    (total,) = {total for _, total in told}
    shares = [done for done, _ in told]
    assert shares == sorted(shares)
    assert set(shares) == {quarter / 4 for quarter in range(4 * total + 1)}


@pytest.mark.parametrize("how", ["begins again", "groups"])
@pytest.mark.filterwarnings("ignore:.*the pass begins again")
def test_progress_ends_with_the_layers_however_they_run(
    how: str, family_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tangled(self: Stepwise, layer: int, *arguments: Any) -> None:
        if layer == 1:
            raise Tangled(layer)
        through(self, layer, *arguments)

    source, through, told = family_checkpoint("qwen3_moe"), Stepwise.through, list[tuple[float, int]]()
    plan = random_plan(find_layout(open_checkpoint(source)), 0)
    prune(source, plan, tmp_path / "out")
    batches = tuple(Batch("d", families.input_ids("qwen3_moe", 1, 8, seed)) for seed in range(2))
    if how == "groups":
        tighten(monkeypatch, source, Compute(dtype="float32"))
    else:
        monkeypatch.setattr(layerwise, "_TANGLED", set[type]())
        monkeypatch.setattr(Stepwise, "through", tangled)
    tell = lambda done, total: told.append((done, total))  # noqa: E731
    assert compare_forward(source, plan, tmp_path / "out", batches, progress=tell).equal
    (total,) = {total for _, total in told}
    shares = [done for done, _ in told]
    assert [(a, b) for a, b in pairwise(shares) if b < a] == ([] if how == "groups" else [(1, 0)])
    assert shares[-1] == total
    parts = 4 if how == "groups" else 2  # twice through a layer of the original
    assert set(shares) >= {part / parts for part in range(parts * total // 2 + 1)}


def test_masking_a_router_that_makes_no_such_logits_is_an_error(family_checkpoint: MakeCheckpoint) -> None:
    source = family_checkpoint("qwen3_moe")
    layout, model = find_layout(open_checkpoint(source)), families.load(source)
    gate = model.model.layers[1].mlp.gate
    gate.forward = lambda hidden: (torch.zeros(hidden.shape[0], 8), *([None] * 2))
    with (
        masked(loader_of(model), layout, {"1": (0, 1)}),
        pytest.raises(RuntimeError, match="layer 1: the router made no logits of width 8"),
    ):
        families.forward(model, families.input_ids("qwen3_moe"))

"""The stage: what a refit of a model computes, writes and tells."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moekern.architectures import find_layout
from moekern.architectures.widths import narrow_problem
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.estimation.refit import refitted_bytes
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL
from moekern.iteration.rounds import Method, iterate
from moekern.model.compute import Compute
from moekern.model.expert_groups import Takes
from moekern.model.journal import Resume
from moekern.model.layerwise import LayerwiseModel
from moekern.plan.channels import channel_ids
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.refit import REFIT
from moekern.pruning.prune import prune
from moekern.pruning.refitted import open_refitted
from moekern.refit import Refine, Ridge
from moekern.refit.choice import Choice
from moekern.refit.refit import check_room, refit
from moekern.refit.rows import RowStore
from moekern.refit.variants import FITTED, HELD, JUDGED, Split, Variant
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families, remote_code
from tests.helpers.in_flight import REFUSED
from tests.helpers.tight import little_room, tighten

MakeCheckpoint = Callable[[str], Path]
SOME = ("qwen3_moe", "gpt_oss", "deepseek_v3", "dbrx", "llama4_text", "longcat_flash", "jetmoe", "gemma4_text",
        "nemotron_h", "muse_spark_text", "inkling2_text", "granitemoe")  # fmt: skip
NAMES = [
    pytest.param(name, marks=[] if name in SOME else [pytest.mark.whole])
    for name in families.FAMILIES
    if name not in REFUSED
]
FLOAT32 = Compute(dtype="float32")


def text(name: str, sequences: int = 20, length: int = 12) -> TokenData:
    return TokenData(tuple(Batch("a", families.input_ids(name, 1, length, seed)) for seed in range(sequences)), {}, 4)


def judged_text(name: str) -> TokenData:
    """The part of it that a refit is judged by."""
    split = Split.of(text(name))
    return TokenData(tuple(b for b, use in zip(split.batches, split.uses, strict=True) if use == JUDGED), {})


def half(folder: Path) -> Plan:
    layout = find_layout(open_checkpoint(folder))
    step = layout.num_experts // layout.n_group
    keep = tuple(e for e in range(layout.num_experts) if e % step >= step // 2)
    return Plan({key: LayerPlan(keep) for key in layout.layers})


def never(done: float, total: int) -> None:
    raise AssertionError("nothing is computed")


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_refitted_written_and_verified_or_refused(
    name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = family_checkpoint(name)
    checkpoint, plan = open_checkpoint(source), half(source)
    layout = find_layout(checkpoint)
    if layout.family.only_pruned:
        return
    if layout.family.no_refit:
        with pytest.raises(InputError, match=f"{layout.family.name}: {layout.family.no_refit}; prune it without a"):
            refit(source, text(name), [Variant("new", plan, None, Ridge())], FLOAT32, progress=never)
        return
    width = 16 if narrow_problem(checkpoint, layout) is None else None
    variant = Variant("new", plan, width, Ridge(sweeps=2), Refine(epochs=1, sweeps=1), tmp_path / "refit")
    made = refit(source, text(name), [variant], FLOAT32)
    whole = made.plans["new"]
    told = whole.provenance[REFIT]["layers"]
    assert list(told) == list(layout.layers)
    for layer in told.values():
        for part in ("held", "fitted"):
            for found in (layer, layer["refine"]):
                assert part not in found or found[part][1] <= found[part][0] or part == "fitted"
    mtp = "drop" if layout.mtp_prefixes else "prune"
    kept = {key: len(layer.keep) for key, layer in plan.layers.items()}
    tensors = open_refitted(tmp_path / "refit").tensors.values()
    nbytes = refitted_bytes(checkpoint, layout, kept, all_parts=True, width=width)
    assert nbytes == sum(each.entry.nbytes for each in tensors)
    prune(source, whole, tmp_path / "out", mtp=mtp, refitted=tmp_path / "refit")
    report = verify(source, whole, tmp_path / "out")
    assert report.problems == ()
    assert report.computed
    assert compare_forward(source, whole, tmp_path / "out").equal
    alone = evaluate(tmp_path / "out", judged_text(name), {}, FLOAT32)
    assert alone[ORIGINAL]["a"].nll == pytest.approx(made.losses["new"]["a"].nll, rel=1e-5)


@pytest.mark.parametrize(("name", "whole", "width"), [("qwen3_moe", 10, None), ("jetmoe", 24, 21)])
def test_experts_of_any_width_are_refitted_and_evaluated(
    name: str, whole: int, width: int | None, tmp_path: Path
) -> None:
    """torch's grouped products take rows of whole 16 bytes; jetmoe's attention has experts too."""
    config = families.FAMILIES[name]()
    setattr(config, "intermediate_size" if name == "jetmoe" else "moe_intermediate_size", whole)
    families.build(name, config=lambda: config).save_pretrained(tmp_path / "model")
    variant = Variant("new", half(tmp_path / "model"), width, Ridge(sweeps=1), Refine(epochs=1), tmp_path / "refit")
    made = refit(tmp_path / "model", text(name), [variant], FLOAT32)
    prune(tmp_path / "model", made.plans["new"], tmp_path / "out", refitted=tmp_path / "refit")
    judged = evaluate(tmp_path / "out", judged_text(name), {}, FLOAT32)[ORIGINAL]["a"]
    assert judged.nll == pytest.approx(made.losses["new"]["a"].nll, rel=1e-5)
    assert find_layout(open_checkpoint(tmp_path / "out")).width == (width or whole)
    assert compare_forward(tmp_path / "model", made.plans["new"], tmp_path / "out").equal


@pytest.fixture
def source(family_checkpoint: MakeCheckpoint) -> Path:
    return family_checkpoint("qwen3_moe")


def test_a_model_that_drops_nothing_is_left_as_it_was(source: Path, tmp_path: Path) -> None:
    layout = find_layout(open_checkpoint(source))
    plan = Plan({key: LayerPlan(tuple(range(layout.num_experts))) for key in layout.layers})
    made = refit(source, text("qwen3_moe"), [Variant("all", plan, None, Ridge(), None, tmp_path / "x")], FLOAT32)
    for layer in made.plans["all"].provenance[REFIT]["layers"].values():
        assert max(layer["fitted"] + layer["held"]) < 1e-5
    loss = made.losses["all"]["a"]
    assert (loss.kl, loss.nll) == (pytest.approx(0, abs=1e-7), pytest.approx(made.losses[ORIGINAL]["a"].nll, rel=1e-6))


def test_variants_do_not_change_each_other(source: Path, tmp_path: Path) -> None:
    plan, data = half(source), text("qwen3_moe")
    alone = refit(source, data, [Variant("b", plan, 16, Ridge(), None, tmp_path / "1")], FLOAT32)
    beside = [Variant("a", plan, 8, Ridge()), Variant("b", plan, 16, Ridge(), None, tmp_path / "2"), Variant("c", plan)]
    many = refit(source, data, beside, FLOAT32)
    assert many.plans["b"].layers == alone.plans["b"].layers
    assert many.losses["b"] == alone.losses["b"]
    for path in (tmp_path / "1").iterdir():
        mine, other = path.read_bytes(), (tmp_path / "2" / path.name).read_bytes()
        size = int.from_bytes(mine[:8], "little")
        assert mine[8 + size :] == other[8 + size :]
    judged = Split.of(data)
    rest = TokenData(tuple(b for b, use in zip(judged.batches, judged.uses, strict=True) if use == JUDGED), {})
    assert many.losses["c"]["a"].nll == pytest.approx(evaluate(source, rest, {"c": plan}, FLOAT32)["c"]["a"].nll)


def test_channels_with_the_most_energy_stay(source: Path, tmp_path: Path) -> None:
    """A channel whose column of down is zero, or that no row reaches, is the first to go."""
    checkpoint = open_checkpoint(source)
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in source.iterdir():
        data = bytearray(path.read_bytes())
        for entry in checkpoint.tensors.values():
            if entry.shard == path.name and entry.name.endswith("experts.5.down_proj.weight"):
                matrix = np.frombuffer(data, np.float32, entry.nbytes // 4, entry.start).reshape(entry.shape)
                matrix[:, [0, 7, 9]] = 0
        (folder / path.name).write_bytes(data)
    made = refit(folder, text("qwen3_moe"), [Variant("n", half(folder), 16)], FLOAT32)
    for layer in made.plans["n"].layers.values():
        assert layer.channels is not None
        own = dict(zip(layer.keep, layer.channels, strict=True))
        assert not {0, 7, 9} & set(channel_ids(own[5]).tolist())
    assert REFIT not in made.plans["n"].provenance


def test_a_named_backend_computes_the_products_and_is_told(source: Path, tmp_path: Path) -> None:
    """The reference's are float64: the default's numbers within rounding, and another recipe."""
    data, found = text("qwen3_moe"), {}
    for backend in (None, "reference"):
        variant = Variant("n", half(source), 16, Ridge(), None, tmp_path / str(backend))
        made = refit(source, data, [variant], replace(FLOAT32, backend=backend))
        found[backend] = made.plans["n"], open_refitted(tmp_path / str(backend))
    (default, files), (exact, near) = found.values()
    assert files.tensors.keys() == near.tensors.keys()
    told = {op: "native" for op in ("gated_energy", "expert_gram", "scatter_residual")}
    assert default.provenance[REFIT]["backend"] == told
    assert exact.provenance[REFIT]["backend"] == dict.fromkeys(told, "reference")
    assert near.recipe != files.recipe
    assert exact.layers == default.layers
    for name, tensor in files.tensors.items():
        numbers = {"count": tensor.entry.nbytes // 4, "offset": tensor.entry.start}
        mine, other = (np.fromfile(f.tensors[name].path, np.float32, **numbers) for f in (files, near))
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="--backend grouped_mm: .* lacks the op"):
        refit(source, data, [Variant("n", half(source), 16, Ridge())], replace(FLOAT32, backend="grouped_mm"))


def test_the_same_call_goes_on_where_it_was_stopped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, data = half(source), text("qwen3_moe")

    def run(folder: str, *, at: int | None = None) -> Plan:
        with monkeypatch.context() as patch:
            patch.setattr("moekern.model.journal.SHARE", 0)
            load = LayerwiseModel._load

            def stop(self: LayerwiseModel, i: int, after: int | None) -> None:
                if i == at:
                    raise KeyboardInterrupt
                load(self, i, after)

            patch.setattr(LayerwiseModel, "_load", stop)
            resume = Resume(tmp_path / f"{folder}.state", tell=lambda line: None)
            choice = Choice("gated_norm")
            variant = Variant("n", plan, 16, Ridge(), Refine(epochs=1), tmp_path / folder, choice=choice)
            return refit(source, data, [variant], FLOAT32, resume=resume).plans["n"]

    whole = run("whole")
    for at in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run("again", at=at)
    assert run("again") == whole
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert not (tmp_path / "again.state").exists() or not list((tmp_path / "again.state").iterdir())


def test_weights_are_those_that_the_checkpoint_s_type_can_hold(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Layers are computed in float32, and the fit knows of bfloat16: what is judged is what is written."""
    source = families.save("qwen3_moe", tmp_path / "bf16", dtype=torch.bfloat16)
    variant = Variant("n", half(source), 16, Ridge(), Refine(epochs=1), tmp_path / "refit")
    made = refit(source, text("qwen3_moe"), [variant], FLOAT32)
    prune(source, made.plans["n"], tmp_path / "out", refitted=tmp_path / "refit")
    split = Split.of(text("qwen3_moe"))
    data = TokenData(tuple(b for b, use in zip(split.batches, split.uses, strict=True) if use == JUDGED), {})
    alone = evaluate(tmp_path / "out", data, {}, FLOAT32)[ORIGINAL]["a"]
    assert alone.nll == pytest.approx(made.losses["n"]["a"].nll, rel=1e-6)


def test_rows_of_a_layer_share_the_half_of_the_budget_that_hidden_states_leave(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no room there goes to files, which changes no bit."""
    plan, data, room = half(source), text("qwen3_moe"), 120_000
    whole = refit(source, data, [Variant("n", plan, 16, Ridge(), None, tmp_path / "whole")], FLOAT32)
    make, held, peak, files = RowStore.__init__, dict[int, int](), 0, 0

    def counted(self: RowStore, *shape: Any, on_disk: bool = False, folder: Path | None = None) -> None:
        nonlocal peak, files
        make(self, *shape, on_disk=on_disk, folder=folder)
        files += on_disk
        held[id(self)] = 0 if on_disk else self.tensor.nbytes
        peak = max(peak, sum(held.values()))

    monkeypatch.setattr(RowStore, "__init__", counted)
    monkeypatch.setattr(RowStore, "close", lambda self: held.pop(id(self), None))
    monkeypatch.setattr(Takes, "room", room)
    assert (
        refit(source, data, [Variant("n", plan, 16, Ridge(), None, tmp_path / "small")], FLOAT32).plans == whole.plans
    )
    assert 0 < peak <= room // 2
    assert files
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes()


def test_text_without_room_is_refused_before_anything_starts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a line that says how much would fit, for who asks before, too. Nothing is written, and nothing removed."""
    data, variants = text("qwen3_moe"), [Variant("n", half(source), None, Ridge(), None, tmp_path / "refit")]
    (tmp_path / "refit").mkdir()
    (tmp_path / "refit" / "0.safetensors").write_bytes(b"of another refit")
    little_room(monkeypatch, 150_000, 50_000)
    line = r"rows of a layer: memory has .*; a refit takes all of it at once: about (\d+) of 240 tokens would fit"
    for ask in (refit, check_room):
        with pytest.raises(InputError, match=line) as refused:
            ask(source, data, variants, FLOAT32)
        assert refused.value.kind == "memory"
    assert [path.name for path in (tmp_path / "refit").iterdir()] == ["0.safetensors"]
    found = re.search(line, str(refused.value))
    assert found is not None
    check_room(source, text("qwen3_moe", int(found[1]) // 12), variants, FLOAT32)
    with pytest.raises(InputError, match="would fit"):
        check_room(source, text("qwen3_moe", 14), variants, FLOAT32)


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash"])
def test_experts_are_chosen_anew_behind_pruned_layers(
    name: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Those that `iterate` chooses of the same text, where nothing is fitted."""
    source, data, choice = family_checkpoint(name), text(name, 40), Choice("gated_norm", ("a",))
    plan = half(source)
    fit = Variant("fitted", plan, None, Ridge(), None, tmp_path / "refit", choice=choice)
    made = refit(source, data, [Variant("dropped", plan), Variant("again", plan, choice=choice), fit], FLOAT32)
    split = Split.of(data)
    fitted = tuple(b for b, use in zip(split.batches, split.uses, strict=True) if use == FITTED)
    count = len(next(iter(plan.layers.values())).keep)
    want = iterate(source, TokenData(fitted, {}, 4), Method("gated_norm", count, domains=("a",)), FLOAT32)
    kept = {n: [layer.keep for layer in p.layers.values()] for n, p in made.plans.items()}
    assert kept["again"] == [layer.keep for layer in want.layers.values()]
    assert kept["dropped"] == [layer.keep for layer in plan.layers.values()] != kept["again"]
    whole = made.plans["fitted"]
    mtp = "drop" if name == "deepseek_v3" else "prune"
    prune(source, whole, tmp_path / "out", mtp=mtp, refitted=tmp_path / "refit")
    assert verify(source, whole, tmp_path / "out").problems == ()
    assert whole.provenance[REFIT]["choice"]["criterion"] == "gated_norm"


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({}, "the plan does not say by which criterion"),
        ({"criterion": "random"}, ""),
        ({"criterion": "gated_norm", "protect_super": True}, "stay or go whatever their score"),
        ({"criterion": "gated_norm", "guards": {"keep_always": {"0": [1]}}}, "stay or go whatever their score"),
        ({"criterion": "ewn"}, "weights alone"),
        ({"criterion": "my.py:score"}, "moekern's own criteria"),
        ({"criterion": "gated_norm", "domains": "a"}, "a list of domains"),
        ({"criterion": "gated_norm", "domains": [], "seed": "0"}, "a list of domains"),
    ],
)
def test_plans_that_do_not_say_how_experts_were_chosen_are_refused(told: dict[str, Any], line: str) -> None:
    plan = Plan({"0": LayerPlan((0, 1))}, told)
    if not line:
        assert Choice.of(plan) == Choice(told["criterion"])
        return
    with pytest.raises(InputError, match=f"--reestimate: .*(?:{line})"):
        Choice.of(plan)


def test_progress_goes_on_within_a_layer_expert_by_expert(source: Path) -> None:
    told: list[float] = []
    plan, ridge, refine = half(source), Ridge(sweeps=2), Refine(epochs=1, sweeps=2)
    variants = [Variant("dropped", plan), Variant("n", plan, 16, ridge, refine)]
    refit(source, text("qwen3_moe"), variants, FLOAT32, progress=lambda done, total: told.append(done / total))
    assert told == sorted(told)
    assert told[-1] == 1
    layers = find_layout(open_checkpoint(source)).layers
    for number, (key, layer) in enumerate(plan.layers.items()):
        within = {value for value in told if number < value * len(layers) < number + 1}
        assert len(within) > len(layer.keep) * (1 + 3 + 2), key


def test_what_cannot_be_is_one_line(source: Path, tmp_path: Path) -> None:
    plan, data = half(source), text("qwen3_moe")
    narrow = refit(source, data, [Variant("n", plan, 16)], FLOAT32).plans["n"]
    cases = [
        ([Variant("n", narrow, 8, Ridge())], data, "the plan says which channels stay"),
        ([Variant(ORIGINAL, plan, None, Ridge())], data, "give it another name"),
        ([Variant("n", plan, None, Ridge())], TokenData((), {}), "no batches|no text"),
        ([Variant("n", plan, 99, Ridge())], data, "24"),
        ([Variant("n", plan, choice=Choice("gated_norm", ("b",)))], data, "domain 'b', which the text"),
    ]
    for variants, given, line in cases:
        with pytest.raises(InputError, match=line):
            refit(source, given, variants, FLOAT32)


def test_layers_that_cannot_be_refitted_are_named_before_anything_is_computed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts in a list, and layers that memory holds in groups of experts alone."""
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = remote_code.write(tmp_path / "list", next(iter(remote_code.STYLES)))
    data = TokenData(tuple(Batch("a", torch.arange(12)[None] + n) for n in range(20)), {}, 4)
    own = replace(FLOAT32, trust_remote_code=True)
    with pytest.raises(InputError, match=r"list: layer \d: its experts are not held together.* prune it without"):
        refit(folder, data, [Variant("n", half(folder), None, Ridge())], own, progress=never)
    tighten(monkeypatch, source, FLOAT32)
    with pytest.raises(InputError, match=r"layer \d is run in 2 groups of experts, and such layers are not refitted"):
        refit(source, text("qwen3_moe"), [Variant("n", half(source), None, Ridge())], FLOAT32, progress=never)


def test_text_is_held_back_to_choose_and_to_judge() -> None:
    split = Split.of(text("qwen3_moe", 40))
    assert (split.tokens(HELD), split.tokens(JUDGED)) == (36, 48)
    rows = {use: {r.numpy().tobytes() for b, u in zip(split.batches, split.uses, strict=True) if u == use
                  for r in b.input_ids} for use in range(3)}  # fmt: skip
    assert sum(map(len, rows.values())) == 40
    assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]
    assert json.dumps(split.numbers) == json.dumps(sorted(split.numbers))
    assert replace(split) == split

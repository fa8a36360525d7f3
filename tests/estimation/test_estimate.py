"""What a stage is said to take: counted from headers, at rates that a test makes up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.estimation import estimate as estimating
from moekern.estimation.counted import Asked, Counted, Part, Stage, counted
from moekern.estimation.estimate import estimate, job_of
from moekern.estimation.probe import Rate, Rates
from moekern.estimation.refit import BATCH, EPOCHS, FACTORS, STEP, SWEEPS, refine_steps
from moekern.measurement.tiers import not_by_segments
from moekern.model.budget import Budget
from moekern.model.compute import Compute
from moekern.refit import Refine, Ridge
from moekern.statistics.layer import TIERS
from tests.helpers import families

MakeCheckpoint = Callable[[str], Path]
FLOAT32 = Compute(device="cpu", dtype="float32")
ROOM = Budget(1 << 40)
RATES = Rates(
    read=Rate(1e3, "B/s"), write=Rate(2e3, "B/s"), fill=Rate(1e5, "B/s"), transfer=None, experts=Rate(1e6, "FLOP/s"),
    dense=Rate(2e6, "FLOP/s"), attention=Rate(50, "sequences/s"), measuring=Rate(1e3, "tokens/s"),
)  # fmt: skip


def stages(folder: Path, asked: Asked, budget: Budget = ROOM, rates: Rates = RATES) -> tuple[Counted, dict[str, Stage]]:
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    model = counted(checkpoint, layout, FLOAT32, asked)
    found = estimate(job_of(checkpoint, layout, model, rates, asked, budget, held=1000))
    return model, {stage.name: stage for stage in found}


def parts(stage: Stage, figure: str) -> dict[str, float]:
    return {part.name: part.value for part in getattr(stage, figure).parts}


def test_what_headers_say_of_a_layer(family_checkpoint: MakeCheckpoint) -> None:
    folder = family_checkpoint("qwen3_moe")
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    model, _ = stages(folder, Asked(4096, sequence=96))
    H, E = config["hidden_size"], model.shapes.experts
    assert model.shapes.inner == config["moe_intermediate_size"]
    assert (model.shapes.hidden, model.shapes.top_k) == (H, config["num_experts_per_tok"])
    assert model.shapes.tokens == 2048 // 96 * 96
    for layer in model.layers:
        if layer.experts:
            assert layer.routed == 3 * E * H * model.shapes.inner
    assert model.skeleton.weights + sum(layer.size.weights for layer in model.layers) == checkpoint.nbytes // 4


def test_computing_is_the_weights_that_a_token_uses(family_checkpoint: MakeCheckpoint) -> None:
    asked = Asked(tokens=1920, sequence=96)
    model, found = stages(family_checkpoint("qwen3_moe"), asked)
    shapes = model.shapes
    assert shapes.rows * shapes.experts == shapes.tokens * shapes.top_k  # so none is filled up
    layers = [layer for layer in model.layers[: model.upto] if layer.experts]
    routed = sum(layer.routed for layer in layers) * shapes.top_k // shapes.experts
    others = sum(layer.size.weights - layer.routed for layer in model.layers[: model.upto])
    expected = 1920 * (2 * routed / 1e6 + 2 * others / 2e6 + len(layers) / 1e3)
    expected += model.upto * (1920 * 20 * shapes.hidden * 4 / 1e5 + 20 / 50)
    assert parts(found["calibrate"], "seconds")["computing"] == pytest.approx(expected)


@pytest.mark.parametrize(("tier", "times"), [("outliers", 2), ("dimensions", 1)])
def test_tiers_that_take_more_passes(tier: str, times: int, family_checkpoint: MakeCheckpoint) -> None:
    asked = Asked(tokens=1920, sequence=96)
    folder = family_checkpoint("qwen3_moe")
    plain = stages(folder, asked)[1]["calibrate"]
    more = stages(folder, replace(asked, tiers=(tier,)))[1]["calibrate"]
    assert parts(more, "seconds")["computing"] == pytest.approx(times * parts(plain, "seconds")["computing"])
    assert more.disk.value > plain.disk.value


def test_gradients_keep_the_inputs_of_all_layers(family_checkpoint: MakeCheckpoint) -> None:
    asked = Asked(tokens=1920, sequence=96, tiers=("gradient",))
    model, found = stages(family_checkpoint("qwen3_moe"), asked)
    inputs = parts(found["calibrate"], "memory")["inputs of all layers, or --spill"]
    assert inputs == len(model.layers) * 1920 * model.shapes.hidden * 4


def test_a_layer_is_read_while_the_one_before_it_computes(family_checkpoint: MakeCheckpoint) -> None:
    folder, asked = family_checkpoint("qwen3_moe"), Asked(tokens=1920, sequence=96)
    fast = replace(RATES, read=Rate(1e12, "B/s"))
    model, found = stages(folder, asked, rates=fast)
    assert found["calibrate"].bound == "compute"
    assert parts(found["calibrate"], "seconds")["waiting for the disk"] < 0.01
    slow = replace(RATES, read=Rate(1.0, "B/s"))
    _, found = stages(folder, asked, rates=slow)
    stage = found["calibrate"]
    assert stage.bound == "disk"
    read = model.skeleton.stored + sum(layer.size.stored for layer in model.layers[: model.upto])
    computing = parts(stage, "seconds")["computing"] * (model.upto - 1) / model.upto
    assert parts(stage, "seconds")["waiting for the disk"] == pytest.approx(read - computing, rel=1e-3)


def test_memory_is_a_layer_its_buffer_and_the_hidden_states(family_checkpoint: MakeCheckpoint) -> None:
    asked = Asked(tokens=100_000, plans=3)
    model, found = stages(family_checkpoint("qwen3_moe"), asked)
    memory, largest = parts(found["calibrate"], "memory"), max(layer.size.weights for layer in model.layers)
    hidden = 100_000 * model.shapes.hidden * 4
    assert memory["the process itself"] == 1000
    assert memory["a layer's parameters"] == memory["a layer as it is stored"] == 4 * largest
    assert memory["hidden states"] == hidden + 8 * 100_000
    assert parts(found["evaluate"], "memory")["hidden states"] == 4 * hidden + 8 * 100_000


def test_experts_are_held_almost_twice_while_they_are_made(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But in pieces where memory is short; where computing takes more than that, nothing is added, nor for experts that
    are just copied."""
    asked = Asked(4096)
    for name in ("qwen3_moe", "gpt_oss"):
        checkpoint = open_checkpoint(family_checkpoint(name))
        layout = find_layout(checkpoint)
        model = counted(checkpoint, layout, FLOAT32, asked)
        assert {layer.copied for layer in model.layers} == {name == "qwen3_moe"}
        if name == "qwen3_moe":
            assert job_of(checkpoint, layout, model, RATES, asked, ROOM).converted == 0
    experts = 4 * max(layer.routed for layer in model.layers)

    def added(budget: Budget, computing: float) -> float:
        device = [Part("activations", computing, "assumed")]
        memory, _ = job_of(checkpoint, layout, model, RATES, asked, budget).resident([], device)
        return sum(part.value for part in memory.parts if part.name == "experts as they are made, beyond that")

    assert added(ROOM, 100) == pytest.approx(0.8 * experts - 100)
    assert added(ROOM, experts) == 0
    monkeypatch.setattr(estimating, "PIECE", experts // 8)
    assert added(Budget(4 * experts), 100) == pytest.approx(0.8 * experts / 4 - 100)


def test_what_has_no_room_goes_to_a_file(family_checkpoint: MakeCheckpoint) -> None:
    folder, asked = family_checkpoint("qwen3_moe"), Asked(tokens=100_000)
    model, found = stages(folder, asked)
    whole = found["calibrate"].memory.value - 1000
    hidden = parts(found["calibrate"], "memory")["hidden states"]
    _, found = stages(folder, asked, Budget(int(whole - hidden / 2)))
    assert parts(found["calibrate"], "disk")["hidden states in a file"] == pytest.approx(hidden / 2, abs=1)
    assert "hidden states go to a file" in found["calibrate"].notes[0]
    assert "groups of experts" not in found["calibrate"].notes[0]
    _, found = stages(folder, asked, Budget(int(whole - hidden - 1000)))
    assert "a layer is run in groups of experts" in found["calibrate"].notes[0]


def test_text_that_the_disk_has_no_room_for_is_taken_in_groups(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are read and filled once for each; what needs all text at once needs another folder."""
    folder, asked = family_checkpoint("qwen3_moe"), Asked(tokens=100_000)
    _, whole = stages(folder, asked)
    hidden = parts(whole["calibrate"], "memory")["hidden states"]
    little = Budget(int(whole["calibrate"].memory.value - 1000 - hidden))
    monkeypatch.setattr(estimating.shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(hidden / 2.5)))
    _, found = stages(folder, asked, little)
    assert "taken in 3 groups, each a pass over the weights" in found["calibrate"].notes[0]
    assert parts(found["calibrate"], "disk")["hidden states in a file"] == int(hidden / 2.5)
    before, now = (parts(each["calibrate"], "seconds") for each in (whole, found))
    assert now["computing"] == pytest.approx(before["computing"])
    assert now["making parameters"] > 2 * before["making parameters"]
    assert "taken in 5 groups" in found["evaluate"].notes[0]  # of the original and a plan
    assert set(not_by_segments(TIERS)) == estimating.AT_ONCE
    _, found = stages(folder, Asked(tokens=100_000, tiers=("outliers",)), little)
    assert "too little: name another folder (--spill)" in found["calibrate"].notes[0]


def test_a_gpu_holds_the_layer_and_the_host_its_buffer(family_checkpoint: MakeCheckpoint) -> None:
    rates = replace(RATES, transfer=Rate(1e6, "B/s"))
    model, found = stages(family_checkpoint("qwen3_moe"), Asked(tokens=4096), Budget(1 << 40, 1 << 36), rates)
    stage = found["calibrate"]
    assert stage.gpu_memory is not None
    assert "a layer's parameters" in parts(stage, "gpu_memory")
    assert "a layer as it is stored" in parts(stage, "memory")
    assert "skeleton" not in parts(stage, "memory")
    moved = model.skeleton.stored + sum(layer.size.stored for layer in model.layers[: model.upto])
    assert parts(stage, "seconds")["making parameters"] == pytest.approx(moved / 1e6)


def test_a_refit_is_forwards_of_the_experts_rows_of_a_layer_and_its_tensors(family_checkpoint: MakeCheckpoint) -> None:
    asked = Asked(tokens=1920, sequence=96, keep=0.5)
    model, found = stages(family_checkpoint("qwen3_moe"), asked)
    H, K, E = model.shapes.hidden, model.shapes.top_k, model.shapes.experts
    layers = [layer for layer in model.layers if layer.experts]
    experts = sum(1920 * 2 * layer.routed * K / E / 1e6 for layer in layers)
    ridge, refine = found["refit"], found["refit --refine"]
    assert parts(ridge, "seconds")["ridge, 6 forwards of the experts"] == pytest.approx(6 * experts)
    assert parts(refine, "seconds")["refine, 17 more"] == pytest.approx(17 * experts)
    steps = refine_steps(1920, K, {str(number): E // 2 for number in range(len(layers))})
    assert refine.seconds.value - ridge.seconds.value == pytest.approx(17 * experts + STEP * steps)
    assert len(Ridge().factors) == FACTORS
    assert (Refine().sweeps, Refine().epochs, Refine().batch) == (SWEEPS, EPOCHS, BATCH)
    assert refine_steps(10_000, 2, {"a": 8, "b": 1}) == 2 * 3 * (8 * 2 + 16)  # 2025 and 16200 rows of an expert
    assert parts(ridge, "memory")["rows of a layer"] == 1920 * H * (4 * (2 + FACTORS) + 4)
    down = sum(layer.routed for layer in layers) // 3 * 4 // 2
    assert (ridge.disk.value, refine.disk.value) == (down, 3 * down)
    assert "an estimate" in ridge.notes[-1]


def test_what_cannot_be_refitted_is_said(family_checkpoint: MakeCheckpoint) -> None:
    folder, asked = family_checkpoint("qwen3_moe"), Asked(tokens=100_000)
    _, found = stages(folder, asked)
    working = sum(part.value for part in found["refit"].memory.parts if part.name in BESIDE)
    _, little = stages(folder, asked, Budget(int(found["refit"].memory.value - working - 2000)))
    assert "layers are too large for it: allow more" in little["refit"].notes[0]
    checkpoint = open_checkpoint(folder)
    layout = find_layout(checkpoint)
    model = counted(checkpoint, layout, FLOAT32, asked)
    told = estimate(job_of(checkpoint, layout, model, RATES, asked, ROOM), "it is stored as gptq")
    assert [stage.name for stage in told if "it cannot be refitted: it is stored as gptq" in stage.notes] == [
        "refit", "refit --refine",
    ]  # fmt: skip


BESIDE = ("hidden states", "rows of a layer", "copies of the down projections")


@pytest.mark.parametrize("tiers", [(), ("dimensions", "vocabulary", "weights")])
def test_statistics_take_what_was_said(
    tiers: tuple[str, ...], family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = family_checkpoint("qwen3_moe")
    data = TokenData(tuple(Batch(name, families.input_ids("qwen3_moe", 1, 40, 0)) for name in "ab"), {})
    calibrate(folder, data, FLOAT32, tiers=tiers, out=tmp_path / "s.safetensors")
    _, found = stages(folder, Asked(tokens=80, domains=2, tiers=tiers))
    size = (tmp_path / "s.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "s.safetensors").read_bytes()[:8], "little") + 8
    assert parts(found["calibrate"], "disk")["statistics"] == size - header


def test_what_cannot_be_run_is_said(family_checkpoint: MakeCheckpoint) -> None:
    checkpoint, asked = open_checkpoint(family_checkpoint("qwen3_moe")), Asked(tokens=512)
    layout = find_layout(checkpoint)
    model = counted(checkpoint, layout, FLOAT32, asked)

    def notes(config: dict[str, object], only_pruned: str = "") -> tuple[str, ...]:
        changed = replace(checkpoint, config={**checkpoint.config, **config})
        known = replace(layout, family=replace(layout.family, only_pruned=only_pruned))
        return estimate(job_of(changed, known, model, RATES, asked, ROOM))[0].notes

    before = "it cannot be run, only pruned: "
    assert notes({}, "it has no causal forward") == (f"{before}it has no causal forward",)
    assert notes({"model_type": "kimi_k2"}) == (f"{before}transformers has no class for model_type 'kimi_k2'",)
    assert notes({"model_type": "kimi_k2", "auto_map": {"AutoModelForCausalLM": "m.M"}}) == ()
    (note,) = notes({"quantization_config": {"quant_method": "bitsandbytes"}})
    assert note.startswith(before)
    assert "bitsandbytes" in note


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in families.NO_CALIBRATION])
def test_every_family_is_counted(name: str, family_checkpoint: MakeCheckpoint) -> None:
    _, found = stages(family_checkpoint(name), Asked(tokens=512, keep=0.5))
    assert all(stage.seconds.value > 0 and stage.memory.value > 0 for stage in found.values())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tokens": 0}, "--tokens 0"),
        ({"tokens": 1, "sequence": 0}, "--sequence-length 0"),
        ({"tokens": 1, "domains": 0}, "--domains 0"),
        ({"tokens": 1, "plans": -1}, "--plans -1"),
    ],
)
def test_what_cannot_be_asked(asked: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Asked(**asked)


@pytest.mark.parametrize(
    ("key", "value", "width"),
    [("hidden_size", 1 << 20, None), ("head_dim", 1 << 20, 16), ("num_attention_heads", 1 << 20, 16)],
)
def test_the_probe_computes_with_nothing_that_config_alone_says(
    key: str, value: int, width: int | None, family_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = open_checkpoint(family_checkpoint("qwen3_moe"))
    layout, asked = find_layout(checkpoint), Asked(tokens=512)
    true = counted(checkpoint, layout, FLOAT32, asked).shapes
    told = counted(replace(checkpoint, config={**checkpoint.config, key: value}), layout, FLOAT32, asked).shapes
    assert told.hidden == true.hidden
    assert told.heads * told.head_size <= (width or 1) * max(true.hidden, true.heads * true.head_size)


def test_a_size_that_no_model_has_is_refused(family_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(family_checkpoint("qwen3_moe"))
    layout = find_layout(checkpoint)
    config = {**checkpoint.config, "vocab_size": 1 << 40}
    with pytest.raises(InputError, match="config.json: vocab_size is .*, and no model has more"):
        counted(replace(checkpoint, config=config), layout, FLOAT32, Asked(tokens=1))


def test_half_the_bytes_in_half_the_type(family_checkpoint: MakeCheckpoint) -> None:
    folder, asked = family_checkpoint("qwen3_moe"), Asked(tokens=4096)
    checkpoint = open_checkpoint(folder)
    half = counted(checkpoint, find_layout(checkpoint), replace(FLOAT32, dtype="bfloat16"), asked)
    assert (half.shapes.dtype, half.itemsize) == (torch.bfloat16, 2)

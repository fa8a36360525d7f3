"""Numbers that are not finite: every way through a model refuses them in one line, with the layer and the weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moekern import observe
from moekern.architectures import find_layout
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.iteration.rounds import Method, iterate
from moekern.model.compute import Compute
from moekern.model.finite import all_finite, blamed_weight
from moekern.plan.document import LayerPlan, Plan
from moekern.verification.logits import compare_forward
from tests.helpers import families
from tests.helpers.commands import moekern
from tests.helpers.quantised import fp8, rewrite

MakeCheckpoint = Callable[[str], Path]
NAN, INF = float("nan"), float("inf")
LAYER, FLOAT32 = "model.layers.2.", Compute(dtype="float32")
WRONG = {
    "expert": (LAYER + "mlp.experts.5.down_proj.weight", "layer 2: mlp.experts.down_proj is not finite for expert 5"),
    "router": (LAYER + "mlp.gate.weight", "layer 2: mlp.gate.weight is not finite for expert 0"),
    "attention": (LAYER + "self_attn.v_proj.weight", "layer 2: self_attn.v_proj.weight is not finite"),
    "norm": (LAYER + "input_layernorm.weight", "layer 2: input_layernorm.weight is not finite"),
    "shared": (LAYER + "mlp.shared_expert.up_proj.weight", "layer 2: mlp.shared_expert.up_proj.weight is not finite"),
    "embedding": ("model.embed_tokens.weight", "model.embed_tokens.weight is not finite in row 0 of 96"),
    "final norm": ("model.norm.weight", "model.norm.weight is not finite"),
    "head": ("lm_head.weight", "lm_head.weight is not finite in row 0 of 96"),
}
BEHIND = ("final norm", "head")  # what measuring does not come to


def changed(folder: Path, out: Path, changes: dict[str, Callable[[Tensor], Tensor]]) -> Path:
    return rewrite(folder, out, lambda name, tensor: {name: changes.get(name, lambda same: same)(tensor)})


def first_number(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def text(name: str) -> TokenData:
    ids = families.input_ids(name, 4, 40, 1)
    ids[0, 0] = 0  # the row of the embeddings that is damaged
    return TokenData((Batch("text", ids),), {}, 4)


def some_plan(folder: Path, keep: tuple[int, ...] = (0, 2, 5, 7)) -> Plan:
    return Plan({key: LayerPlan(keep) for key in find_layout(open_checkpoint(folder)).layers}, {})


@pytest.mark.parametrize("part", WRONG)
def test_the_first_weight_that_is_not_finite_is_named(
    part: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    name, message = WRONG[part]
    folder = changed(family_checkpoint("qwen2_moe"), tmp_path / "m", {name: first_number(NAN)})
    data = text("qwen2_moe")
    with pytest.raises(InputError) as found:
        evaluate(folder, data, {}, FLOAT32)
    assert message in str(found.value)
    if part in BEHIND:
        calibrate(folder, data, FLOAT32)
        return
    with pytest.raises(InputError) as found:
        calibrate(folder, data, FLOAT32, out=tmp_path / "s")
    assert message in str(found.value)
    assert "--dtype" not in str(found.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("part", ["expert", "head"])
def test_the_other_passes_over_a_model_name_it_too(
    part: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    name, message = WRONG[part]
    folder = changed(family_checkpoint("qwen2_moe"), tmp_path / "m", {name: first_number(INF)})
    data, plan = text("qwen2_moe"), some_plan(folder)
    with pytest.raises(InputError, match=message):
        compare_forward(folder, plan, folder, data.batches)
    with pytest.raises(InputError, match=message):
        calibrate(folder, data, FLOAT32, tiers=["gradient"])
    if part not in BEHIND:
        with pytest.raises(InputError, match=message):
            iterate(folder, data, Method("reap", 4), FLOAT32)


@pytest.mark.parametrize("part", ["expert", "router", "embedding"])
def test_a_model_in_memory_too(part: str, family_checkpoint: MakeCheckpoint) -> None:
    name, message = WRONG[part]
    model = families.load(family_checkpoint("qwen2_moe"))
    if part == "expert":
        model.model.layers[2].mlp.experts.down_proj.data[5, 0, 0] = NAN
    else:
        model.get_parameter(name).data.view(-1)[0] = NAN
    with pytest.raises(InputError, match=message), observe(model):
        families.forward(model, text("qwen2_moe").batches[0].input_ids)


def test_evaluate_says_whose_numbers_and_ends_with_2(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = changed(family_checkpoint("qwen2_moe"), tmp_path / "m", {WRONG["expert"][0]: first_number(NAN)})
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": text("qwen2_moe").batches[0].input_ids[0].tolist()}))
    (tmp_path / "half.json").write_text(some_plan(folder).to_json())
    data = ("--data", f"maths={tmp_path / 'ids.jsonl'}", "--sequence-length", "20")
    done = moekern("evaluate", folder, tmp_path / "half.json", *data, "--spill", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert WRONG["expert"][1] in done.stderr
    assert "the original, domain maths" in done.stderr


def test_an_expert_that_only_a_plan_uses_is_named_by_its_own_number(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Expert 5 is masked by the router's bias, so the original is sound until it is one of two that are left."""
    mlp = LAYER + "mlp."
    changes = {mlp + "router.bias": lambda bias: bias.index_fill(0, torch.tensor(5), -INF)}
    sound = changed(family_checkpoint("gpt_oss"), tmp_path / "sound", changes)
    data, plan = text("gpt_oss"), some_plan(sound, (3, 5))
    assert evaluate(sound, data, {"two": plan}, FLOAT32)["two"]["text"].nll > 0
    spoil = {mlp + "experts.down_proj": lambda w: w.index_fill(0, torch.tensor(5), NAN)}
    folder = changed(sound, tmp_path / "m", spoil)
    assert evaluate(folder, data, {}, FLOAT32)["original"]["text"].nll > 0
    with pytest.raises(
        InputError, match=r"layer 2: mlp.experts.down_proj is not finite for expert 5; seen in plan two, domain text"
    ):
        evaluate(folder, data, {"two": plan}, FLOAT32)
    sums = calibrate(folder, data, FLOAT32).layer("2")  # an expert that no token reaches harms nothing
    assert int(sums.count[5]) == 0
    assert sums.logit_gram.isfinite().all()
    for tier in ("replay", "gradient", "weights"):  # but these look at it
        with pytest.raises(
            InputError, match=r"layer 2.*(down_proj is not finite for expert 5|expert 5: its weights are not finite)"
        ):
            calibrate(folder, data, FLOAT32, tiers=[tier])


def test_float16_that_overflows_is_told_from_weights_that_are_wrong(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    name, data = WRONG["expert"][0], text("qwen2_moe")
    half = Compute(dtype="float16")
    grown = changed(family_checkpoint("qwen2_moe"), tmp_path / "outputs", {name: lambda w: torch.full_like(w, 6e4)})
    with pytest.raises(InputError, match=r"layer 2: expert 5: outputs are not finite, though weights are.*--dtype"):
        calibrate(grown, data, half)
    with pytest.raises(InputError, match=r"layer 2: hidden states are not finite, though weights are.*--dtype"):
        evaluate(grown, data, {}, half)
    calibrate(grown, data, FLOAT32)
    too_large = changed(family_checkpoint("qwen2_moe"), tmp_path / "weights", {name: first_number(1e6)})
    with pytest.raises(InputError, match=r"is not finite for expert 5 in float16.*--dtype"):
        calibrate(too_large, data, half)


def test_quantised_codes_that_are_nan_are_named(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    codes = {name: lambda w: w.view(torch.uint8).index_fill(0, torch.tensor(0), 0x7F).view(torch.float8_e4m3fn)}
    sound = fp8(family_checkpoint("qwen3_moe"), tmp_path / "sound")
    folder = changed(sound, tmp_path / "m", codes)
    with pytest.raises(InputError, match="layer 1: mlp.experts.gate_up_proj is not finite for expert 3"):
        calibrate(folder, text("qwen3_moe"))


def test_tokens_that_the_head_masks_are_no_fault(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """-inf for tokens that no text uses: the loss is finite, and so is the divergence of a plan."""
    folder, data = family_checkpoint("qwen2_moe"), text("qwen2_moe")
    ids = data.batches[0].input_ids.clamp(max=90)
    masked = TokenData((Batch("text", ids),), {}, 4)
    plan, hidden = some_plan(folder), nn.Linear.forward

    def forward(self: nn.Linear, value: Tensor) -> Tensor:
        out = hidden(self, value)
        return out.index_fill(-1, torch.arange(91, 96), -INF) if out.shape[-1] == 96 else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        loss = evaluate(folder, masked, {"half": plan}, FLOAT32)["half"]["text"]
        assert compare_forward(folder, some_plan(folder, tuple(range(8))), folder, masked.batches).equal
        with pytest.raises(InputError, match=r"domain text: a token of the text has a logit of -inf"):
            evaluate(folder, data, {}, FLOAT32)
    assert 0 < loss.kl < 10


def test_the_experts_of_a_pruned_layer_go_by_their_original_numbers() -> None:
    layer = nn.Module()
    layer.experts = nn.Module()
    layer.experts.up_proj = nn.Parameter(torch.zeros(3, 2, 2))
    layer.gate = nn.Linear(2, 4, bias=True)  # a row more, of what is no expert
    held = (1, 4, 6)
    layer.gate.bias.data[1] = -INF
    assert blamed_weight(layer, ["gate"], held) is None
    layer.gate.weight.data[1, 0] = INF
    assert blamed_weight(layer, ["gate"], held) == "gate.weight is not finite for expert 4"
    layer.experts.up_proj.data[0, 0, 0] = layer.experts.up_proj.data[2, 1, 1] = NAN
    assert blamed_weight(layer, ["gate"], held) == "experts.up_proj is not finite for experts 1, 6"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_number_is_enough(dtype: torch.dtype) -> None:
    value = torch.full((3, 5, 7), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(value)
    for wrong in (NAN, INF, -INF):
        value[2, 3, 4] = wrong
        assert not all_finite(value)

"""A quantised checkpoint runs as its plain twin does, bit for bit, in every format that is published."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from moekern.architectures import find_layout
from moekern.architectures.quantisation import inputs_line, unread
from moekern.calibration.calibrate import calibrate
from moekern.calibration.observe import observe
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.estimation.overview import overview
from moekern.model import transformers_api as api
from moekern.model.compute import Compute
from moekern.model.dequantised import dense, readings
from moekern.model.layerwise import open_layerwise
from moekern.plan.make import make_plan
from moekern.pruning.prune import prune
from moekern.statistics.file import Statistics
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import families, remote_code
from tests.helpers.passes import Given
from tests.helpers.quantised import rewrite
from tests.helpers.quantised_models import FORMATS, plain, twins
from tests.helpers.threads import using_threads

Sources = Callable[[str], Path]
PUBLISHED = {  # family -> a format that it is published in, beside Qwen3-MoE in every one
    "deepseek_v3": "fp8_block",
    "deepseek_v4": "mxfp4",
    "glm4_moe": "compressed_fp8",
    "kimi_k25": "compressed_int4",
    "minimax_m2": "fp8_static",
    "mixtral": "awq",
    "qwen3_5_moe": "gptq",
}
# Formats that differ from another in what `dense` makes of them alone, which each is held against below.
LIKE_ANOTHER = (
    "compressed_int8", "compressed_int8_ordered", "compressed_int3", "compressed_w8a8", "compressed_w8a8_zero",
    "gptq_2", "gptq_3", "gptq_8", "gptq_8_v2", "awq_8", "auto_round_v2", "auto_round_awq", "quark_fp8",
)  # fmt: skip
CASES = [
    *(pytest.param("qwen3_moe", kind, marks=[pytest.mark.whole] * (kind in LIKE_ANOTHER)) for kind in FORMATS),
    *(case if n < 3 else pytest.param(*case, marks=pytest.mark.whole) for n, case in enumerate(PUBLISHED.items())),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    return lambda name: root / name if (root / name).exists() else plain(name, root / name)


def _data(name: str) -> TokenData:
    return TokenData(tuple(Batch("d", families.input_ids(name, 2, 12, seed)) for seed in (1, 2)), {}, 2)


def _logits(folder: Path, name: str, compute: Compute = Compute()) -> Tensor:
    checkpoint, seen = open_checkpoint(folder), list[Tensor]()
    with open_layerwise(checkpoint, find_layout(checkpoint), compute) as streamed:
        run = Batch("d", families.input_ids(name))
        streamed.run([0], Given(lambda task: seen.append(streamed.compute(run).logits)))
    return seen[0]


def _same(a: Statistics, b: Statistics) -> bool:
    pairs = [(a.layer(key), b.layer(key)) for key in b.layers]
    return a.layers.keys() == b.layers.keys() and all(
        torch.equal(getattr(x, f.name), getattr(y, f.name)) for x, y in pairs for f in fields(x)
    )


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_and_statistics_are_those_of_the_plain_twin(
    family: str, kind: str, source: Sources, tmp_path: Path
) -> None:
    stored, dense_twin = twins(source(family), tmp_path, kind)
    got = _logits(stored, family)
    assert got.isfinite().all()
    assert torch.equal(got, _logits(dense_twin, family))
    assert not torch.equal(got, _logits(source(family), family))
    assert _same(calibrate(stored, _data(family)), calibrate(dense_twin, _data(family)))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(48, 64), (16, 96)], ids=str)
def test_a_weight_is_what_its_definition_says(kind: str, shape: tuple[int, int]) -> None:
    make, config = FORMATS[kind]
    parts, weight = make(*shape, torch.Generator().manual_seed(3))
    assert torch.equal(dense(parts, config, torch.float32), weight)
    assert torch.equal(dense(parts, config, torch.bfloat16), weight.bfloat16())
    assert unread(config) is None


PRUNED = ("fp8_static", "mxfp4", "modelopt_nvfp4", "compressed_int4_ordered", "gptq", "auto_round")


@pytest.mark.parametrize("kind", [
    kind if kind in PRUNED else pytest.param(kind, marks=pytest.mark.whole) for kind in FORMATS
])  # fmt: skip
def test_pruned_it_is_the_original_with_experts_masked(kind: str, source: Sources, tmp_path: Path) -> None:
    folder, data = twins(source("qwen3_moe"), tmp_path, kind)[0], _data("qwen3_moe")
    plan = make_plan(calibrate(folder, data), "gated_norm", keep=4)
    prune(folder, plan, tmp_path / "pruned")
    assert verify(folder, plan, tmp_path / "pruned").problems == ()
    verdict = compare_forward(folder, plan, tmp_path / "pruned", data.batches)
    assert (verdict.dtype, verdict.equal) == ("float32", True)


def test_in_memory_the_plain_twin_is_seen_doing_the_same(source: Sources, tmp_path: Path) -> None:
    folder, dense_twin = twins(source("qwen3_moe"), tmp_path, "compressed_int4")
    whole, data = _whole(dense_twin, None), _data("qwen3_moe")
    with using_threads(1), observe(whole) as seen:
        for batch in data.batches:
            families.forward(whole, batch.input_ids)
    assert _same(calibrate(folder, data), seen)


def test_gradients_are_those_of_the_plain_twin(source: Sources, tmp_path: Path) -> None:
    stored, dense_twin = twins(source("qwen3_moe"), tmp_path, "compressed_nvfp4")
    with using_threads(1):
        got, want = (calibrate(f, _data("qwen3_moe"), tiers=["gradient"]) for f in (stored, dense_twin))
    assert _same(got, want)
    assert got.tiers == ("gradient",)


def test_the_text_model_may_name_the_format(source: Sources, tmp_path: Path) -> None:
    """As Kimi-K2.5's config.json does; the size of blocks stands there alone."""
    stored, dense_twin = twins(source("kimi_k25"), tmp_path, "fp8_block")
    config = json.loads((stored / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (stored / "config.json").write_text(json.dumps(config))
    assert torch.equal(_logits(stored, "kimi_k25"), _logits(dense_twin, "kimi_k25"))


def test_code_of_its_own_computes_with_plain_weights(tmp_path: Path) -> None:
    source = remote_code.write(tmp_path / "own", "masks")
    found = twins(source, tmp_path, "compressed_int4")
    for folder in found:
        for code in source.glob("*.py"):
            shutil.copy(code, folder)
    compute = Compute(dtype="bfloat16", trust_remote_code=True)
    got, want = (calibrate(folder, _data("mixtral"), compute) for folder in found)
    assert _same(got, want)


def test_some_experts_may_be_plain(source: Sources, tmp_path: Path) -> None:
    stored, dense_twin = twins(source("qwen3_moe"), tmp_path, "compressed_int4", only="experts.1.")
    names = load_file(stored / "model.safetensors")
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in names
    assert torch.equal(_logits(stored, "qwen3_moe"), _logits(dense_twin, "qwen3_moe"))


def test_the_dtype_is_that_of_the_computation(source: Sources, tmp_path: Path) -> None:
    """In float32 codes times scales keep all their bits, and plain weights are float32 too."""
    stored, _ = twins(source("qwen3_moe"), tmp_path, "fp8_static")
    tensors = load_file(stored / "model.safetensors")

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if f"{name}_scale" in tensors:
            return {name: tensor.float() * tensors[f"{name}_scale"]}
        return {} if name.endswith("_scale") else {name: tensor.float()}

    exact = rewrite(stored, tmp_path / "exact", change, quantization_config=None)
    got = _logits(stored, "qwen3_moe", Compute(dtype="float32"))
    assert got.dtype == torch.float32
    assert torch.equal(got, _logits(exact, "qwen3_moe", Compute(dtype="float32")))


def _whole(folder: Path, quantisation: Any) -> Any:
    loader = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it merges the two configs
        model = loader.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantisation)
    for value in (*model.parameters(), *model.buffers()):
        value.data = value.data.clone()
    return model.eval()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("deepseek_v4", "mxfp4"),
        ("qwen3_moe", "fp8_block_e8m0"),
        ("qwen3_moe", "compressed_int4"),
        ("qwen3_moe", "compressed_fp8"),
    ],
)
def test_logits_are_those_of_the_model_that_transformers_dequantises(
    family: str, kind: str, source: Sources, tmp_path: Path
) -> None:
    if kind.startswith("compressed"):
        pytest.importorskip("compressed_tensors")
        quantisation: Any = transformers.CompressedTensorsConfig(dequantize=True)
    else:
        quantisation = transformers.FineGrainedFP8Config(dequantize=True)
    folder, _ = twins(source(family), tmp_path, kind)
    whole = _whole(folder, quantisation)
    assert torch.equal(_logits(folder, family), families.forward(whole, families.input_ids(family)))


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind.startswith("compressed")])
def test_weights_are_those_of_compressed_tensors(kind: str) -> None:
    """NVFP4 among them, whose experts transformers 5.23 does not divide by their global scale."""
    package = pytest.importorskip("compressed_tensors")
    make, config = FORMATS[kind]
    parts, _ = make(16, 64, torch.Generator().manual_seed(3))
    weights = dict(config["config_groups"]["group_0"]["weights"])
    if parts.pop("weight_g_idx", None) is not None:  # its decompressor takes groups in order alone
        weights |= {"symmetric": False, "actorder": None}
    scheme = package.quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = package.compressors.BaseCompressor.get_value_from_registry(config["format"])
    want = compressor.decompress(dict(parts), scheme)["weight"].bfloat16()
    assert torch.equal(dense(parts, config, torch.bfloat16), want)


@pytest.mark.parametrize("shape", [(), (3,), (3, 1, 1), (3, 32), (3, 32, 1), (3, 1, 64), (3, 2, 4)])
def test_scales_of_a_stack_are_those_of_its_experts(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 32, 64, generator=generator).to(torch.float8_e4m3fn)
    scale = 1 + torch.rand(shape, generator=generator)
    grid = scale.reshape(*shape, *[1] * (3 - len(shape))) if shape else scale
    rows, columns = (1, 1) if grid.ndim < 3 else (n // s for n, s in zip((32, 64), grid.shape[1:], strict=True))
    spread = grid if grid.ndim < 3 else grid.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    got = dense({"weight": weight, "scale": scale}, {}, torch.float32)
    assert torch.equal(got, weight.float() * spread)


def test_a_stack_of_bytes_has_scales_of_powers_of_two() -> None:
    """MXFP8, as in Inkling 2's experts."""
    weight, scale = torch.ones(2, 8, 64).to(torch.float8_e4m3fn), torch.full((2, 8, 2), 130, dtype=torch.uint8)
    assert torch.equal(dense({"weight": weight, "weight_scale": scale}, {}, torch.float32), torch.full((2, 8, 64), 8.0))


def test_names_of_parts_lead_to_the_weight() -> None:
    first = {name: next(readings(name)) for name in ("a.weight", "a.weight_packed", "a.qzeros", "a.scale", "a.bias")}
    assert first == {
        "a.weight": ("a.weight", "weight"),
        "a.weight_packed": ("a.weight", "weight_packed"),
        "a.qzeros": ("a.weight", "qzeros"),
        "a.scale": ("a.scale", "weight"),  # a parameter of the model, unless it has none of this name
        "a.bias": ("a.bias", "weight"),
    }
    assert ("e.gate_up_proj", "blocks") in readings("e.gate_up_proj_blocks")
    assert ("e.w13_weight", "weight_scale") in readings("e.w13_weight_scale")


def test_every_part_is_read_with_the_layer_of_its_weight(source: Sources, tmp_path: Path) -> None:
    folder, _ = twins(source("kimi_k25"), tmp_path, "compressed_int4")
    loader, layout = api.open_loader(folder, None), find_layout(open_checkpoint(folder))
    name, _ = loader.decoder_layers()
    for key, place in loader.moe_places(layout).items():
        found = {api.layer_index(name, loader.model_key(tensor.name)) for tensor in layout.layers[key].tensors}
        assert found == {place}


def test_scales_of_activations_that_are_left_out_are_told(source: Sources, tmp_path: Path) -> None:
    names = open_checkpoint(twins(source("qwen3_moe"), tmp_path, "fp8_static")[0]).tensors
    assert inputs_line(names) == "activations are not quantised: input_scale of the checkpoint are not applied"
    assert inputs_line(open_checkpoint(source("qwen3_moe")).tensors) is None
    assert [note for note in overview(tmp_path / "fp8_static").notes if "input_scale" in note]


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("fp8_static", lambda name, t: {} if name.endswith("1.up_proj.weight_scale") else {name: t}, "not a weight"),
        ("compressed_int4", lambda name, t: {name: t[:-1] if name.endswith("1.up_proj.weight_packed") else t}, "R"),
        ("modelopt_nvfp4", lambda name, t: {} if name.endswith("1.up_proj.weight_scale_2") else {name: t}, "not a"),
    ],
)
def test_a_refusal_names_the_weight_and_another_way(
    kind: str, spoil: Callable[[str, Tensor], dict[str, Tensor]], message: str, source: Sources, tmp_path: Path
) -> None:
    folder = rewrite(twins(source("qwen3_moe"), tmp_path, kind)[0], tmp_path / "spoilt", spoil)
    name = re.escape("model.layers.0.mlp.experts.1.up_proj.weight")
    with pytest.raises(InputError, match=f"^{name}: .*{message}.*an unquantised twin") as caught:
        calibrate(folder, _data("qwen3_moe"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "torchao"}, "a forward pass over torchao weights is not supported"),
        ({"quant_method": ["fp8"]}, "a forward pass over .* weights is not supported"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R3": {}}}},
            "transforms of act",
        ),
    ],
)
def test_weights_that_are_not_what_their_numbers_say_are_refused(
    config: dict[str, Any], message: str, source: Sources, tmp_path: Path
) -> None:
    folder = rewrite(source("qwen3_moe"), tmp_path / "m", lambda name, t: {name: t}, quantization_config=config)
    with pytest.raises(InputError, match=f"{message}.*an unquantised twin"):
        calibrate(folder, _data("qwen3_moe"))
    assert [note for note in overview(folder).notes if re.search(f"{message}.*unquantised twin", note)]

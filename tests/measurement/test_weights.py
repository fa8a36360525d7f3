"""The weights tier: what a checkpoint's weights say, whatever the layout they are stored in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from moekern.architectures.quantisation import block_sizes
from moekern.cli import console
from moekern.cli.app import app
from moekern.criteria import CRITERIA, criterion_named, score_layer
from moekern.errors import InputError
from moekern.kernels.quantised import block_of
from moekern.measurement.weights import weigh
from moekern.plan.document import Plan
from moekern.pruning.prune import prune
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics
from tests.helpers import families
from tests.helpers.in_flight import Half
from tests.helpers.pairwise import thirds
from tests.helpers.quantised import fp8, mxfp4, rewrite
from tests.helpers.quantised_layouts import LAYOUTS, indexed, write_spread
from tests.helpers.quantised_models import plain, twins

MakeCheckpoint = Callable[[str], Path]
WEIGHTS = [f.name for f in fields(LayerStatistics) if f.metadata["tier"] == "weights"]
KEEP = (1, 2, 4, 7)
PARTS = ("gate", "up", "down")
PRUNED = [name for name in families.FAMILIES if name != "ernie4_5_vl_moe"]  # that one cannot be


def kept(sums: LayerStatistics, name: str, keep: tuple[int, ...] = KEEP) -> Tensor:
    value = getattr(sums, name)
    for axis, size in enumerate(value.shape):
        if size:
            value = value.index_select(axis, torch.tensor(keep))
    return value


@pytest.mark.parametrize("name", thirds(PRUNED, 2))
def test_the_pruned_checkpoint_weighs_what_its_experts_weighed(
    name: str, family_checkpoint: MakeCheckpoint, half: Callable[[str], Half]
) -> None:
    """For every family: so each number belongs to its expert, and nothing else is in it."""
    plan = half(name).plan
    before, after = weigh(family_checkpoint(name)), weigh(half(name).folder)
    for key, layer in plan.layers.items():
        a, b = before.layer(key), after.layer(key)
        assert a.weight_count.min() > 0
        assert a.weight_count.min() == a.weight_count.max()
        assert a.router_gram.diagonal().min() > 0
        for field in WEIGHTS:
            # Gram and router products of another number of rows may be rounded otherwise, in float32 in the Gram.
            torch.testing.assert_close(
                getattr(b, field), kept(a, field, layer.keep), rtol=1e-5, atol=1e-4, msg=f"{key} {field}"
            )


def everything(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def literal(folder: Path, layer: str) -> list[list[Tensor]]:
    """The matrices of each expert of a layer of qwen3_moe."""
    tensors, stem = everything(folder), f"model.layers.{layer}.mlp.experts"
    return [[tensors[f"{stem}.{e}.{part}_proj.weight"].double() for part in PARTS] for e in range(8)]


def test_scores_are_those_of_the_weights(family_checkpoint: MakeCheckpoint) -> None:
    folder = family_checkpoint("qwen3_moe")
    statistics = weigh(folder)
    for key in statistics.layers:
        experts = literal(folder, key)
        flat = torch.stack([torch.cat([m.flatten() for m in matrices]) for matrices in experts])
        unit = flat / flat.norm(dim=1, keepdim=True)
        router = everything(folder)[f"model.layers.{key}.mlp.gate.weight"].double()
        ranks = [[m.square().sum() / torch.linalg.matrix_norm(m, 2) ** 2 for m in matrices] for matrices in experts]
        want = {
            "ews": -((unit @ unit.T).sum(1) - 1),
            "rwn": -router.norm(dim=1),
            "wsr": -torch.tensor(ranks).double().mean(1),
            "ewn": flat.norm(dim=1),
            "aimer": -flat.abs().mean(1) / flat.square().mean(1).sqrt(),
        }
        assert want.keys() == {name for name, row in CRITERIA.items() if row.family == "weight"}
        for name, scores in want.items():
            got = score_layer(criterion_named(name), statistics.layer(key), key)
            # float32 sums of 2048 weights at most; the stable rank stops at 1e-3
            torch.testing.assert_close(got, scores, rtol=2e-3 if name == "wsr" else 1e-5, atol=1e-5)


def stable(matrix: Tensor) -> float:
    return float(matrix.double().square().sum() / torch.linalg.matrix_norm(matrix.double(), 2) ** 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_gate_and_up_in_one_tensor_weigh_what_they_weigh_apart(
    transposed: bool, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The same numbers, and the same stable rank to the bit, for one tensor an expert and for stacks of fused ones."""
    folder = family_checkpoint("qwen3_moe")
    tensors = everything(folder)
    for layer in {name.split(".")[2] for name in tensors if ".experts." in name}:
        stem = f"model.layers.{layer}.mlp.experts"
        parts = [[tensors.pop(f"{stem}.{e}.{part}_proj.weight") for part in PARTS] for e in range(8)]
        fused = torch.stack([torch.cat([gate, up]) for gate, up, _ in parts])
        down = torch.stack([down for *_, down in parts])
        for name, value in (("gate_up_proj", fused), ("down_proj", down)):
            tensors[f"{stem}.{name}"] = (value.mT if transposed else value).contiguous()
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    save_file(tensors, stacked / "model.safetensors")
    (stacked / "config.json").write_bytes((folder / "config.json").read_bytes())
    apart, together = weigh(folder), weigh(stacked)
    for key in apart.layers:
        a, b = apart.layer(key), together.layer(key)
        assert torch.equal(a.weight_count, b.weight_count)
        for field in ("weight_square_sum", "weight_gram", "weight_stable_rank"):
            torch.testing.assert_close(getattr(b, field), getattr(a, field), rtol=2e-3, atol=1e-5)
        if not transposed:  # down is the same matrix then
            assert torch.equal(a.weight_stable_rank, b.weight_stable_rank)


FUSED = {  # family -> gate and up in one, down, and whether rows of gate and up alternate
    "gpt_oss": ("experts.gate_up_proj", "experts.down_proj", True),
    "openai_privacy_filter": ("experts.gate_up_proj", "experts.down_proj", False),
    "inkling_mm_model": ("experts.w13_weight", "experts.w2_weight", True),
    "inkling_text": ("experts.gate_up_proj", "experts.down_proj", False),
    "granitemoe": ("input_linear.weight", "output_linear.weight", False),
    "aria_text": ("experts.fc1.weight", "experts.fc2.weight", False),
}


@pytest.mark.parametrize("name", FUSED)
def test_gate_and_up_are_parted_as_the_family_stores_them(name: str, family_checkpoint: MakeCheckpoint) -> None:
    folder, (fused, down, alternating) = family_checkpoint(name), FUSED[name]
    tensors, (key, sums) = everything(folder), next(iter(weigh(folder).layers.items()))
    both, out = (
        next(t for n, t in tensors.items() if f"layers.{key}." in n and n.endswith(f".{end}")) for end in (fused, down)
    )
    for e in range(len(both)):
        rows = both[e] if both.shape[1] == 2 * out.shape[2] else both[e].T
        gate, up = (rows[::2], rows[1::2]) if alternating else rows.chunk(2)
        want = (stable(gate) + stable(up) + stable(out[e])) / 3
        assert float(next(iter(sums.values())).weight_stable_rank[e]) == pytest.approx(want, rel=2e-3)


def test_without_what_costs_much(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    statistics = weigh(family_checkpoint("mixtral"), costly=False)
    statistics.save(tmp_path / "w")
    layer = Statistics.load(tmp_path / "w").layer("0")
    assert layer.tiers == ("weights",)
    assert score_layer(CRITERIA["aimer"], layer, "0").isfinite().all()
    for name in ("ews", "wsr"):
        with pytest.raises(InputError, match=f"{name}: the statistics hold no weight_"):
            score_layer(CRITERIA[name], layer, "0")


@pytest.mark.parametrize("costly", [False, True])
def test_progress_goes_on_within_a_layer(costly: bool, family_checkpoint: MakeCheckpoint) -> None:
    told: list[float] = []
    layers = weigh(
        family_checkpoint("mixtral"), costly=costly, progress=lambda done, total: told.append(done / total)
    ).layers
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, 1)
    assert len(set(told)) > 3 * 8 * len(layers)  # experts of every projection
    assert max(b - a for a, b in zip(told, told[1:], strict=False)) < 1 / len(layers)


@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_quantised_weights_count_as_what_they_stand_for(
    make: Callable[[Path, Path], Path], family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    name = "qwen3_moe" if make is fp8 else "gpt_oss"
    folder = make(family_checkpoint(name), tmp_path / "q")
    sums = weigh(folder).layer("0")
    tensors = everything(folder)
    if make is fp8:
        dense = []
        for part in PARTS:
            weight = tensors[f"model.layers.0.mlp.experts.3.{part}_proj.weight"].float()
            scale = tensors[f"model.layers.0.mlp.experts.3.{part}_proj.weight_scale_inv"]
            grid = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            dense.append(weight * grid[: weight.shape[0], : weight.shape[1]])
    else:
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        dense = []
        for part in ("gate_up_proj", "down_proj"):
            codes = tensors[f"model.layers.0.mlp.experts.{part}_blocks"][3].long()
            scale = tensors[f"model.layers.0.mlp.experts.{part}_scales"][3].float()
            pairs = torch.stack([values[codes & 15], values[codes >> 4]], -1).flatten(-2)
            dense.append(pairs * 2.0 ** (scale[..., None] - 127))
    flat = torch.cat([m.double().flatten() for m in dense])
    assert int(sums.weight_count[3]) == len(flat)
    torch.testing.assert_close(sums.weight_abs_sum[3], flat.abs().sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.weight_square_sum[3], flat.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["mxfp4", "compressed_int4_ordered", "fp8_rows", "auto_round"])
def test_what_a_format_stands_for_is_what_runs(kind: str, tmp_path: Path) -> None:
    """The numbers of the plain twin that the model computes with; DeepSeek V4's FP4 are two codes in an int8."""
    stored, dense = twins(plain("qwen3_moe", tmp_path / "plain"), tmp_path, kind)
    got, want = weigh(stored, costly=False).layer("1"), weigh(dense, costly=False).layer("1")
    assert torch.equal(got.weight_count, want.weight_count)
    # numbers of the twin are rounded to bfloat16
    torch.testing.assert_close(got.weight_abs_sum, want.weight_abs_sum, rtol=1e-3, atol=0)
    torch.testing.assert_close(got.weight_square_sum, want.weight_square_sum, rtol=1e-3, atol=0)


REFUSED = {"odd": "not a weight layout that moekern reads", "f4": "which torch cannot hold"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_quantised_layout_is_read_or_refused_by_name(layout: str, tmp_path: Path) -> None:
    config, tensors = indexed(layout)
    for name, (dtype, shape, raw) in tensors.items():
        if "experts" in name:
            # a finite code, scale and zero point in every layout, and no code that is its zero point
            content = bytes([0x43 if "zero" in name else 0x21]) * len(raw)
            if name.endswith("g_idx") and raw:
                content = (torch.arange(shape[0]) // 32).int().numpy().tobytes()
            if name.endswith("weight_shape"):
                content = torch.tensor([48, 64]).numpy().tobytes()
            tensors[name] = dtype, shape, content
    folder = write_spread(tmp_path / "in", config, tensors, shards=2, pad=0)
    if layout in REFUSED:
        with pytest.raises(InputError, match=rf"experts.*{REFUSED[layout]}"):
            weigh(folder, costly=False)
        return
    sums = weigh(folder, costly=False).layer("0")
    assert sums.weight_count.tolist() == [3 * 48 * 64] * 8
    assert len(set(sums.weight_abs_sum.tolist())) == 1
    assert sums.weight_abs_sum.min() > 0


CONFIGS: dict[str, dict[str, object]] = {
    "deepseek": {"quant_method": "fp8", "weight_block_size": [16, 32]},
    "compressed": {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": {"weights": {"num_bits": 8, "strategy": "channel", "block_structure": None}},
            "b": {"weights": {"num_bits": 8, "strategy": "block", "block_structure": [16, 32]}},
        },
    },
    "no size": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("blocks", [True, False])
def test_a_column_of_scales_is_of_blocks_or_of_rows_by_its_length(
    config: str, blocks: bool, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """32 and 24 columns are one block of 32: a scale for 16 rows is told from one for each row."""

    def quantised(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if ".experts." not in name:
            return {name: tensor}
        rows = 16 if blocks else 1
        scale = 1 + torch.arange(-(-len(tensor) // rows)).float()[:, None]
        values = (tensor / scale.repeat_interleave(rows, 0)[: len(tensor)]).to(torch.float8_e4m3fn)
        return {name: values, f"{name}_scale{'_inv' if config == 'deepseek' else ''}": scale}

    folder = rewrite(family_checkpoint("qwen3_moe"), tmp_path / "q", quantised, quantization_config=CONFIGS[config])
    got, want = weigh(folder, costly=False), weigh(family_checkpoint("qwen3_moe"), costly=False)
    for key in want.layers:
        # three bits of mantissa: what is rounded either way adds up to far less than a wrong scale
        torch.testing.assert_close(got.layer(key).weight_abs_sum, want.layer(key).weight_abs_sum, rtol=0.02, atol=0)


@pytest.mark.parametrize(("numbers", "blocks", "long"), [(192, 2, 128), (768, 6, 128), (96, 3, 32), (300, 100, 3)])
def test_blocks_that_nothing_names_are_powers_of_two_or_equal_parts(numbers: int, blocks: int, long: int) -> None:
    weight, scale = torch.empty(numbers, 64), torch.empty(blocks, 2)
    assert block_of(weight, scale) == (long, 32)
    assert block_of(weight.T, scale.T, block_sizes({"weight_block_size": [0, "x"]})) == (32, long)
    with pytest.raises(ValueError, match="does not say how large"):
        block_of(torch.empty(100, 64), torch.empty(60, 2))


@pytest.mark.parametrize(
    ("name", "costly", "message"),
    [
        ("gate", False, "layer 1: expert 3: rows of the router are not finite"),
        ("experts.2.up_proj", True, "layer 1: expert 2: its weights are not finite"),
    ],
)
def test_what_is_no_number_is_refused(
    name: str, costly: bool, message: str, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    def spoil(key: str, tensor: Tensor) -> dict[str, Tensor]:
        if key == f"model.layers.1.mlp.{name}.weight":
            tensor[3, 5] = torch.nan
        return {key: tensor}

    folder = rewrite(family_checkpoint("qwen3_moe"), tmp_path / "m", spoil)
    with pytest.raises(InputError, match=message):
        weigh(folder, costly=costly)


def test_a_checkpoint_is_scored_and_planned_without_statistics(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder, runner = family_checkpoint("mixtral"), CliRunner()
    with console.output(False):
        scored = runner.invoke(app, ["score", str(folder), "--criterion", "aimer", "--json"], catch_exceptions=False)
    want = score_layer(CRITERIA["aimer"], weigh(folder, costly=False).layer("0"), "0").tolist()
    assert json.loads(scored.stdout)["layers"]["0"] == want
    made = runner.invoke(
        app,
        ["plan", str(folder), "--criterion", "rank(ews, rwn)", "--keep", "4", "--out", str(tmp_path / "p.json")],
        catch_exceptions=False,
    )
    assert made.exit_code == 0
    plan = Plan.load(tmp_path / "p.json")
    prune(folder, plan, tmp_path / "pruned")
    refused = runner.invoke(app, ["score", str(folder), "--criterion", "rank(aimer, reap)"])
    assert "needs text: calibrate first" in str(refused.exception)

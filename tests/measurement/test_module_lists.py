"""Models whose code lies beside the weights: experts in a list are measured as the block calls them, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moekern.calibration.calibrate import calibrate
from moekern.calibration.observe import observe
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.iteration.rounds import Method, iterate
from moekern.model.compute import Compute
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers import remote_code
from tests.helpers.commands import moekern
from tests.helpers.measured import add_token, assert_same
from tests.helpers.remote_code import EXPERTS, HIDDEN, STYLES, TOP_K
from tests.helpers.threads import using_threads

TRUSTED = Compute(dtype=torch.float32, trust_remote_code=True)
ROUTED = [f.name for f in fields(LayerStatistics) if f.metadata["tier"] in ("routed", "dimensions")]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """written(style, change) -> a checkpoint with code of its own."""
    root, made = tmp_path_factory.mktemp("remote"), dict[Any, Path]()

    def write(style: str, change: tuple[str, str] = ("", "")) -> Path:
        if (style, change) not in made:
            made[style, change] = remote_code.write(root / f"{style}{len(made)}", style, change=change)
        return made[style, change]

    return write


def token_ids(seed: int) -> Tensor:
    return torch.randint(16, 96, (3, 11), generator=torch.Generator().manual_seed(seed))


DATA = TokenData(tuple(Batch(domain, token_ids(seed)) for seed, domain in enumerate("aab")), {})


@torch.no_grad()
def literal(style: str, block: Any, hidden: Tensor, sums: LayerStatistics, residual: Tensor) -> None:
    """Add a batch [T, H] to the sums of its layer, a token at a time, from the block's weights."""
    score = torch.softmax if style in ("in_place", "masks") else lambda logits, dim: logits.sigmoid()
    for row, stream in zip(hidden, residual, strict=True):
        logits = block.gate.weight @ row
        scores = score(logits, 0)
        bias = getattr(block.gate, "e_score_correction_bias", torch.zeros(EXPERTS))
        ids = (scores + bias).topk(TOP_K).indices
        gates = scores[ids]
        if style != "in_place":
            gates = gates / gates.sum() * (1 if style == "masks" else 2.5)
        given = block.routed_expert_down_proj(row) if style == "latent" else row
        y = torch.stack([block.experts[e](given[None])[0] for e in ids.tolist()])
        add_token(sums, ids.tolist(), gates.tolist(), y, score(logits.double(), 0))
        sums.logit_gram.add_(torch.outer(logits.double(), logits.double()))
        if style != "latent":
            out = (gates[:, None] * y).sum(0)
            turn = 1 - torch.nn.functional.cosine_similarity(stream.double(), (stream + out).double(), dim=0)
            sums.residual_sum[ids] += gates.double() * y.double().norm(dim=1) * turn
            sums.residual_tokens.add_(1)


def in_memory(style: str, folder: Path) -> dict[tuple[str, str], LayerStatistics]:
    model: Any = remote_code.load(folder)
    name, width = STYLES[style][0], HIDDEN // 2 if style == "latent" else HIDDEN
    found = {
        (str(i), domain): LayerStatistics.zeros(EXPERTS, width, tiers=("dimensions",))
        for i in (1, 2) for domain in "ab"
    }  # fmt: skip
    for batch in DATA.batches:
        for i in (1, 2):
            layer, seen = model.model.layers[i], dict[str, Tensor]()
            handles = [
                getattr(layer, name).register_forward_pre_hook(lambda m, args: seen.update(hidden=args[0])),  # noqa: B023
                layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.update(stream=args[0])),  # noqa: B023
            ]
            model(batch.input_ids)
            for handle in handles:
                handle.remove()
            sums = found[str(i), batch.domain]
            literal(style, getattr(layer, name), seen["hidden"].flatten(0, 1), sums, seen["stream"].flatten(0, 1))
    return found


@pytest.mark.parametrize("style", STYLES)
def test_sums_are_those_of_the_blocks_formula(style: str, written: Write) -> None:
    statistics = calibrate(written(style), DATA, TRUSTED, tiers=("dimensions",))
    for (key, domain), want in in_memory(style, written(style)).items():
        got = statistics.layers[key][domain]
        assert int(got.count.sum()) == TOP_K * int(got.tokens)
        for name in ROUTED:
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-4, atol=1e-4, msg=name)


def same(a: Statistics, b: Statistics) -> None:
    for key, domains in a.layers.items():
        for domain, sums in domains.items():
            assert_same(sums, b.layers[key][domain])


@pytest.mark.parametrize("style", ["sorted", "masks"])
def test_threads_and_batches_change_no_bit(style: str, written: Write) -> None:
    one = calibrate(written(style), DATA, TRUSTED)
    batches = tuple(Batch(b.domain, row[None]) for b in DATA.batches for row in b.input_ids)
    with using_threads(4 if torch.get_num_threads() != 4 else 1):
        same(calibrate(written(style), TokenData(batches, {}), TRUSTED), one)


def test_a_model_in_memory_is_observed_alike(written: Write) -> None:
    streamed = calibrate(written("latent"), DATA, TRUSTED)
    model: Any = remote_code.load(written("latent"))
    for domain in "ab":
        with observe(model, domain=domain) as statistics:
            for batch in DATA.batches:
                if batch.domain == domain:
                    model(batch.input_ids)
        for key, domains in statistics.layers.items():
            for name in ROUTED:
                got, want = getattr(domains[domain], name), getattr(streamed.layers[key][domain], name)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_fp8_weights_are_measured_as_their_plain_twin(written: Write, tmp_path: Path) -> None:
    """Blocks of 8 x 8 whose scales are powers of two, so that bfloat16 holds what they stand for."""
    fp8, twin = (shutil.copytree(written("sorted"), tmp_path / name) for name in ("fp8", "twin"))
    for path in sorted(fp8.glob("*.safetensors")):
        coded, plain = dict[str, Tensor](), dict[str, Tensor]()
        for name, weight in load_file(path).items():
            coded[name] = plain[name] = weight if "gate.weight" in name else weight.bfloat16()
            if ".experts." in name:
                blocks = weight.unflatten(1, (-1, 8)).unflatten(0, (-1, 8))
                scale = (blocks.abs().amax((1, 3)) / 448).log2().ceil().exp2()
                codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
                coded |= {name: codes.reshape(weight.shape), f"{name}_scale_inv": scale}
                plain[name] = (codes.float() * scale[:, None, :, None]).reshape(weight.shape).bfloat16()
        save_file(coded, path, {"format": "pt"})
        save_file(plain, twin / path.name, {"format": "pt"})
        index = json.loads((fp8 / "model.safetensors.index.json").read_text())
        index["weight_map"] |= dict.fromkeys(coded, path.name)
        (fp8 / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (fp8 / "config.json").write_text(json.dumps(config))
    compute = Compute(dtype=torch.bfloat16, trust_remote_code=True)
    same(calibrate(fp8, DATA, compute), calibrate(twin, DATA, compute))


@pytest.mark.parametrize("style", STYLES)
def test_the_whole_way(style: str, written: Write, tmp_path: Path) -> None:
    """Pruned in memory and on the disk alike, and equal to the original with the dropped experts masked."""
    folder = written(style)
    plan = Plan({"1": LayerPlan((0, 2, 5)), "2": LayerPlan((1, 3, 4))})
    prune(folder, plan, tmp_path / "half")
    assert verify(folder, plan, tmp_path / "half").problems == ()
    assert compare_forward(folder, plan, tmp_path / "half", compute=TRUSTED).equal
    held = TokenData((Batch("a", token_ids(9)),), {})
    live = evaluate(folder, held, {"half": plan}, TRUSTED)
    written_down = evaluate(tmp_path / "half", held, {}, TRUSTED)
    assert live["half"]["a"].nll == written_down["original"]["a"].nll != live["original"]["a"].nll


def test_tiers_that_ask_the_block_again(written: Write) -> None:
    sums = calibrate(written("sorted"), DATA, TRUSTED, tiers=("replay", "weights", "coalitions"), replay_tokens=9)
    assert int(sums.layer("1").replay_tokens) == 18
    assert float(sums.layer("2").deletion_norm_sum.sum()) > 0
    plan = iterate(written("masks"), DATA, Method("gated_norm", 3, rounds=2), TRUSTED)
    assert all(len(layer.keep) == 3 for layer in plan.layers.values())
    with pytest.raises(InputError, match="--tier gradient: Block: its experts are in a list, one mod"):
        calibrate(written("sorted"), DATA, TRUSTED, tiers=("gradient",))


# What is changed in the code of a block, and why it is refused.
SUM = ".mul_(weights.unsqueeze(-1)).sum(1)"
NOT_UNDERSTOOD = {
    "a product that is no gate": ("sorted", SUM, ".pow(2)" + SUM, "not gates x outputs"),
    "outputs that are no sum": ("sorted", SUM, SUM.replace("sum(1)", "amax(1)"), "not gates x outputs"),
    "rows that are scaled": ("sorted", "outputs, start = x[", "outputs, start = 2 * x[", "not gates x outputs"),
    "a capacity": ("sorted", "expert(rows[start : start + count])", "F.pad(expert(rows[start : start + count][:3]), "
        "(0, 0, 0, max(0, count - 3)))", "not gates x outputs"),
    "gates in the expert": ("masks", "expert(rows) *", "expert(rows, weights[token, slot]) *", "more than their rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_refused(case: str, written: Write) -> None:
    style, old, new, why = NOT_UNDERSTOOD[case]
    with pytest.raises(InputError, match=f"layer 1: Block cannot be measured: .*{why}"):
        calibrate(written(style, (old, new)), DATA, TRUSTED)


def test_gates_that_the_block_changes_are_those_that_it_applies(written: Write) -> None:
    """What the router returns does not count where the block multiplies by something else."""
    plain = calibrate(written("sorted"), DATA, TRUSTED).layer("1")
    change = ("sum(1).type(x.dtype)", "sum(1).mul(0.5).type(x.dtype)")
    halved = calibrate(written("sorted", change), DATA, TRUSTED).layer("1")
    assert torch.equal(halved.count, plain.count)
    torch.testing.assert_close(halved.gate_sum, plain.gate_sum / 2)


@pytest.mark.parametrize("style", ["sorted", "masks"])
def test_an_expert_that_is_not_finite_is_named(style: str, written: Write, tmp_path: Path) -> None:
    folder = shutil.copytree(written(style), tmp_path / style)
    name = f"model.layers.2.{STYLES[style][0]}.experts.3.{STYLES[style][1].split()[1]}.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][2, 5] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(InputError, match=r"layer 2: .*experts\.3\.\w+\.weight is not finite for expert 3"):
        calibrate(folder, DATA, TRUSTED)


def test_scores_that_are_not_the_familys_are_not_measured(written: Write) -> None:
    """The names of the tensors are those of a family that takes the softmax; this code takes another score."""
    softmax = calibrate(written("in_place"), DATA, TRUSTED).layer("1")
    sigmoid = calibrate(written("in_place", ("logits.softmax(-1)", "logits.sigmoid()")), DATA, TRUSTED).layer("1")
    assert int(softmax.logit_tokens) == int(softmax.tokens)
    assert int(sigmoid.logit_tokens) == 0 < int(sigmoid.tokens)
    assert torch.equal(sigmoid.count, softmax.count)
    assert float(sigmoid.gate_sum.sum()) > float(softmax.gate_sum.sum())


def test_nothing_of_a_checkpoint_runs_without_the_flag(written: Write, tmp_path: Path) -> None:
    written_here = remote_code.write(tmp_path / "written", "sorted")
    folder = shutil.copytree(written_here, tmp_path / "model")  # of a name whose code no process has imported
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [' + ", ".join(str(20 + i % 70) for i in range(90)) + "]}")
    out, plan = tmp_path / "s.safetensors", tmp_path / "p.json"
    measuring = ("calibrate", folder, "--data", tmp_path / "ids.jsonl", "--out", out)
    plan.write_text('{"format": "moekern.plan/1", "layers": {"1": {"keep": [0, 1, 2]}, "2": {"keep": [3, 4, 5]}}}')
    done = moekern(*measuring)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) <= 2
    assert "--trust-remote-code" in done.stderr
    assert moekern("inspect", folder).returncode == 0
    assert moekern("prune", folder, plan, "--out", tmp_path / "half").returncode == 0
    assert moekern("verify", folder, plan, tmp_path / "half").returncode == 0
    assert not remote_code.marker(written_here).exists()
    assert moekern(*measuring, "--trust-remote-code").returncode == 0
    assert remote_code.marker(written_here).exists()
    trusted = ("--trust-remote-code", "--quiet")
    assert moekern("verify", folder, plan, tmp_path / "half", "--forward", *trusted).returncode == 0
    held = (plan, "--data", tmp_path / "ids.jsonl")
    assert moekern("evaluate", folder, *held, *trusted).returncode == 0

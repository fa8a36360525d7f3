"""MC-SMoE's second stage: written out in float64, and what is written of it loaded by peft."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekern.checkpoint.recovery import read_recovery
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL
from moekern.pruning.replaced import write_replaced
from moekern.recovery import Recovery, Training, recover
from moekern.recovery.factors import LEFT, RIGHT, SPARSE, Factored, Rows, least_kept, rank_of, share_at
from moekern.recovery.lottery import Lottery, lottery
from moekern.recovery.steps import Steps
from tests.helpers import families
from tests.helpers.commands import contents
from tests.helpers.quantised_models import plain, twins
from tests.helpers.recovering import FLOAT32, data

STEPS = {"step_tokens": 48, "rate": 3e-3, "every": 50}
MC = Training(train=("factors",), kl=0.2, next=1.0, temperature=2.0, top="vocabulary", **STEPS)  # type: ignore[arg-type]
FEW = 8  # sequences, of which none are held back: the last state is what is written
TOLERANCE = 2e-5  # of logits, float32


def test_ranks_are_those_of_so_many_numbers() -> None:
    for rows, columns, ratio in ((768, 3072, 0.05), (96, 128, 0.25), (5, 3, 0.9), (7, 7, 0.01)):
        rank = rank_of(rows, columns, ratio)
        assert rank == math.ceil(ratio * rows * columns / (rows + columns))
        assert (rank - 1) * (rows + columns) < ratio * rows * columns <= rank * (rows + columns)


@pytest.mark.parametrize("turned", [False, True])
def test_a_matrix_is_its_largest_singular_values_and_what_is_left(turned: bool) -> None:
    W = np.random.default_rng(0).normal(size=(3, 6, 9))
    base = torch.from_numpy(W.swapaxes(1, 2).copy() if turned else W).float()
    form = Factored(2, turned)
    values = form.begun(base, 0)
    assert {name: tuple(value.shape) for name, value in values.items()} == form.shapes(base.shape)
    for e, own in enumerate(W):
        U, s, V = np.linalg.svd(own)
        left, right, sparse = (values[part][e].double().numpy() for part in (LEFT, RIGHT, SPARSE))
        want = (U[:, :2] * s[:2]) @ V[:2]
        np.testing.assert_allclose(left @ right, want, atol=1e-5)
        np.testing.assert_allclose(sparse, own - want, atol=1e-5)
        np.testing.assert_allclose(left.T @ left, np.diag(s[:2]), atol=1e-5)  # a root of each on either side
        np.testing.assert_allclose(right @ right.T, np.diag(s[:2]), atol=1e-5)
    torch.testing.assert_close(form.made(base, values), base, rtol=0, atol=1e-5)
    one, two = form.product(values)
    torch.testing.assert_close(one @ two + form.rest(values), form.made(base, values))


def test_fewer_and_fewer_rows_stay_along_a_cube() -> None:
    got = [share_at(step, 100, 0.1) for step in range(1, 101)]
    want = []
    for t in range(1, 101):
        middle = 0.1 + 0.9 * (1 - (t - 2) / (100 - 2 - 8)) ** 3
        want.append(1.0 if t <= 2 else 0.1 if t > 92 else middle)
    np.testing.assert_allclose(got, want)
    assert [share_at(step, 1, 0.1) for step in (1,)] == [0.1]
    assert share_at(1, 3, 0.1) == 1.0


def literal_least(rows: list[NDArray[Any]], columns: list[int], share: float) -> float:
    """The importance of every single number, those of a row alike, in order."""
    spread = np.concatenate([np.repeat(own.ravel(), width) for own, width in zip(rows, columns, strict=True)])
    rank = int(len(spread) * (1 - share))
    return float(np.sort(spread)[rank - 1]) if rank else -math.inf


@pytest.mark.parametrize("share", [1.0, 0.99, 0.5, 0.1, 0.0])
def test_rows_of_all_matrices_are_ranked_together_by_their_numbers(share: float) -> None:
    rng = np.random.default_rng(1)
    rows, columns = [rng.random((3, 5)).astype(np.float32), rng.random((2, 4)).astype(np.float32)], [7, 3]
    got = least_kept([torch.from_numpy(own) for own in rows], columns, share)
    assert got == literal_least(rows, columns, share)


def test_importance_is_the_moving_average_of_a_rows_mean_of_weight_times_gradient() -> None:
    rng = np.random.default_rng(2)
    shapes = {"a": (2, 4, 6), "b": (2, 6, 3)}
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    live = {name: torch.from_numpy(value.copy()) for name, value in values.items()}
    rows = Rows(live, {name: torch.zeros(shape[:-1]).double() for name, shape in shapes.items()}, 0.3)
    average = {name: np.zeros(shape) for name, shape in shapes.items()}
    first = {name: np.abs(value).mean(-1) for name, value in values.items()}
    assert_stays(rows, first, [6, 3])  # no gradient yet
    for _ in range(4):
        gradients = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        rows.seen({name: torch.from_numpy(gradient) for name, gradient in gradients.items()})
        for name in shapes:  # of every number, as the method has it, and of its row only in the end
            average[name] = 0.85 * average[name] + 0.15 * np.abs(values[name] * gradients[name])
    importance = {name: value.mean(-1) for name, value in average.items()}
    for name in shapes:
        np.testing.assert_allclose(rows.importance[name], importance[name])
    assert_stays(rows, importance, [6, 3])
    stays = rows.staying()
    rows.drop(0.3)
    for name in shapes:
        assert torch.equal(live[name], torch.from_numpy(values[name]) * stays[name][..., None])


def assert_stays(rows: Rows, importance: dict[str, NDArray[Any]], columns: list[int]) -> None:
    least = literal_least(list(importance.values()), columns, rows.final)
    for name, own in rows.staying().items():
        np.testing.assert_array_equal(own, importance[name] >= least)


def factored(source: Path, folder: Path, training: Training, sequences: int = FEW, **options: Any) -> Recovery:
    return recover(source, source, data(sequences), folder, training, FLOAT32, **options)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", pytest.param("llama4_text", marks=pytest.mark.whole)])
def test_base_and_adapter_are_the_compressed_model_to_peft(name: str, tmp_path: Path) -> None:
    """Stacks of gate and up that lie one behind the other, turned and alternating with biases, and turned alone."""
    families.save(name, source := tmp_path / "model")
    training = MC if name == "qwen3_moe" else Training(train=("factors",), epochs=0, factor_ratio=0.6, kept_rows=0.4)
    whole, parts = (
        factored(source, tmp_path / what, replace(training, adapter=what == "parts")) for what in ("whole", "parts")
    )
    for found, out in ((whole, "dense"), (parts, "base")):
        write_replaced(source, tmp_path / out, found.folder, {})
    dense, base = families.load(tmp_path / "dense"), families.load(tmp_path / "base")
    rows = {key: value for key, value in base.named_parameters() if ".experts." in key and value.ndim == 3}
    turned = -2 if name != "qwen3_moe" else -1  # the axis of what a row of W is multiplied with
    zeros = sum(int((value == 0).all(turned).sum()) for value in rows.values())
    count = sum(value.numel() // value.shape[turned] for value in rows.values())
    assert zeros / count == pytest.approx(1 - training.kept_rows, abs=0.05)
    ids = families.input_ids(name, 2, 16)
    want, alone = families.forward(dense, ids), families.forward(base, ids)
    assert (want - alone).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(with_peft(base, tmp_path / "parts/adapter", ids), want, rtol=0, atol=TOLERANCE)


@pytest.mark.whole
def test_low_rank_is_the_same_to_peft_and_merged(tmp_path: Path) -> None:
    """Of attention, whose matrices are modules, and of stacks of experts."""
    families.save("qwen3_moe", source := tmp_path / "model")
    training = replace(MC, train=("lora",), lora_targets=("attention", "experts"), lora_rank=3, temperature=1.0)
    merged, adapter = (
        factored(source, tmp_path / str(alone), replace(training, adapter=alone)) for alone in (False, True)
    )
    write_replaced(source, tmp_path / "merged", merged.folder, {})
    ids, model = families.input_ids("qwen3_moe", 2, 16), families.load(source)
    want, before = families.forward(families.load(tmp_path / "merged"), ids), families.forward(model, ids)
    assert (want - before).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(with_peft(model, adapter.folder, ids), want, rtol=0, atol=TOLERANCE)


def with_peft(base: Any, adapter: Path, ids: Tensor) -> Tensor:
    """Logits of a model with an adapter on it."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of patterns of ranks, which it follows all the same
        return families.forward(peft.PeftModel.from_pretrained(base, adapter), ids)


def test_what_is_told_is_the_loss_of_the_compressed_model(tmp_path: Path) -> None:
    families.save("qwen3_moe", source := tmp_path / "model")
    judged = TokenData(data(6, domains="b").batches, {}, 2)
    found = factored(source, tmp_path / "work", MC, 20, judged=judged)
    plain, factors = found.judged
    assert plain["b"].nll == pytest.approx(evaluate(source, judged, {}, FLOAT32)[ORIGINAL]["b"].nll, rel=1e-6)
    write_replaced(source, tmp_path / "out", found.folder, {})
    written = evaluate(tmp_path / "out", judged, {}, FLOAT32)[ORIGINAL]["b"]
    assert factors["b"].nll == pytest.approx(written.nll, rel=1e-6)
    assert factors["b"].nll != pytest.approx(plain["b"].nll, rel=1e-6)
    size, E, H, M = found.factored, 8, 32, 24
    ranks = {(2 * M, H): rank_of(2 * M, H, 0.25), (H, M): rank_of(H, M, 0.25)}
    products = sum(rank * (rows + columns) for (rows, columns), rank in ranks.items())
    assert (size["of_rows"], size["of_bytes"]) == (4 * E * (2 * M + H), 4 * E * 3 * M * H * 4)
    assert 4 * E * (4 * products + 4 * M * size["rows"] / (4 * E)) < size["bytes"]
    assert size["bytes"] <= 4 * E * 4 * products + 4 * H * size["rows"] + 4 * E * (2 * M + H) / 8
    assert any(note.startswith("experts as factors: ") and "rows beside the products" in note for note in found.notes)
    recovery = read_recovery(tmp_path / "out")
    assert recovery is not None
    assert all(".experts." in name for name in recovery["tensors"])


class Stopped(Exception):
    """In the place of a kill."""


@pytest.mark.whole
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.save("qwen3_moe", source := tmp_path / "model")
    training = replace(MC, every=1)
    factored(source, tmp_path / "want", training, 20)
    step = Steps.step

    def until(self: Steps, *rest: Any) -> Any:
        if self.trained.steps == 2:
            raise Stopped
        return step(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "step", until)
        with pytest.raises(Stopped):
            factored(source, tmp_path / "got", training, 20)
    factored(source, tmp_path / "got", training, 20)
    assert contents(tmp_path / "got") == contents(tmp_path / "want")


def test_quantised_experts_and_other_forms_are_refused_by_name(tmp_path: Path, family_checkpoint: Any) -> None:
    coded, _ = twins(plain("qwen3_moe", tmp_path / "plain"), tmp_path, "fp8_block", only=".experts.")
    with pytest.raises(InputError, match=r"experts\..*proj.* is stored as F8_E4M3"):
        recover(coded, None, data(20), tmp_path / "work", Training(train=("factors",), kl=0, next=1), FLOAT32)
    assert not (tmp_path / "work").exists()
    again = Lottery(0.5, 2, "gated_norm", 200, False, Training(train=("experts",)))
    with pytest.raises(InputError, match=r"experts\..*proj.* is stored as F8_E4M3"):
        lottery(coded, data(20), again, tmp_path / "out", tmp_path / "work", FLOAT32)
    assert not (tmp_path / "work").exists()
    with pytest.raises(InputError, match="--train factors: dbrx: its experts are not held as stacks of matrices"):
        factored(family_checkpoint("dbrx"), tmp_path / "work", MC)
    rounds = Lottery(0.5, 2, "gated_norm", 200, False, MC)
    with pytest.raises(InputError, match="lottery: --train factors: rounds score whole experts"):
        lottery(tmp_path / "plain", data(20), rounds, tmp_path / "out", tmp_path / "work", FLOAT32)
    for wrong, flag in (
        ({"factor_ratio": 1.0}, "--factor-ratio 1.0"), ({"kept_rows": 1.5}, "--kept-rows 1.5"),
        ({"temperature": 0.0}, "--temperature 0.0"), ({"train": ("factors", "norms")}, "factors train alone"),
        ({"top_k": 1}, "--top-k: goes without --train factors"), ({"train": ("norms",), "epochs": 0.0}, "--epochs 0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=flag):
            replace(MC, **wrong).check()

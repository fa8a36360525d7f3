"""Steps of training against ordinary ones through the whole model in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moekern.architectures import family_named
from moekern.data.batches import Batch
from moekern.errors import InputError
from moekern.recovery import loaded
from moekern.recovery.course import Sample
from moekern.recovery.settings import Training
from moekern.recovery.teacher import Predicted, Teacher
from tests.helpers import families
from tests.helpers.recovering import backward, gradients, samples, steps, whole
from tests.helpers.tight import little_room

MakeCheckpoint = Callable[[str], Path]
WholeModel = Callable[[str], Any]
FEW = ["qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "llama4_text", "jetmoe", "nemotron_h", "inkling_mm_model"]
TRAINED = [name for name in families.FAMILIES if name not in families.NO_CALIBRATION]
REFUSED = [name for name in TRAINED if (row := family_named(name.split("-")[0])) and row.no_gradient]
NAMES = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.whole) for name in TRAINED if name not in REFUSED
]
NEXT = Training(train=("all",), kl=0.0, next=1.0)


def nll(logits: Tensor, ids: Tensor, place: int = 0) -> Tensor:
    return F.cross_entropy(logits, ids, reduction="sum")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_a_whole_backward_pass(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: WholeModel
) -> None:
    some = samples(name)
    with steps(family_checkpoint(name), NEXT) as own:
        got, told = gradients(own, some)
        layers = own.layerwise.layers_name
    model, weights = whole(copy.deepcopy(whole_model(name)))
    assert told["nll"] == pytest.approx(backward(model, some, nll), rel=1e-5)
    assert {n for n in weights if n.startswith(f"{layers}.") and weights[n].is_floating_point()} <= got.keys()
    largest = max(float(p.grad.abs().max()) for p in weights.values() if p.grad is not None)
    for each, G in got.items():
        want = weights[each].grad
        want = torch.zeros_like(G) if want is None else want
        torch.testing.assert_close(G, want, rtol=0, atol=1e-4 * float(want.abs().max()) + 1e-6 * largest, msg=each)
    assert any(bool(G.any()) for G in got.values())


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_hand_on_more_are_refused_before_anything_is_computed(
    name: str, family_checkpoint: MakeCheckpoint
) -> None:
    row = family_named(name.split("-")[0])
    assert row is not None
    with pytest.raises(InputError) as refusal, steps(family_checkpoint(name), NEXT):
        pytest.fail("it was opened")
    assert str(refusal.value).startswith("recover: ")
    assert row.no_gradient in str(refusal.value)


def teacher_of(model: Any, some: list[Sample], path: Path, top: int | None = None) -> Teacher:
    """What a model in memory predicts."""
    teacher = Teacher(path, [sample.batch for sample in some], top, families.VOCAB)
    teacher.open("test")
    for sample in some:
        logits = families.forward(model, sample.batch.input_ids)[:, :-1].flatten(0, 1)
        teacher.put(sample.place, Predicted.of(logits, top))
    return teacher


def test_steps_are_those_of_adamw_on_a_model_in_memory(
    family_checkpoint: MakeCheckpoint, whole_model: WholeModel, tmp_path: Path
) -> None:
    """Clipped, with decay, by a rate that rises and falls, towards another model and the next token."""
    some, original = samples("qwen3_moe"), families.build("qwen3_moe", seed=1)
    training = Training(kl=0.7, next=0.4, top="vocabulary", rate=3e-3, warmup=0.3, floor=0.2, clip=0.05, decay=0.1)
    count = 4
    rates = [training.rate_at(n, count, 3e-3) for n in range(count)]
    assert rates == pytest.approx([1.5e-3, 3e-3, 3e-3 * (0.2 + 0.8 * 0.75), 3e-3 * (0.2 + 0.8 * 0.25)])
    told = []
    with steps(family_checkpoint("qwen3_moe"), training, teacher_of(original, some, tmp_path / "teacher")) as own:
        for rate in rates:
            told.append(own.step(some, rate, lambda share: None))
        names = own.trained.names
        got = {name: own.trained.numbers["value", name].clone() for name in names}
    model, weights = whole(copy.deepcopy(whole_model("qwen3_moe")))
    ours = [weights[name] for name in names]
    p = [families.forward(original, s.batch.input_ids)[:, :-1].flatten(0, 1).softmax(-1) for s in some]

    def loss(logits: Tensor, ids: Tensor, place: int) -> Tensor:
        kl = (p[place] * (p[place].log() - logits.log_softmax(-1))).sum()
        return 0.7 * kl + 0.4 * nll(logits, ids)

    optimiser = torch.optim.AdamW(ours, lr=1.0, betas=training.betas, weight_decay=0.1)
    start = {name: weights[name].detach().clone() for name in names}
    for rate, each in zip(rates, told, strict=True):
        optimiser.zero_grad()
        mean = backward(model, some, loss)
        assert 0.7 * each["kl"] + 0.4 * each["nll"] == pytest.approx(mean, rel=1e-4)
        norm = torch.nn.utils.clip_grad_norm_(ours, 0.05)
        assert each["norm"] == pytest.approx(float(norm), rel=1e-3)
        assert norm > 0.05
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
    for name in names:
        torch.testing.assert_close(got[name], weights[name].detach(), rtol=0, atol=1e-5, msg=name)
        assert not torch.equal(got[name], start[name])


def test_answers_alone_have_a_loss(family_checkpoint: MakeCheckpoint, whole_model: WholeModel, tmp_path: Path) -> None:
    """Towards another model and the next token; what was asked has neither."""
    generator = torch.Generator().manual_seed(5)
    plain, original = samples("qwen3_moe"), families.build("qwen3_moe", seed=1)
    marks = [torch.rand(sample.batch.input_ids.shape, generator=generator) < 0.3 for sample in plain]
    some = [Sample(s.place, replace(s.batch, answers=m)) for s, m in zip(plain, marks, strict=True)]
    training = Training(train=("all",), kl=0.5, next=1.0, top="vocabulary")
    with steps(family_checkpoint("qwen3_moe"), training, teacher_of(original, some, tmp_path / "teacher")) as own:
        got, told = gradients(own, some)
    model, weights = whole(copy.deepcopy(whole_model("qwen3_moe")))
    p = [families.forward(original, s.batch.input_ids)[:, :-1].flatten(0, 1).softmax(-1) for s in some]
    parts = torch.zeros(2)

    def loss(logits: Tensor, ids: Tensor, place: int) -> Tensor:
        rows = marks[place][:, 1:].flatten()
        logq, P = logits[rows].log_softmax(-1), p[place][rows]
        kl, next_token = (P * (P.log() - logq)).sum(), F.nll_loss(logq, ids[rows], reduction="sum")
        parts.add_(torch.stack([kl, next_token]).detach())
        return 0.5 * kl + next_token

    backward(model, some, loss)
    count = sum(int(each[:, 1:].sum()) for each in marks)
    assert (told["kl"], told["nll"]) == pytest.approx((float(parts[0]) / count, float(parts[1]) / count), rel=1e-4)
    for each, G in got.items():
        want = weights[each].grad
        want = torch.zeros_like(G) if want is None else want
        torch.testing.assert_close(G, want, rtol=0, atol=2e-4 * float(want.abs().max()) + 1e-7, msg=each)


@pytest.mark.parametrize("train", [("all",), ("router", "norms", "lora", "scale")])
def test_one_layer_in_memory_and_numbers_in_files_change_no_bit(
    train: tuple[str, ...], family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    some, training = samples("qwen3_moe"), Training(train=train, kl=0.0, next=1.0)

    def trained(stays: bool, inside: bool) -> dict[str, Tensor]:
        with steps(family_checkpoint("qwen3_moe"), training) as own:
            assert own.layerwise.stays == stays
            assert (own.trained.folder is None) == inside
            losses = [own.step(some, 1e-3, lambda share: None)["nll"] for _ in range(3)]
            assert losses[2] < losses[0]
            filled = sum(not next(layer.parameters()).is_meta for layer in own.layerwise.layers)
            assert filled == (len(own.layerwise.layers) if stays else 0)
            found = {f"{k} {name}": own.trained.numbers[k, name].clone() for k in ("value", "mean", "square")
                     for name in own.trained.names}  # fmt: skip
            found["look"] = torch.tensor([own.look(some, lambda done, of: None)["a"].nll])
            return found

    want = trained(stays=True, inside=True)
    monkeypatch.setattr(loaded, "SHARE", 1 << 40)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    got = trained(stays=False, inside=False)
    assert not list(tmp_path.iterdir())
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_gradients_that_are_not_finite_change_nothing(family_checkpoint: MakeCheckpoint) -> None:
    with steps(family_checkpoint("qwen3_moe"), NEXT) as own:
        own.step(samples("qwen3_moe"), 1e-3, lambda share: None)
        kinds = ("value", "mean", "square")
        before = {key: value.clone() for key, value in own.trained.numbers.items() if key[0] in kinds}
        name, add = own.trained.names[0], own.trained.add

        def spoilt(layer: int | None, found: Any) -> None:
            add(layer, found)
            own.trained.numbers["gradient", name].view(-1)[0] = torch.inf

        own.trained.add = spoilt  # type: ignore[method-assign]
        with pytest.raises(InputError, match="recover: the gradients are not finite; a lower --rate"):
            own.step(samples("qwen3_moe"), 1e-3, lambda share: None)
        for key, value in before.items():
            assert torch.equal(own.trained.numbers[key], value), key


def test_a_look_is_the_loss_of_the_model(
    family_checkpoint: MakeCheckpoint, whole_model: WholeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By domain, in a mean over predicted tokens, of chunks of different lengths; in groups where there is little
    room."""
    ids = [families.input_ids("qwen3_moe", 1, length, length) for length in (2, 9, 5)]
    some = [Sample(n, Batch(domain, each)) for n, (domain, each) in enumerate(zip("aba", ids, strict=True))]
    with steps(family_checkpoint("qwen3_moe"), NEXT) as own:
        found, told = own.look(some, lambda done, of: None), list[tuple[float, int]]()
        little_room(monkeypatch, 0, 9 * 4 * 32)
        again = own.look(some, lambda done, of: told.append((done, of)))
        assert (again, told) == (found, [(n, 12) for n in range(1, 13)])
    for domain, places in {"a": (0, 2), "b": (1,)}.items():
        want = count = 0.0
        for place in places:
            logits = families.forward(whole_model("qwen3_moe"), ids[place])[:, :-1].flatten(0, 1)
            want, count = want + float(nll(logits, ids[place][0, 1:])), count + len(logits)
        assert found[domain].nll == pytest.approx(want / count, rel=1e-5)
        assert (found[domain].tokens, found[domain].kl) == (count, 0)

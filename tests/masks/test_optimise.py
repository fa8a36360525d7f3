"""Masks that are optimised: a planted one is found, counts and bytes are exact, and a killed run ends alike."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.data.text import Text
from moekern.demo import MODEL, text_sources
from moekern.errors import InputError
from moekern.masks import Search, optimise
from moekern.masks.biased import Biased
from moekern.masks.masked import Masked
from moekern.model.compute import Compute
from moekern.model.layerwise import open_layerwise
from moekern.model.masking import changed_logits
from moekern.model.transformers_api import loader_of
from moekern.plan.document import LayerPlan, Plan
from moekern.plan.fits_model import check_plan
from tests.helpers import families, recovering
from tests.helpers.commands import document, model_and_ids, moekern

Folder = Callable[[str], Path]
E = families.EXPERTS
GOOD = (0, 2, 5, 7)  # as many in each group
SMALL = Search(steps=4, step_tokens=64, masks=2, every=2, top=8)


def data_of(name: str, rows: int = 40, length: int = 16) -> TokenData:
    ids = families.input_ids(name, rows, length, 0)
    return TokenData(tuple(Batch("a", row[None]) for row in ids), {}, chunk=2)


def plan_of(folder: Path, keep: tuple[int, ...]) -> Plan:
    return Plan({key: LayerPlan(keep) for key in find_layout(open_checkpoint(folder)).layers})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens never choose other experts than GOOD while there are enough of them."""
    folder = families.save("deepseek_v3", tmp_path_factory.mktemp("planted") / "model")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, value in tensors.items():
            if name.endswith("e_score_correction_bias"):
                value[[e for e in range(E) if e not in GOOD]] = -10.0
        save_file(tensors, path, {"format": "pt"})
    return folder


def test_the_experts_that_a_model_needs_are_found_from_those_that_it_does_not(planted: Path, tmp_path: Path) -> None:
    bad = tuple(e for e in range(E) if e not in GOOD)
    search = Search(steps=24, step_tokens=128, masks=4, rate=0.3, every=6)
    found = optimise(planted, plan_of(planted, bad), data_of("deepseek_v3"), tmp_path, search)
    assert {layer.keep for layer in found.plan.layers.values()} == {GOOD}
    before, after = (row["a"].kl for row in found.judged)
    assert after < 1e-6 < before
    assert found.changed == 4 * len(found.plan.layers)


def test_a_total_lets_layers_keep_different_numbers(family_checkpoint: Folder, tmp_path: Path) -> None:
    folder = family_checkpoint("qwen3_moe")
    counts: list[int] = []
    look = Masked.look

    def looked(self: Masked, samples: Any, dropped: Any) -> Any:
        counts.append(sum(E - len(own) for own in dropped.values()))
        return look(self, samples, dropped)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Masked, "look", looked)
        found = optimise(
            folder, plan_of(folder, GOOD), data_of("qwen3_moe"), tmp_path, replace(SMALL, budget="global", rate=2.0)
        )
    assert set(counts) == {4 * families.LAYERS}
    checkpoint = open_checkpoint(folder)
    check_plan(found.plan, find_layout(checkpoint), checkpoint)
    assert sum(len(layer.keep) for layer in found.plan.layers.values()) == 4 * families.LAYERS


def test_a_killed_run_goes_on_to_the_same_bytes(
    family_checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = family_checkpoint("qwen3_moe"), data_of("qwen3_moe")
    search = replace(SMALL, steps=5, rate=1.0)
    whole = optimise(folder, plan_of(folder, GOOD), data, tmp_path / "a", search)
    worth, calls = Masked.worth, 0

    def killed(self: Masked, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # behind a look, and a step behind it
            raise KeyboardInterrupt
        return worth(self, *args, **kwargs)

    monkeypatch.setattr(Masked, "worth", killed)
    with pytest.raises(KeyboardInterrupt):
        optimise(folder, plan_of(folder, GOOD), data, tmp_path / "b", search)
    with pytest.raises(InputError, match="another search"):
        optimise(folder, plan_of(folder, GOOD), data, tmp_path / "b", replace(search, rate=0.5))
    again = optimise(folder, plan_of(folder, GOOD), data, tmp_path / "b", search)
    assert calls == 4 + 3  # from the look on
    assert again.plan.to_json() == whole.plan.to_json()
    assert (again.curve, again.judged) == (whole.curve, whole.judged)


def test_the_plan_says_where_it_comes_from(family_checkpoint: Folder, tmp_path: Path) -> None:
    folder = family_checkpoint("qwen3_moe")
    start = plan_of(folder, GOOD)
    found = optimise(folder, start, data_of("qwen3_moe"), tmp_path, SMALL)
    said = found.plan.provenance
    assert said["fingerprint"] == open_checkpoint(folder).fingerprint
    assert (said["criterion"], said["kept"], said["optimise"]["plan"]) == ("masks", 4, start.digest)
    assert [look["step"] for look in said["optimise"]["held"]] == [0, 2, 4]
    for layer in found.plan.layers.values():  # a person who plans by its scores gets the same
        assert layer.scores is not None
        assert sorted(np.argsort(layer.scores)[-4:].tolist()) == list(layer.keep)


@pytest.mark.parametrize("name", ["inkling2_text", "llama4_text"])
def test_what_cannot_be_optimised_is_refused_before_anything_is_computed(
    name: str, family_checkpoint: Folder, tmp_path: Path
) -> None:
    folder = family_checkpoint(name)
    with pytest.raises(InputError, match="^optimise: .*(more than hidden states|a way of its own)"):
        optimise(folder, plan_of(folder, GOOD), data_of(name), tmp_path, SMALL)
    assert not (tmp_path / "teacher.safetensors").exists()


def test_layers_in_groups_and_wrong_options_are_refused(family_checkpoint: Folder, tmp_path: Path) -> None:
    folder = family_checkpoint("qwen3_moe")
    data, plan = data_of("qwen3_moe"), plan_of(folder, GOOD)
    for wrong, said in (({"steps": 0}, "--steps 0"), ({"budget": "all"}, "--budget all"), ({"rate": 0.0}, "--rate 0")):
        with pytest.raises(InputError, match=said):
            optimise(folder, plan, data, tmp_path, replace(SMALL, **wrong))  # type: ignore[arg-type]
    grouped = family_checkpoint("deepseek_v3")
    with pytest.raises(InputError, match="--budget global: .* 2 groups"):
        optimise(grouped, plan_of(grouped, GOOD), data, tmp_path, replace(SMALL, budget="global"))
    refit = {"recipe": "0" * 64, "layers": {"0": {}}}
    with pytest.raises(InputError, match="plan: its layers were refitted"):
        optimise(folder, replace(plan, provenance={"refit": refit}), data, tmp_path, SMALL)
    with pytest.raises(InputError, match="is too small|memory"):
        optimise(folder, plan, data, tmp_path, SMALL, Compute(memory=1))


def test_the_command_writes_a_plan_that_prune_takes(tmp_path: Path) -> None:
    model_and_ids(tmp_path, 1000)
    plan_of(tmp_path / "model", GOOD).save(tmp_path / "plan.json")
    out, words = tmp_path / "better.json", ["--data", f"a={tmp_path / 'ids.npy'}", "--sequence-length", 16]
    command = ["optimise", tmp_path / "model", tmp_path / "plan.json", "--out", out, *words]
    found = document(*command, "--steps", 2, "--step-tokens", 64, "--masks", 2, "--top", 8)
    assert found["digest"] == Plan.load(out).digest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("better")] == ["better.json"]
    assert moekern("prune", tmp_path / "model", out, "--out", tmp_path / "pruned").returncode == 0
    again = moekern(*command)
    assert (again.returncode, "exists" in again.stderr) == (2, True), again.stderr


def test_planted_experts_of_noise_get_the_least_bias(tmp_path: Path) -> None:
    """On the trained model that ships, by the loss of the next token."""
    noise = (3, 8)
    shutil.copytree(MODEL, tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        for name, value in tensors.items():
            if any(f".experts.{e}.down_proj" in name for e in noise):
                value.copy_(torch.randn(value.shape, generator=generator) * 2 * value.float().std())
        save_file(tensors, path, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "model")
    text = Text(text_sources("calibration")[:2], tokens=4096, sequence_length=128).read(checkpoint)
    start = plan_of(checkpoint.folder, tuple(range(0, 16, 2)))
    search = Search(method="bias", steps=4, step_tokens=768, rate=0.1, every=4)
    found = optimise(checkpoint, start, text, tmp_path / "work", search)
    assert found.best == 4
    assert all(not set(noise) & set(layer.keep) for layer in found.plan.layers.values())
    scores = torch.tensor([layer.scores for layer in found.plan.layers.values()]).sum(0)
    assert set(scores.argsort()[:2].tolist()) == set(noise)
    before, after = ({d: loss.nll for d, loss in row.items()} for row in found.judged)
    assert all(after[domain] < before[domain] for domain in before)
    said = found.plan.provenance
    assert said["criterion"] == "bias"
    assert "MoRA" in said["optimise"]["reconstructed"]


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.whole)])
def test_slopes_are_those_of_the_whole_loss_in_memory(
    name: str, family_checkpoint: Folder, whole_model: Callable[[str], Any]
) -> None:
    """By a bias on every router's logits, with the entropy of the mean routing."""
    folder, some = family_checkpoint(name), recovering.samples(name)
    layout = find_layout(open_checkpoint(folder))
    generator = torch.Generator().manual_seed(3)
    biases = {key: torch.randn(E, generator=generator) * 0.1 for key in layout.layers}
    with open_layerwise(open_checkpoint(folder), layout, recovering.FLOAT32) as layerwise:
        layerwise.model.requires_grad_(False)
        got, sums = Biased(layerwise, 0.7).slopes(some, biases, lambda share: None)
    model, _ = recovering.whole(copy.deepcopy(whole_model(name)))
    model.requires_grad_(False)
    leaves = {key: bias.clone().requires_grad_() for key, bias in biases.items()}
    seen: dict[str, torch.Tensor] = {}

    def changed(key: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(logits: torch.Tensor) -> torch.Tensor:
            seen[key] = logits + leaves[key]
            return seen[key]

        return change

    loader, mean = loader_of(model), 0.0
    places, (_, layers) = loader.moe_places(layout), loader.decoder_layers()
    with ExitStack() as stack:
        for key, layer in layout.layers.items():
            stack.enter_context(changed_logits(loader, layer, layers[places[key]], changed(key)))
        for sample in some:
            ids = sample.batch.input_ids
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
            p = [z.flatten(0, -2).softmax(-1).mean(0) for z in seen.values()]
            spread = torch.stack([-(q * q.log()).sum() for q in p]).mean()
            ((nll - 0.7 * spread) / len(some)).backward()  # type: ignore[no-untyped-call]
            mean += float(nll.detach()) / len(some)
    assert float(sums[0] / sums[3]) == pytest.approx(mean, rel=1e-5)
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(got[key].float(), leaf.grad, rtol=1e-3, atol=1e-6)

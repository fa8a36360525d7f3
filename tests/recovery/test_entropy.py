"""The entropy of routers in the loss: its gradient is that of the whole loss in memory, and it falls."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moekern.architectures import family_named
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.model.compute import Compute
from moekern.model.transformers_api import loader_of, router_modules
from moekern.recovery import Training, recover
from moekern.recovery.course import Sample
from moekern.recovery.entropy import entropy
from moekern.recovery.loaded import ready
from moekern.recovery.objective import Objective
from moekern.recovery.steps import Steps
from moekern.recovery.trained import Trained
from tests.helpers import families
from tests.helpers.remote_code import write as write_remote

MakeCheckpoint = Callable[[str], Path]
SHORT = ("qwen3_moe", "gpt_oss", "deepseek_v3")
ROWS = {name: family_named(name.split("-")[0]) for name in families.FAMILIES if name not in families.NO_CALIBRATION}
NAMES = [name for name, row in ROWS.items() if row and not row.no_gradient and row.score != "identity"]
LAMBDA = 0.7


def samples_of(name: str) -> list[Sample]:
    return [Sample(n, Batch("a", families.input_ids(name, 2, 12, n))) for n in range(2)]


def literal(model: Any, name: str, samples: list[Sample]) -> tuple[float, dict[str, Tensor]]:
    """The mean entropy, and the gradients of mean loss + LAMBDA times it, by backward through the model in memory. The
    logits of linear routers are made anew of what these are given."""
    model.set_experts_implementation("eager")
    layers_name, layers = loader_of(model).decoder_layers()
    losses, found = [], dict[int, list[Tensor]]()  # by layer

    def linear(i: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = args[0].reshape(-1, args[0].shape[-1])
            found.setdefault(i, []).append(F.linear(hidden, module.weight, getattr(module, "bias", None)))

        return hook

    def recorded(i: int, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            found.setdefault(i, []).append(output[index] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for i, layer in enumerate(layers):
            for path, index in router_modules(layer, model).items():
                hook = linear(i) if name in SHORT else recorded(i, index)
                if type(layer.get_submodule(path)).__name__ != "JetMoeAttention":  # which hands on its router's
                    stack.callback(layer.get_submodule(path).register_forward_hook(hook).remove)
        for sample in samples:
            ids = sample.batch.input_ids
            logits = model(input_ids=ids, use_cache=False).logits
            losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
        entropies = [
            torch.distributions.Categorical(logits=torch.cat([z.reshape(-1, z.shape[-1]) for z in each])).entropy()
            for each in found.values()
        ]
        mean = torch.stack([each.mean() for each in entropies]).mean()
        (torch.cat(losses).mean() + LAMBDA * mean).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and n.startswith(layers_name)}
    return float(mean.detach()), gradients


@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.whole) for n in NAMES])
def test_gradients_are_those_of_the_whole_loss(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[str, Tensor] = {}

    def kept(self: Trained, rate: float) -> float:
        got.update({n: self.numbers["gradient", n].clone() for n in self.names})
        return 1.0

    monkeypatch.setattr(Trained, "stepped", kept)
    samples = samples_of(name)
    with ready(open_checkpoint(family_checkpoint(name)), Compute(dtype=torch.float32), Training()) as there:
        steps = Steps(there.layerwise, there.trained, Objective(0.0, 1.0), None, LAMBDA)
        told = steps.step(samples, 1e-3, lambda share: None)
    model = copy.deepcopy(whole_model(name))
    mean, want = literal(getattr(model, "thinker", model), name, samples)
    assert told["entropy"] == pytest.approx(mean, rel=1e-4)
    assert 0 < mean < math.log(families.EXPERTS + 2)
    for n, gradient in got.items():
        if n in want:
            largest = float(want[n].abs().max())
            torch.testing.assert_close(gradient, want[n].float(), rtol=1e-3, atol=1e-4 * largest + 1e-7)


def test_entropy_of_logits() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 2.0, 4.0]], requires_grad=True)
    found = entropy(logits)
    p = torch.tensor([1.0, 2.0, 4.0]).softmax(0)
    torch.testing.assert_close(found.detach(), torch.stack([torch.tensor(math.log(2)), -(p * p.log()).sum()]))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[1], -p * (p.log() + found[1].detach()))


def text(name: str, sequences: int = 6) -> TokenData:
    rows = families.input_ids(name, sequences, 16)
    return TokenData(tuple(Batch("a", row[None]) for row in rows), {})


def test_it_falls_where_it_weighs_much_and_is_told(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 10.0):
        epochs = 6 if weight else 1
        training = Training(("router",), epochs, step_tokens=64, kl=0, next=1, rate=3e-2, every=100, entropy=weight)
        where = tmp_path / str(weight)
        made = recover(family_checkpoint("qwen3_moe"), None, text("qwen3_moe"), where, training, Compute("cpu"))
        found[weight] = [each.get("entropy") for each in made.curve if "nll" in each]
        assert ("reconstructed" in made.record) == bool(weight)
    assert set(found[0.0]) == {None}
    first, *_, last = found[10.0]
    assert first is not None
    assert last is not None
    assert last < 0.8 * first


def refused(folder: Path, tmp_path: Path, compute: Compute = Compute("cpu"), **options: Any) -> str:
    training = Training(("norms",), kl=0, next=1, **options)
    with pytest.raises(InputError) as error:
        recover(folder, None, text("qwen3_moe"), tmp_path / "work", training, compute)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_routers_whose_logits_are_not_known_are_refused(family_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    line = refused(family_checkpoint("gemma4_text"), tmp_path, entropy=0.1)
    assert line.startswith("--entropy: gemma4: its routers put out scores, and no logits")
    line = refused(family_checkpoint("qwen3_moe"), tmp_path, entropy=-0.1)
    assert line == "--entropy -0.1: expected 0 or more"
    compute = Compute("cpu", trust_remote_code=True)
    line = refused(write_remote(tmp_path / "own", "masks"), tmp_path, compute, entropy=0.1)
    assert line.startswith("--entropy: mixtral: its own code does not say which output of a router are its logits")

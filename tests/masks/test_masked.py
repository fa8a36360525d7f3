"""What experts are worth under a mask: that of the pruned model, and by autograd through a whole model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.masks.masked import Masked, check_optimised
from moekern.measurement.gradients import measure_gradients
from moekern.model.compute import Compute
from moekern.model.experts import experts_of
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.masking import masked
from moekern.model.transformers_api import loader_of
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.recovery.course import Sample
from moekern.recovery.objective import Objective
from tests.helpers import families, remote_code

Folder = Callable[[str], Path]
E = families.EXPERTS
KEEP = {"0": (0, 2, 5, 7), "1": (1, 2, 4, 6), "2": (0, 3, 5, 6), "3": (1, 3, 4, 7)}


def samples_of(name: str) -> list[Sample]:
    return [Sample(n, Batch("a", families.input_ids(name, 2, 12, n))) for n in range(2)]


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[LayerwiseModel]:
    checkpoint = open_checkpoint(folder)
    with open_layerwise(checkpoint, find_layout(checkpoint), Compute(**options)) as layerwise:
        layerwise.model.requires_grad_(False)
        yield layerwise


def kept_in(layerwise: LayerwiseModel) -> dict[str, tuple[int, ...]]:
    """As many in each group."""
    return {key: KEEP[str(n % 4)] for n, key in enumerate(layerwise.layout.layers)}


def worth(folder: Path, samples: Sequence[Sample], *, plain: bool) -> tuple[dict[str, tuple[int, ...]], Any]:
    with opened(folder) as layerwise:
        keep = kept_in(layerwise)
        dropped = {key: tuple(e for e in range(E) if e not in own) for key, own in keep.items()}
        model = Masked(layerwise, Objective(kl=0, next=1), None)
        return keep, model.worth(samples, [dropped], plain=plain)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_that_stay_are_worth_what_gate_taylor_says_of_the_pruned_model(
    name: str, family_checkpoint: Folder, tmp_path: Path
) -> None:
    samples = samples_of(name)
    keep, (found, sums) = worth(family_checkpoint(name), samples, plain=True)
    plan = Plan({key: LayerPlan(own) for key, own in keep.items()})
    prune(family_checkpoint(name), plan, tmp_path / "pruned")
    want: dict[str, Tensor] = {}
    with opened(tmp_path / "pruned") as layerwise:
        data = TokenData(tuple(sample.batch for sample in samples), {}, chunk=2)
        measure_gradients(layerwise, data, lambda key, domain, f: want.update({key: f["gate_gradient_sum"]}))
    total = int(sums[3])
    assert total == sum(sample.predicted for sample in samples)
    for key, own in keep.items():
        torch.testing.assert_close(found[key][0, list(own)] * total, want[key], rtol=1e-3, atol=1e-5)


class _Shifted(TorchFunctionMode):
    """Adds a bias to a router's logits, where they come out of its product."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = bias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out + self.bias if func is F.linear and out.shape[-1] == E else out


def loss_under(model: Any, layout: Any, dropped: Mapping[str, Sequence[int]], samples: Sequence[Sample]) -> Tensor:
    with masked(loader_of(model), layout, dropped):
        total = torch.zeros(())
        for sample in samples:
            ids = sample.batch.input_ids
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            total = total + F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return total / sum(sample.predicted for sample in samples)


def test_gates_that_add_up_to_one_number_give_the_gradient_by_the_routers_logits(family_checkpoint: Folder) -> None:
    """Of experts that stay: a factor exp(b) on the score of one is a bias b on its logit."""
    name = "mixtral"
    samples = samples_of(name)
    keep, (found, _) = worth(family_checkpoint(name), samples, plain=False)
    model: Any = families.load(family_checkpoint(name)).requires_grad_(False)
    model.set_experts_implementation("eager")
    layout = find_layout(open_checkpoint(family_checkpoint(name)))
    dropped = {key: tuple(e for e in range(E) if e not in own) for key, own in keep.items()}
    layers = loader_of(model).decoder_layers()[1]
    biases = {key: torch.zeros(E, requires_grad=True) for key in keep}
    with ExitStack() as stack, torch.enable_grad():
        for key, place in loader_of(model).moe_places(layout).items():
            router, mode = layers[place].mlp.gate, _Shifted(biases[key])
            stack.callback(router.register_forward_pre_hook(lambda m, a, mode=mode: mode.__enter__() and None).remove)
            hook = router.register_forward_hook(lambda m, a, o, mode=mode: mode.__exit__(None, None, None))
            stack.callback(hook.remove)
        want = torch.autograd.grad(loss_under(model, layout, dropped, samples), list(biases.values()))
    for (key, own), gradient in zip(keep.items(), want, strict=True):
        torch.testing.assert_close(found[key][0, list(own)].float(), gradient[list(own)], rtol=1e-3, atol=1e-6)


def test_dropped_experts_are_worth_what_adding_them_with_the_routers_own_gate_changes(
    family_checkpoint: Folder,
) -> None:
    name, samples = "qwen3_moe", samples_of("qwen3_moe")
    keep, (found, _) = worth(family_checkpoint(name), samples, plain=True)
    model: Any = families.load(family_checkpoint(name)).requires_grad_(False)
    model.set_experts_implementation("eager")
    layout = find_layout(open_checkpoint(family_checkpoint(name)))
    dropped = {key: tuple(e for e in range(E) if e not in own) for key, own in keep.items()}
    layers = loader_of(model).decoder_layers()[1]
    added = {key: torch.zeros(E, requires_grad=True) for key in keep}
    with ExitStack() as stack, torch.enable_grad():
        for key, place in loader_of(model).moe_places(layout).items():
            router, experts = layers[place].mlp.gate, experts_of(layers[place])
            assert experts is not None
            whole = router.forward  # before it is masked

            def more(module: Any, args: Any, whole: Any = whole, m: Tensor = added[key]) -> Any:
                hidden, ids, gates = args
                _, own, chosen = whole(hidden)
                return hidden, torch.cat([ids, chosen], 1), torch.cat([gates, own * m[chosen]], 1)

            stack.callback(experts.register_forward_pre_hook(more).remove)
        want = torch.autograd.grad(loss_under(model, layout, dropped, samples), list(added.values()))
    assert any(found[key][0, list(dropped[key])].abs().max() > 1e-5 for key in keep)
    for key, gradient in zip(keep, want, strict=True):
        mine = found[key][0, list(dropped[key])].float()
        torch.testing.assert_close(mine, gradient[list(dropped[key])], rtol=1e-3, atol=1e-6)


def test_samples_are_dealt_to_masks_which_add_up_to_one(family_checkpoint: Folder) -> None:
    folder, samples = family_checkpoint("qwen3_moe"), samples_of("qwen3_moe")
    with opened(folder) as layerwise:
        model = Masked(layerwise, Objective(kl=0, next=1), None)
        dropped = {key: (1, 3) for key in layerwise.layout.layers}
        whole, _ = model.worth(samples, [dropped])
        parts, _ = model.worth(samples, [dropped, dropped])
    for key, found in parts.items():
        torch.testing.assert_close(found.sum(0), whole[key][0])
        assert found.abs().sum(1).min() > 0


def test_experts_in_lists_and_experts_of_other_calls_are_refused(family_checkpoint: Folder, tmp_path: Path) -> None:
    listed = remote_code.write(tmp_path / "listed", next(iter(remote_code.STYLES)))
    with (
        opened(listed, trust_remote_code=True) as layerwise,
        pytest.raises(InputError, match="^optimise: .* in a list"),
    ):
        check_optimised(layerwise)
    with opened(family_checkpoint("llama4_text")) as layerwise, pytest.raises(InputError, match="a way of its own"):
        check_optimised(layerwise)

"""The streamed forward pass is the model's own, bit for bit, with one layer's weights and one buffer in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch
from moekern.errors import InputError
from moekern.model import layerwise as layerwise_module
from moekern.model.compute import Compute
from moekern.model.finite import NotFinite
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.states import State, States
from moekern.model.stepwise import Stepwise, Tangled
from moekern.model.suspended import Suspended
from moekern.model.walk import Pass, Way, walk
from tests.helpers import families
from tests.helpers.pairwise import thirds
from tests.helpers.passes import Given

MakeCheckpoint = Callable[[str], Path]


TANGLED = ("inkling2", "inkling2_text", "mistral_large4")  # layers find in shared places what others have left


@pytest.mark.parametrize("name", thirds([n for n in families.FAMILIES if n not in families.NO_CALIBRATION], 0))
def test_streamed_logits_and_hidden_states_are_the_whole_models(
    name: str, family_checkpoint: MakeCheckpoint, whole_model: Callable[[str], Any]
) -> None:
    folder, whole = family_checkpoint(name), whole_model(name)
    batches = [families.input_ids(name, 2, 12, seed) for seed in (1, 2, 3)]
    checkpoint = open_checkpoint(folder)
    with open_layerwise(checkpoint, find_layout(checkpoint), Compute(dtype=torch.float32)) as layerwise:
        _, layers = layerwise.loader.decoder_layers()
        streamed_states: dict[tuple[int, int], torch.Tensor] = {}
        logits: dict[int, torch.Tensor] = {}
        running: list[tuple[int, int | None]] = []

        def forward(task: int) -> None:
            logits[task] = layerwise.model(input_ids=batches[task], use_cache=False).logits

        handles = [layer.register_forward_hook(_keep(streamed_states, i, running)) for i, layer in enumerate(layers)]
        layerwise_module._TANGLED.clear()
        told = pytest.warns(UserWarning, match="more of the layers before it") if name in TANGLED else nullcontext()
        with told:
            layerwise.run(range(3), Given(forward, lambda task, layer: _Now(running, (task, layer))))
        for handle in handles:
            handle.remove()
        path = layerwise.layers_name
    whole_states: dict[tuple[int, int], torch.Tensor] = {}
    layers = whole.get_submodule(path)
    handles = [layer.register_forward_hook(_keep(whole_states, i, running)) for i, layer in enumerate(layers)]
    for task, ids in enumerate(batches):
        with torch.no_grad(), _Now(running, (task, None)):
            assert torch.equal(logits[task], families.forward(whole, ids))
    for handle in handles:
        handle.remove()
    assert streamed_states.keys() == whole_states.keys()
    for key, state in whole_states.items():
        assert torch.equal(streamed_states[key], state), f"batch, layer {key}"


class _Now:
    """Says which task is running, in which layer; None: in all."""

    def __init__(self, running: list[tuple[int, int | None]], task: tuple[int, int | None]) -> None:
        self.running, self.task = running, task

    def __enter__(self) -> None:
        self.running.append(self.task)

    def __exit__(self, *error: object) -> None:
        self.running.pop()


def _keep(
    states: dict[tuple[int, int], torch.Tensor], layer: int, running: list[tuple[int, int | None]]
) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        task, at = running[-1]
        if at in (layer, None):
            states[task, layer] = hidden.detach().clone()

    return hook


def test_resident_weights_stay_within_skeleton_layer_and_buffer(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise_module, "worth_it", lambda device, team: False)  # else two layers are there
    checkpoint = open_checkpoint(family_checkpoint("qwen3_moe"))
    with open_layerwise(checkpoint, find_layout(checkpoint)) as layerwise:
        skeleton, peak = _resident(layerwise), 0
        largest = max(sum(entry.nbytes for entry, _ in group) for group in layerwise.reader.groups)
        release = layerwise.reader.release

        def measured(model: nn.Module) -> None:
            nonlocal peak
            release(model)
            peak = max(peak, _resident(layerwise, model))
            buffer = layerwise.reader.buffer
            assert buffer is not None
            assert buffer.data_ptr() not in {
                p.untyped_storage().data_ptr() for p in model.parameters() if not p.is_meta
            }

        layerwise.reader.release = measured  # type: ignore[method-assign]
        ids = families.input_ids("qwen3_moe")
        layerwise.run([0], Given(lambda task: layerwise.compute(Batch("text", ids))))
        assert skeleton < peak <= skeleton + largest
        assert _resident(layerwise) == skeleton


def _resident(layerwise: LayerwiseModel, made: nn.Module | None = None) -> int:
    """Bytes of the model's weights and of those of a layer that is not in it yet."""
    parts = [*layerwise.model.parameters(), *(() if made is None else made.parameters())]
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in parts if not p.is_meta}
    return sum(weights.values())


def test_a_tensor_the_model_needs_but_the_checkpoint_lacks_is_named(
    family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {}
    for shard in family_checkpoint("olmoe").glob("*.safetensors"):
        tensors |= load_file(shard)
    del tensors["model.layers.2.self_attn.q_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((family_checkpoint("olmoe") / "config.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    with open_layerwise(checkpoint, find_layout(checkpoint)) as layerwise:
        ids = families.input_ids("olmoe")
        with pytest.raises(InputError, match=r"no tensor for the model's model\.layers\.2\.self_attn\.q_norm\.weight"):
            layerwise.run([0], Given(lambda task: layerwise.compute(Batch("text", ids))))


class _Stack(nn.Module):
    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in self.order:
            x = self.layers[i](x)
        return x


WAYS: dict[str, Callable[[Any, Pass[Any]], Way[Any]]] = {
    "stepwise": lambda layers, run: Stepwise(layers, run, States()),
    "spilled": lambda layers, run: Stepwise(layers, run, States(0)),
    "suspended": Suspended,
}


def _walk(
    way: str,
    stack: _Stack,
    tasks: Any,
    run: Pass[Any],
    load: Callable[[int], None] = lambda i: None,
    unload: Callable[[int], None] = lambda i: None,
) -> None:
    walk(stack.layers, tasks, run, WAYS[way](stack.layers, run), load=load, unload=unload)


@pytest.mark.parametrize("way", WAYS)
def test_all_tasks_pass_a_layer_between_its_load_and_its_unload(way: str) -> None:
    stack, events, now = _Stack([0, 1, 2]), list[str](), list[tuple[int, int | None]]()
    for i, layer in enumerate(stack.layers):
        layer.register_forward_hook(
            lambda module, args, out, i=i: events.append(f"run {i}") if now[-1][1] == i else None  # type: ignore[misc]
        )
    run = Given(
        lambda task: events.append(f"end {task}") if stack(torch.zeros(1)) is not None else None,
        lambda task, layer: _Now(now, (task, layer)),
    )
    _walk(way, stack, "ab", run, lambda i: events.append(f"load {i}"), lambda i: events.append(f"unload {i}"))
    once = lambda i: [f"load {i}", f"run {i}", f"run {i}", f"unload {i}"]  # noqa: E731
    assert events == [*once(0), *once(1), "load 2", "run 2", "end a", "run 2", "end b", "unload 2"]


@pytest.mark.parametrize("way", WAYS)
def test_stopping_early_skips_the_rest_of_the_model(way: str) -> None:
    stack, seen = _Stack([0, 1, 2]), []
    for i, layer in enumerate(stack.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: seen.append(i), prepend=True)
    ended: list[int] = []
    run = Given(lambda task: ended.append(task) if stack(torch.zeros(1)) is not None else None, stop_after=1)
    _walk(way, stack, [0], run)
    assert max(seen) == seen[-1] == 1
    assert ended == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", [[0, 2, 1], [0, 1], [0, 0, 1, 2]])
def test_layers_out_of_order_are_an_error(order: list[int], way: str) -> None:
    stack = _Stack(order)
    with pytest.raises(RuntimeError, match="decoder layer"):
        _walk(way, stack, [0], Given(lambda task: stack(torch.zeros(1))))


@pytest.mark.parametrize("way", WAYS)
def test_an_error_in_one_task_ends_the_run_and_leaves_nothing(way: str) -> None:
    stack = _Stack([0, 1, 2])

    def forward(task: int) -> None:
        stack(torch.zeros(1))
        raise ValueError("after the last layer")

    with pytest.raises(ValueError, match="after the last layer"):
        _walk(way, stack, [0, 1], Given(forward))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in stack.layers)
    assert not any("forward" in vars(layer) for layer in stack.layers)


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_numbers_is_not_its_own_cause(way: str) -> None:
    """Notes on an error are looked for along its causes, which must end."""
    stack = _Stack([0, 1, 2])
    with pytest.raises(NotFinite) as found:
        _walk(way, stack, [0], Given(lambda task: stack(torch.full((1,), torch.inf))))
    assert (found.value.layer, found.value.task, found.value.__cause__) == (-1, 0, None)


class _Shared(nn.Module):
    """Layers that hand on more than hidden states, each in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers, self.how = nn.ModuleList(_Adds(i, how) for i in range(3)), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared: dict[str, torch.Tensor] = {}
        first, integers = x, torch.zeros(1, dtype=torch.int64)
        for layer in self.layers:
            if self.how == "dictionary":
                x = layer(x, shared)
            elif self.how == "integers":
                x, integers = layer(x, integers + 1)
            elif self.how == "returned":
                x, first = layer(x, first)
            else:  # between layers
                x = layer(x) + first
                first = x
        return x


class _Adds(nn.Module):
    def __init__(self, i: int, how: str) -> None:
        super().__init__()
        self.i, self.how = i, how

    def forward(self, x: torch.Tensor, more: Any = None) -> Any:
        if self.how == "dictionary":
            y = x + more.get("x", 1)
            more["x"] = y
            return y
        if self.how == "integers":
            return x + more, more + self.i
        return (x + more + self.i, x * 2) if self.how == "returned" else x * (self.i + 2)


@pytest.mark.parametrize("how", ["dictionary", "integers", "between"])
def test_layers_that_hand_on_more_are_noticed(how: str) -> None:
    model = _Shared(how)
    with pytest.raises(Tangled):
        walk(
            list(model.layers), [0], run := Given(lambda task: model(torch.ones(2))),
            Stepwise(list(model.layers), run, States()), load=lambda i: None, unload=lambda i: None,
        )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_layers_return_to_one_another_goes_along(way: str) -> None:
    model, found = _Shared("returned"), list[torch.Tensor]()
    inputs = [torch.ones(2), torch.arange(3.0)]
    run = Given(lambda task: found.append(model(inputs[task])))
    _walk(way, model, [0, 1], run)  # type: ignore[arg-type]
    for got, given in zip(found, inputs, strict=True):
        assert torch.equal(got, model(given))


@pytest.mark.parametrize("memory", [None, 0, 100])
def test_states_come_back_as_they_were_put(memory: int | None, tmp_path: Path) -> None:
    states, many = States(memory, tmp_path), torch.arange(60, dtype=torch.bfloat16).view(3, 20)
    for number in range(3):
        states.put(number, State(many[number : number + 1], {("mask", 1): torch.tensor([number])}))
    for number in range(3):
        for got in (states.copy(number), states.take(number)):
            assert torch.equal(got.hidden, many[number : number + 1])
            assert got.beside[("mask", 1)].tolist() == [number]
        states.put(number, State(torch.full((1, 40), float(number)), {}))  # longer than its place
    assert [float(states.take(number).hidden.sum()) for number in range(3)] == [0, 40, 80]
    assert states.size == 0
    states.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("wanted", [slice(0, 2), slice(2, 2), slice(0, 5)], ids=str)
def test_rows_of_a_state_are_read_alone(memory: int | None, wanted: slice, tmp_path: Path) -> None:
    hidden, tokens = torch.arange(12.0).view(4, 3), torch.tensor([2, 0, 1, 2, 3])
    with States(memory, tmp_path) as states:
        states.put(7, State(hidden, {("tokens",): tokens}))
        assert torch.equal(states.rows(7, ("tokens",), wanted), hidden[tokens[wanted]])
        assert torch.equal(states.take(7).hidden, hidden)


def test_what_the_models_own_code_raises_is_the_configs_fault(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    for path in family_checkpoint("kimi_k25").iterdir():
        shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["head_dim"] = 60000  # no tensor's shape shows it
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    with (
        open_layerwise(checkpoint, find_layout(checkpoint)) as layerwise,
        pytest.raises(InputError, match="config.json: its model cannot compute: RuntimeError: The size of tensor a"),
    ):
        layerwise.run([Batch("a", families.input_ids("kimi_k25"))], Given(layerwise.compute))

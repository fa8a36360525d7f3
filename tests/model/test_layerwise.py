"""The streamed forward pass is the model's own, bit for bit, with one layer's weights and one buffer in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch
from moekern.errors import InputError
from moekern.model.compute import Compute
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.suspended import run_suspended
from tests.helpers import families
from tests.helpers.passes import Given

MakeCheckpoint = Callable[[str], Path]


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in families.NO_CALIBRATION])
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
        running: list[int] = []

        def forward(task: int) -> None:
            logits[task] = layerwise.model(input_ids=batches[task], use_cache=False).logits

        handles = [layer.register_forward_hook(_keep(streamed_states, i, running)) for i, layer in enumerate(layers)]
        layerwise.run(range(3), Given(forward, lambda task, layer: _Now(running, task)))
        for handle in handles:
            handle.remove()
        path = layerwise.layers_name
    whole_states: dict[tuple[int, int], torch.Tensor] = {}
    layers = whole.get_submodule(path)
    handles = [layer.register_forward_hook(_keep(whole_states, i, running)) for i, layer in enumerate(layers)]
    for task, ids in enumerate(batches):
        with torch.no_grad(), _Now(running, task):
            assert torch.equal(logits[task], families.forward(whole, ids))
    for handle in handles:
        handle.remove()
    assert streamed_states.keys() == whole_states.keys()
    for key, state in whole_states.items():
        assert torch.equal(streamed_states[key], state), f"batch, layer {key}"


class _Now:
    """Says which task is running."""

    def __init__(self, running: list[int], task: int) -> None:
        self.running, self.task = running, task

    def __enter__(self) -> None:
        self.running.append(self.task)

    def __exit__(self, *error: object) -> None:
        self.running.pop()


def _keep(states: dict[tuple[int, int], torch.Tensor], layer: int, running: list[int]) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states[running[-1], layer] = hidden.detach().clone()

    return hook


def test_resident_weights_stay_within_skeleton_layer_and_buffer(family_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(family_checkpoint("qwen3_moe"))
    with open_layerwise(checkpoint, find_layout(checkpoint)) as layerwise:
        skeleton, peak = _resident(layerwise), 0
        largest = max(sum(entry.nbytes for entry, _ in group) for group in layerwise.reader.groups)
        release = layerwise.reader.release

        def measured(model: nn.Module) -> None:
            nonlocal peak
            release(model)
            peak = max(peak, _resident(layerwise))
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


def _resident(layerwise: LayerwiseModel) -> int:
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in layerwise.model.parameters() if not p.is_meta}
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


def test_all_tasks_pass_a_layer_between_its_load_and_its_unload() -> None:
    stack, events = _Stack([0, 1, 2]), []
    for i, layer in enumerate(stack.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: events.append(f"run {i}"))
    run_suspended(
        stack.layers,
        "ab",
        Given(lambda task: events.append(f"end {task}") if stack(torch.zeros(1)) is not None else None),
        load=lambda i: events.append(f"load {i}"),
        unload=lambda i: events.append(f"unload {i}"),
    )
    assert events == (
        [
            "load 0",
            "run 0",
            "run 0",
            "unload 0",
            "load 1",
            "run 1",
            "run 1",
            "unload 1",
            "load 2",
            "run 2",
            "end a",
            "run 2",
            "end b",
            "unload 2",
        ]
    )


def test_stopping_early_skips_the_rest_of_the_model() -> None:
    stack, seen = _Stack([0, 1, 2]), []
    for i, layer in enumerate(stack.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: seen.append(i), prepend=True)
    ended: list[int] = []
    run_suspended(
        stack.layers,
        [0],
        Given(lambda task: ended.append(task) if stack(torch.zeros(1)) is not None else None, stop_after=1),
        load=lambda i: None,
        unload=lambda i: None,
    )
    assert seen == [0, 1]
    assert ended == []


@pytest.mark.parametrize("order", [[0, 2, 1], [0, 1], [0, 0, 1, 2]])
def test_layers_out_of_order_are_an_error(order: list[int]) -> None:
    stack = _Stack(order)
    run = Given(lambda task: stack(torch.zeros(1)))
    with pytest.raises(RuntimeError, match="decoder layer"):
        run_suspended(stack.layers, [0], run, load=lambda i: None, unload=lambda i: None)


def test_an_error_in_one_task_ends_the_run_and_leaves_no_hooks() -> None:
    stack = _Stack([0, 1, 2])

    def forward(task: int) -> None:
        stack(torch.zeros(1))
        raise ValueError("after the last layer")

    with pytest.raises(ValueError, match="after the last layer"):
        run_suspended(stack.layers, [0, 1], Given(forward), load=lambda i: None, unload=lambda i: None)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in stack.layers)


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

"""The next layer is filled while one computes, to the same bits, and errors come up where the layer is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moekern.architectures import find_layout
from moekern.calibration import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch
from moekern.errors import InputError
from moekern.evaluation.evaluate import evaluate
from moekern.iteration import Method, iterate
from moekern.model import layerwise
from moekern.model.budget import Budget
from moekern.model.compute import Compute
from moekern.model.filling import spare_cores
from moekern.model.layerwise import LayerwiseModel, open_layerwise
from moekern.model.transformers_api import Loader
from moekern.team import Team
from tests.helpers import families
from tests.helpers.passes import Given
from tests.helpers.tight import tighten
from tests.model.test_expert_groups import plans, text

MakeCheckpoint = Callable[[str], Path]
F32 = Compute(dtype=torch.float32)


@pytest.fixture(params=[False, True], ids=["between layers", "overlapped"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(layerwise, "worth_it", lambda device, team: request.param)
    return bool(request.param)


def overlap(patch: pytest.MonkeyPatch, wanted: bool) -> None:
    patch.setattr(layerwise, "worth_it", lambda device, team: wanted)


@pytest.mark.parametrize("way", ["whole", "groups"])
@pytest.mark.parametrize(
    "name", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.whole)]
)  # whose experts are copied, and converted
def test_bits_are_those_of_layers_that_are_filled_in_turn(
    name: str, way: str, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, made = family_checkpoint(name), []
    if way == "groups":
        tighten(monkeypatch, folder, F32, 0.9)
        monkeypatch.setattr(layerwise.ExpertGroups, "divide", _always_ahead(layerwise.ExpertGroups.divide))
    for wanted in (False, True):
        overlap(monkeypatch, wanted)
        if way == "whole":
            found: Any = evaluate(folder, text(name, 1), plans(folder), F32)
        else:
            found = iterate(folder, text(name, 1), Method("reap", 4, 1), F32).to_json()
        calibrate(folder, text(name, 1), F32, out=tmp_path / str(wanted))
        made.append((found, (tmp_path / str(wanted)).read_bytes()))
    assert made[0] == made[1]


def _always_ahead(divide: Callable[..., Any]) -> Callable[..., Any]:
    def divided(self: Any, names: Any, budget: Any, ahead: bool = False) -> Any:
        return replace(divide(self, names, budget, False), ahead=int(ahead))

    return divided


def test_a_layer_is_filled_while_the_one_before_computes(
    family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Where that is not so, the first layer would wait for ever for the second one to be filled."""
    filled, where, load = threading.Event(), set[str](), Loader.load

    def seen(self: Loader, tensors: Any, device: torch.device) -> None:
        load(self, tensors, device)
        where.add(threading.current_thread().name)
        if any(".layers.1." in name for name in tensors):
            filled.set()

    monkeypatch.setattr(Loader, "load", seen)
    with _opened(family_checkpoint("qwen3_moe")) as model:
        assert (model.takes.ahead > 0) == ahead
        assert ("filled meanwhile" in model.takes.described) == ahead
        model.layers[0].register_forward_hook(lambda *_: None if filled.wait(60 * ahead) else None)
        _run(model)
        assert filled.is_set()
    assert len(where) == 1 + ahead  # what lies outside of layers is filled by this thread


def _opened(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder)
    return open_layerwise(checkpoint, find_layout(checkpoint), F32)


def _run(model: LayerwiseModel) -> None:
    ids = families.input_ids("qwen3_moe")
    model.run([0], Given(lambda task: model.compute(Batch("text", ids))))


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (MemoryError("no more"), r"not enough memory for the weights of decoder layer 2 \(no more\); give more"),
        (InputError("it is odd"), "^it is odd$"),
        (KeyError("a mistake"), "a mistake"),
    ],
)
def test_an_error_comes_up_at_the_layer_that_it_is_about(
    raised: Exception, told: str, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    load, through = Loader.load, list[int]()

    def broken(self: Loader, tensors: Any, device: torch.device) -> None:
        if any(".layers.2." in name for name in tensors):
            raise raised
        load(self, tensors, device)

    monkeypatch.setattr(Loader, "load", broken)
    with _opened(family_checkpoint("qwen3_moe")) as model:
        for i, layer in enumerate(model.layers):
            layer.register_forward_hook(lambda *_, i=i: through.append(i))
        with pytest.raises(KeyError if isinstance(raised, KeyError) else InputError, match=told) as found:
            _run(model)
        assert max(through) == 1
        assert isinstance(raised, KeyError) or found.value.kind in ("memory", "checkpoint", "input")
        assert not any(thread.name.startswith("moekern-fill") for thread in threading.enumerate()) or ahead
    assert not any(thread.name.startswith("moekern-fill") for thread in threading.enumerate())


def test_what_is_under_way_is_forgotten(family_checkpoint: MakeCheckpoint, ahead: bool) -> None:
    with _opened(family_checkpoint("qwen3_moe")) as model:
        for number in (3, 1, 1, 2):
            model.filler.begin(number)
        found = dict(model.filler.take(2).named_parameters())
        model.filler.begin(0)
        model.filler.cancel()
        for number in (2, 3):
            assert number == next(model.visit([number]))
        (own,) = (dict(model.layers[i].named_parameters()) for i in model.visit([2]))
        assert all(p.is_meta for layer in model.layers for p in layer.parameters())
    assert found.keys() == own.keys()


def test_there_is_no_overlap_without_room(family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    overlap(monkeypatch, True)
    with _opened(family_checkpoint("qwen3_moe")) as model:
        takes = model.takes
    host = 2 * (takes.outside + 2 * (takes.weights + takes.buffer))  # half is for computing, and half for states
    for more, room in ((0, False), (4 * takes.ahead, True)):
        monkeypatch.setattr(layerwise, "budget_of", lambda compute, more=more: Budget(host + more))
        with _opened(family_checkpoint("qwen3_moe")) as model:
            assert not model.groups.cuts
            assert (model.takes.ahead > 0) == room
            assert (model.filler._pool is not None) == room


def test_cores_that_compute_are_not_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team()
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert spare_cores(team) == 4
    team.local_size = 2
    assert spare_cores(team) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_on_a_gpu_bits_are_those_of_layers_that_are_filled_in_turn(
    name: str, family_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = family_checkpoint(name), []
    for wanted in (False, True):
        overlap(monkeypatch, wanted)
        made.append(evaluate(folder, text(name), plans(folder), Compute(device="cuda", dtype=torch.float32)))
    assert made[0] == made[1]

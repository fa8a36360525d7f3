"""A model is known by its routers, whatever its other tensors are stored as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moekern.architectures import find_layout
from moekern.architectures.twins import NUMBERS, router_numbers, same_routers
from moekern.checkpoint.folder import open_checkpoint
from tests.helpers import families
from tests.helpers.quantised import fp8, rewrite

MakeCheckpoint = Callable[[str], Path]


def numbers(folder: Path) -> dict[str, str]:
    checkpoint = open_checkpoint(folder)
    return router_numbers(checkpoint, find_layout(checkpoint))


def sample(values: Tensor) -> dict[str, str]:
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[values.dtype]
    return {"0": f"{name} 8x2 {values.view(torch.uint8).numpy().tobytes().hex()}"}


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name != "ernie4_5_vl_moe"])  # cannot be pruned
def test_every_layer_of_every_family_is_known_by_its_router(name: str, family_checkpoint: MakeCheckpoint) -> None:
    found, layout = numbers(family_checkpoint(name)), find_layout(open_checkpoint(family_checkpoint(name)))
    assert found.keys() == layout.layers.keys()
    assert len(set(found.values())) == len(found)


def test_numbers_are_those_in_the_middle_of_the_router(family_checkpoint: MakeCheckpoint) -> None:
    folder = family_checkpoint("mixtral")
    router = families.load(folder).state_dict()["model.layers.2.mlp.gate.weight"].flatten()
    middle = router[(len(router) - NUMBERS) // 2 :][:NUMBERS].contiguous()
    assert numbers(folder)["2"] == f"F32 8x32 {middle.numpy().tobytes().hex()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twins_have_the_same_routers_and_tunes_have_not(
    dtype: torch.dtype, family_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = family_checkpoint("qwen3_moe")
    twin = rewrite(source, tmp_path / "dtype", lambda name, t: {name: t.to(dtype)})
    tuned = rewrite(twin, tmp_path / "tuned", lambda name, t: {name: t * 1.02 if "2.mlp.gate." in name else t})
    assert same_routers(numbers(source), numbers(twin))
    assert same_routers(numbers(fp8(source, tmp_path / "fp8")), numbers(twin)) == (dtype != torch.float16)
    assert not same_routers(numbers(twin), numbers(tuned))
    assert not same_routers(numbers(source), numbers(tuned))


def test_rounding_goes_either_way_and_once() -> None:
    exact = torch.randn(16, generator=torch.Generator().manual_seed(0))
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(2**-130), 0.0] * 4)  # between two of bfloat16; subnormal
    for values in (exact, ties):
        for dtype in (torch.bfloat16, torch.float16):
            assert same_routers(sample(values), sample(values.to(dtype)))
            assert same_routers(sample(values.to(dtype)), sample(values))
    assert same_routers(sample(exact.half()), sample(exact.half().bfloat16()))
    assert not same_routers(sample(exact), sample(exact.nextafter(torch.tensor(9.0))))
    assert not same_routers(sample(exact.bfloat16()), sample(exact * 1.01))


GOOD = sample(torch.ones(16))


@pytest.mark.parametrize(
    "other",
    [
        None,
        {},
        7,
        {"0": 3},
        {"0": GOOD["0"] + "0"},
        {"0": GOOD["0"].replace("8x2", "4x4")},
        {"0": "BF16 8x2 3f8"},
        {"1": GOOD["0"]},
        {**GOOD, "1": GOOD["0"]},
        sample(torch.full((16,), torch.nan).bfloat16()),
        sample(torch.ones(8).bfloat16()),
    ],
)
def test_what_is_not_known_is_no_twin(other: object) -> None:
    assert same_routers(GOOD, dict(GOOD))
    assert not same_routers(GOOD, other)
    assert not same_routers(other, GOOD)
    assert not same_routers({}, {})

"""Weights stored again in a checkpoint's own format: the nearest that it can hold, and what was stored comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from moekern.checkpoint.header import DTYPE_BITS
from moekern.model.dequantised import dense
from moekern.model.requantised import Requantised, as_stored, requantised
from tests.helpers.quantised_models import E2M1, E8M0, FORMATS, GROUP

READ_ONLY = [
    kind for kind in FORMATS
    if "nvfp4" in kind or kind.endswith(("_ordered", "_zero")) or kind.startswith(("gptq", "awq", "auto_round"))
]  # fmt: skip
WRITTEN = [kind for kind in FORMATS if kind not in READ_ONLY]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
VALUES: Mapping[str, Tensor] = {
    "fp8": E4M3[E4M3.isfinite()], "mxfp4": E2M1, "fp4": E2M1,
    **{f"int{bits}": torch.arange(-(1 << bits - 1), 1 << bits - 1).float() for bits in (3, 4, 8)},
    "w8a8": torch.arange(-128, 128).float(),
}  # fmt: skip


def made(kind: str, R: int = 48, C: int = 64) -> tuple[dict[str, Tensor], Tensor, Mapping[str, Any]]:
    make, config = FORMATS[kind]
    parts, weight = make(R, C, torch.Generator().manual_seed(3))
    return parts, weight, config


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales(found: Mapping[str, Tensor], R: int, C: int) -> Tensor:
    """What each number of [R, C] is multiplied with, by the parts' shapes."""
    scale = next(t for name, t in found.items() if "scale" in name and name != "input_scale")
    scale = (scale.view(E8M0) if scale.dtype == torch.uint8 else scale).float()
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(R, C)
    grid = scale if scale.ndim == 2 else scale[:, None]
    rows, columns = (GROUP, GROUP) if grid.shape == (-(-R // GROUP), -(-C // GROUP)) else (1, -(-C // grid.shape[1]))
    return grid.repeat_interleave(rows, 0)[:R].repeat_interleave(columns, 1)[:, :C]


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_stored_comes_back(kind: str) -> None:
    parts, weight, config = made(kind)
    found = requantised(weight, parts, config)
    assert {name: (t.dtype, t.shape) for name, t in found.parts.items()} == {
        name: (t.dtype, t.shape) for name, t in parts.items()
    }
    assert torch.equal(dense(found.parts, config, torch.float32), weight)
    assert found.error_square == 0
    assert found.square == pytest.approx(float(weight.double().square().sum()))


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("shape", [(48, 64), (32, 64), (48, 32)], ids=["alike", "fewer rows", "fewer columns"])
def test_other_numbers_are_the_nearest_of_their_scales(kind: str, shape: tuple[int, int]) -> None:
    parts, _, config = made(kind)
    weight = normal(*shape) * torch.linspace(0.01, 3, shape[0])[:, None]
    found = requantised(weight, parts, config)
    stored = dense(found.parts, config, torch.float32)
    assert stored.shape == shape
    word = next(word for word in VALUES if word in kind)
    values = VALUES[word]
    choices = values * scales(found.parts, *shape)[..., None]
    least = (choices - weight[..., None]).abs().min(-1).values
    assert torch.allclose((stored - weight).abs(), least, rtol=0, atol=1e-6)
    assert found.error_square == pytest.approx(float((stored - weight).double().square().sum()))
    # of normal numbers: 2^-4 at the most of each one in FP8 (2^-10 of its block's largest, below that), a step of a
    # fifteenth of twice the largest with 16 codes, 1/4 of each or more with E2M1
    # with as many bits, 1/2^bits of the largest
    share = (found.error_square / found.square) ** 0.5
    assert share < {"fp8": 0.04, "int3": 0.4, "int8": 0.02, "w8a8": 0.02}.get(word, 0.17)


def test_scales_are_those_of_the_makers_where_the_checkpoints_do_not_fit() -> None:
    parts, _, config = made("fp8_block")
    far = {**parts, "weight_scale_inv": torch.full_like(parts["weight_scale_inv"], 1e3)}
    weight = normal(48, 64)
    found = requantised(weight, far, config).parts["weight_scale_inv"]
    largest = weight.abs().reshape(3, GROUP, 4, GROUP).amax((1, 3))
    assert torch.equal(found, largest / 448)
    parts, _, config = made("fp8_block_e8m0")
    found = requantised(weight, {**parts, "scale": torch.full((3, 4), 250, dtype=torch.uint8).view(E8M0)}, config)
    assert torch.equal(found.parts["scale"].float(), torch.exp2((largest / 448).log2().ceil()))
    powers = {**config, "scale_fmt": "ue8m0"}
    found = requantised(weight, far, powers)  # powers of two, stored as float32
    assert torch.equal(found.parts["weight_scale_inv"], torch.exp2((largest / 448).log2().ceil()))


def test_a_tie_goes_to_the_even_code() -> None:
    parts = {
        "weight": torch.zeros(1, 16, dtype=torch.int8),
        "scale": torch.full((1, 1), 127, dtype=torch.uint8).view(E8M0),
    }
    weight = torch.zeros(1, 32)
    weight[0, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    weight[0, 8:16] = -weight[0, :8]
    stored = dense(requantised(weight, parts, {}).parts, {}, torch.float32)
    want = torch.tensor([0, 1, 1, 2, 2, 4, 4, 6])
    assert torch.equal(stored[0, :16], torch.cat([want, -want]).float())


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1, 1), (3, 48), (3, 48, 1)])
def test_stacks_and_their_scales(shape: tuple[int, ...]) -> None:
    weight = normal(3, 48, 64)
    codes = normal(3, 48, 64).mul(4).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": torch.rand(shape) + 0.5, "input_scale": torch.ones(3)}
    try:
        before = dense(parts, {}, torch.float32)
    except ValueError:
        pytest.skip("no layout that is read")
    assert torch.equal(dense(requantised(before, parts, {}).parts, {}, torch.float32), before)
    found = requantised(weight, parts, {})
    assert found.parts["weight_scale"].shape == shape
    assert found.parts["input_scale"] is parts["input_scale"]
    assert (found.error_square / found.square) ** 0.5 < 0.04


@pytest.mark.parametrize("flat", [False, True])
def test_gpt_oss_stores_the_transpose(flat: bool) -> None:
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 24, 3, 16), generator=g, dtype=torch.uint8)
    parts = {"blocks": blocks.flatten(-2) if flat else blocks}
    parts["scales"] = torch.randint(120, 125, (2, 24, 3), generator=g, dtype=torch.uint8)
    before = dense(parts, {}, torch.float32)
    assert before.shape == (2, 96, 24)
    found = requantised(before, parts, {})
    assert found.parts["blocks"].shape == parts["blocks"].shape
    assert torch.equal(dense(found.parts, {}, torch.float32), before)
    narrow = requantised(normal(2, 64, 24), parts, {})
    assert narrow.parts["scales"].shape == (2, 24, 2)
    assert dense(narrow.parts, {}, torch.float32).shape == (2, 64, 24)


def test_blocks_cut_short_and_blocks_of_zeros() -> None:
    parts, _, config = made("fp8_block", 40, 50)
    weight = normal(40, 50)
    weight[:16, :16] = 0
    stored = dense(requantised(weight, parts, config).parts, config, torch.float32)
    assert bool((stored[:16, :16] == 0).all())
    assert float((stored - weight).abs().max()) < 0.25
    for kind in WRITTEN:
        parts, _, config = made(kind)
        assert not bool(dense(requantised(torch.zeros(48, 64), parts, config).parts, config, torch.float32).any())


def test_plain_numbers() -> None:
    found = requantised(normal(4, 8), {"weight": torch.zeros(4, 8, dtype=torch.bfloat16)}, {})
    assert torch.equal(found.parts["weight"], normal(4, 8).bfloat16())
    with pytest.raises(ValueError, match="too large for the format"):
        requantised(normal(4, 8) * 1e6, {"weight": torch.zeros(4, 8, dtype=torch.float16)}, {})


@pytest.mark.parametrize("kind", READ_ONLY)
def test_formats_that_are_read_alone(kind: str) -> None:
    parts, weight, config = made(kind)
    with pytest.raises(ValueError, match="are read, and not written"):
        requantised(weight, parts, config)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda w: w.double(), "expected finite numbers in float32"),
        (lambda w: w / 0, "expected finite numbers in float32"),
        (lambda w: w[:, :50], "50 columns are no whole number of groups of 8"),
    ],
)
def test_what_cannot_be_stored(change: Callable[[Tensor], Tensor], line: str) -> None:
    parts, weight, config = made("compressed_int4")
    with pytest.raises(ValueError, match=line):
        requantised(change(weight), parts, config)


def test_as_stored() -> None:
    for dtype, shape in ((torch.bfloat16, (2, 3)), (torch.float8_e4m3fn, (4,)), (torch.int32, ()), (E8M0, (1, 1))):
        tensor = torch.ones(shape).to(dtype)
        name, sizes, data = as_stored(tensor)
        assert sizes == shape
        assert data.nbytes == tensor.numel() * DTYPE_BITS[name] // 8
        assert bytes(data) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    assert isinstance(requantised(torch.ones(1, 1), {"weight": torch.ones(1, 1)}, {}), Requantised)

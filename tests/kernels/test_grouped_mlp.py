"""The experts block as one op: every backend against its float64 meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moekern import kernels
from moekern.kernels import reference
from moekern.kernels.grouped_mlp import ACTIVATIONS, FASTEST
from moekern.kernels.quantised import scaled
from tests.helpers.cases import Case, Mlp, Rows, mlp, moved, stream
from tests.helpers.ops import DTYPES, U, assert_expert_sums_agree, combined, runs
from tests.helpers.pairwise import matrix

CASES = {
    "no-token": (Case(0, 4, 2, 8), 8),
    "one-token": (Case(1, 4, 2, 1, ids=torch.int32), 1),
    "one-slot": (Case(40, 2, 1, 31, ids=torch.int32), 48),
    "all-chosen": (Case(33, 4, 4, 33, masked=True), 17),
    "one-expert": (Case(70, 1, 1, 64), 32),
    "favourite": (Case(45, 6, 3, 64, favourite=True), 80),
    "masked-and-empty": (Case(24, 3, 2, 150, masked=True, empty=True), 70),
}
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half an ulp of 1
# One addition to a float32 sum: tensor cores cut bits off where others round, so twice a rounding's error.
ADDED = 2.0**-23


@dataclass(frozen=True)
class Near:
    """A value of the definition, float64, and how far another order of additions may lead from it."""

    value: Tensor
    error: Tensor

    def rounded(self, dtype: torch.dtype) -> Near:
        """Both are rounded, each by half an ulp at most; float16's are 2^-24 at least."""
        error = self.error + UNIT[dtype] * (2 * self.value.abs() + self.error)
        if dtype == torch.float16:
            error += 2.0**-24
        return Near(self.value.to(dtype).double(), error)


def product(a: Near, w: Tensor) -> Near:
    """a w^T: what a is wrong by, and a rounding for each addition of products that are exact or rounded once."""
    terms = (a.value.abs() + a.error) @ w.abs().T
    return Near(a.value @ w.T, a.error @ w.abs().T + (w.shape[1] + 1) * ADDED * terms)


def activated(x: Near, activation: str) -> Near:
    """None of the three is steeper than 1.13.

    In float32 the argument of exp or erf, at most |x| (2 + x^2 / 8), is wrong by 4 roundings, and exp relatively by as
    much as its argument absolutely; exp or erf itself, the sum, the product with x and the quotient add 8.
    """
    value = reference.ACTIVATIONS[activation](x.value)
    argument = x.value.abs() * (2 + x.value**2 / 8)
    own = (4 * argument + 8) * UNIT[torch.float32] * (value.abs() if activation != "gelu" else x.value.abs())
    return Near(value, 1.13 * x.error + own)


def expected(args: Mlp, activation: str = "silu") -> Near:
    """y [offsets[E], H] by the definition."""
    dtype, parts = args.x.dtype, []
    for e, (start, stop) in enumerate(zip(args.offsets.tolist(), args.offsets.tolist()[1:], strict=False)):
        w, v = (reference.of_expert(weight, e, dtype).double() for weight in (args.gate_up, args.down))
        x = args.x[args.order[start:stop] // args.topk_idx.shape[1]].double()
        gate, up = (product(Near(x, x * 0), half).rounded(dtype) for half in w.chunk(2))
        act = activated(gate, activation).rounded(dtype)
        error = act.error * (up.value.abs() + up.error) + act.value.abs() * up.error
        inner = Near(act.value * up.value, error).rounded(dtype)
        parts.append(product(inner, v).rounded(dtype))
    return Near(torch.cat([p.value for p in parts]), torch.cat([p.error for p in parts]))


def run(args: Mlp, device: str = "cpu", backend: str | None = None, dimensions: int = 0, **more: Any) -> Any:
    sums = kernels.expert_sums(len(args.offsets) - 1, dimensions, device)
    more = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in more.items()}
    out = kernels.grouped_mlp(*moved(args, device), sums, backend=backend, **more)
    return out.cpu(), kernels.ExpertSums(*(s.cpu() for s in sums))


def weighted(args: Mlp, y: Tensor, weight: Tensor) -> Tensor:
    """sum over a token's slots of weight x y, [T, H] float64."""
    T, K = args.topk_idx.shape
    order = args.order[: len(y)]
    out = torch.zeros(T, y.shape[1], dtype=torch.float64)
    return out.index_add(0, order // max(K, 1), weight.double().reshape(-1)[order, None] * y)


def assert_close(got: Tensor, args: Mlp, want: Near) -> None:
    """The output's own additions are K products and sums in float32, and one rounding."""
    out, size = weighted(args, want.value, args.topk_weight), weighted(args, want.value.abs(), args.topk_weight)
    error = weighted(args, want.error, args.topk_weight)
    total = Near(out, error + (2 * args.topk_idx.shape[1]) * 2.0**-24 * (size + error)).rounded(args.x.dtype)
    assert got.dtype == args.x.dtype
    wrong = (got.double() - total.value).abs() - total.error
    assert (wrong <= 0).all(), f"{float(wrong.max())} more than allowed"


@matrix([*runs("grouped_mlp"), ("cpu", "reference")], sizes=CASES, dtype=DTYPES)
def test_outputs_are_those_of_the_definition(
    device: str, backend: str, sizes: tuple[Case, int], dtype: torch.dtype
) -> None:
    args = mlp(*sizes, dtype)
    out, _ = run(args, device, backend)
    assert_close(out, args, expected(args))


@pytest.mark.parametrize(("device", "backend"), runs("grouped_mlp"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device: str, backend: str, activation: str) -> None:
    args = mlp(Case(40, 3, 2, 32), 16)
    args = args._replace(x=args.x * 3)
    out, _ = run(args, device, backend, activation=activation)
    assert_close(out, args, expected(args, activation))


@pytest.mark.parametrize(("device", "backend"), runs("grouped_mlp"))
@pytest.mark.parametrize(
    ("block", "scales"),
    [((128, 128), torch.float32), ((16, 24), torch.bfloat16), ((1, 1000), torch.float8_e8m0fnu)],
    ids=str,
)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_fp8_weights_stand_for_their_dequantised_values(
    device: str, backend: str, dtype: torch.dtype, block: tuple[int, int], scales: torch.dtype
) -> None:
    args = mlp(Case(12, 2, 1, 150), 70, dtype, block, scales=scales)
    out, sums = run(args, device, backend)
    assert_close(out, args, expected(args))
    dense = args._replace(**{n: kernels.dequantize(getattr(args, n), dtype) for n in ("gate_up", "down")})
    want, want_sums = run(dense, device, backend)
    if device == "cpu" or backend == "grouped_mm":  # a chip may multiply by other instructions
        assert torch.equal(out, want)
        assert all(torch.equal(a, b) for a, b in zip(sums, want_sums, strict=True))


@pytest.mark.parametrize(("device", "backend"), runs("grouped_mlp"))
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # what NumPy thinks of NaN
def test_every_fp8_code_and_power_of_two(device: str, backend: str) -> None:
    """An expert whose inner values are gelu(20) / 16 = 1.25 and zeros: its outputs are 1.25 of down's first column."""
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)  # two of them NaN
    exponents = torch.arange(256).clamp(10, 244).to(torch.uint8)  # nothing subnormal, nothing infinite
    exponents[100] = 255  # NaN
    scale = exponents.view(torch.float8_e8m0fnu)[None, :, None]
    down = scaled(codes[None, :, None].expand(1, 256, 16).contiguous(), scale, (1, 16))
    gate_up = torch.zeros(1, 32, 256)
    gate_up[0, 0, 0], gate_up[0, 16, 1] = 20.0, 2.0**-4
    x = torch.zeros(1, 256).index_fill(1, torch.tensor([0, 1]), 1.0)
    slot = torch.zeros(1, 1, dtype=torch.int64)
    args = Mlp(x, gate_up, down, torch.ones(1, 1), slot, slot[0], torch.tensor([0, 1]), None)
    out = kernels.grouped_mlp(*moved(args, device), None, activation="gelu", backend=backend)
    want = kernels.dequantize(down, torch.float32)[0, :, 0] * 1.25
    assert want.isnan().sum() == 3
    torch.testing.assert_close(out.cpu()[0], want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("device", "backend"), [*runs("grouped_mlp"), ("cpu", "reference")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_rounded_to_the_dtype_of_x(device: str, backend: str, dtype: torch.dtype) -> None:
    """Sums of one product: nothing but the roundings that the definition names, so its bits.

    Left out are activations so near to the middle between two values that float32 may be on either side of it.
    """
    g, E, T, width = torch.Generator().manual_seed(3), 2, 50, 16
    x = torch.randn(T, width, generator=g).to(dtype)
    gate, up, down = torch.randn(3, E, width, generator=g).to(dtype)
    idx = torch.randint(E, (T, 1), generator=g)
    gate_up = torch.cat([torch.diag_embed(gate), torch.diag_embed(up)], 1)
    args = Mlp(x, gate_up, torch.diag_embed(down), torch.ones(T, 1), idx, *kernels.sort_by_expert(idx, E), None)
    out, _ = run(args, device, backend)

    gate, up, down, x = (t.double() for t in (gate[idx[:, 0]], up[idx[:, 0]], down[idx[:, 0]], x))
    act = torch.nn.functional.silu((gate * x).to(dtype).double())
    sure = (act * (1 + 2.0**-17)).to(dtype) == (act * (1 - 2.0**-17)).to(dtype)
    inner = (act.to(dtype).double() * (up * x).to(dtype).double()).to(dtype)
    assert sure.float().mean() > 0.9
    assert torch.equal(out[sure], (down * inner.double()).to(dtype)[sure])


def outputs_of(args: Mlp, device: str, backend: str) -> Tensor:
    """y [N, H] as a backend has it in passing: what it returns where each slot is a token with a gate of one."""
    slots, K = args.topk_idx.numel(), args.topk_idx.shape[1]
    apart = args._replace(
        x=args.x.repeat_interleave(K, dim=0),
        topk_idx=args.topk_idx.reshape(slots, 1),
        topk_weight=torch.ones(slots, 1),
        mask=None,
    )
    return run(apart, device, backend)[0][args.order]


@matrix(
    runs("grouped_mlp"),
    sizes={name: CASES[name] for name in ("all-chosen", "favourite", "masked-and-empty")},
    dtype=DTYPES,
)
def test_sums_are_those_of_the_outputs(device: str, backend: str, sizes: tuple[Case, int], dtype: torch.dtype) -> None:
    case, width = sizes
    args = mlp(case, width, dtype)
    y = outputs_of(args, device, backend)
    as_rows = Rows(y, *args[3:])
    want_out, want = combined(as_rows, case.E, case.H, backend="reference")
    out, got = run(args, device, backend, case.H, residual=stream(as_rows))
    assert torch.equal(out, want_out)
    # A row's squares are added in any order.
    assert_expert_sums_agree(got, want, as_rows, want_out, row=(case.H + 2) * U)


@pytest.mark.parametrize(("device", "backend"), [param for param in runs("grouped_mlp") if "triton" in param.values])
def test_only_the_norms_are_added_in_another_order(device: str, backend: str) -> None:
    case, width = CASES["masked-and-empty"]
    args = mlp(case, width, torch.bfloat16)
    _, want = combined(Rows(outputs_of(args, device, backend), *args[3:]), case.E, case.H, device, backend)
    _, got = run(args, device, backend, case.H)
    for name in ("max_abs", "square_sum", "value_sum"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize(("device", "backend"), runs("grouped_mlp"))
def test_without_sums_nothing_is_measured(device: str, backend: str) -> None:
    args = mlp(*CASES["masked-and-empty"])
    out, sums = run(args, device, backend)
    alone = kernels.grouped_mlp(*moved(args, device), None, backend=backend)
    assert torch.equal(alone.cpu(), out)
    again, more = run(args, device, backend)
    assert torch.equal(again, out)
    assert all(torch.equal(a, b) for a, b in zip(more, sums, strict=True))


@pytest.mark.parametrize(("device", "backend"), [*runs("grouped_mlp"), ("cpu", "reference")])
def test_rows_behind_the_experts_are_not_read(device: str, backend: str) -> None:
    args = mlp(*CASES["masked-and-empty"])
    out, sums = run(args, device, backend)
    behind = torch.tensor([2**62, -1, 0, -(2**62)])
    more, more_sums = run(args._replace(order=torch.cat([args.order, behind])), device, backend)
    if backend != "triton":  # its tiles depend on the number of rows, and the bits on the tiles
        assert torch.equal(out, more)
    torch.testing.assert_close(out, more)
    for a, b in zip(sums, more_sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("device", "backend"), runs("grouped_mlp"))
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # what NumPy thinks of NaN and infinities
def test_a_nan_stays_in_its_row(device: str, backend: str) -> None:
    args = mlp(Case(12, 3, 1, 33), 20)
    clean, _ = run(args, device, backend)
    for bad in (torch.nan, torch.inf):
        x = args.x.clone()
        x[5, 2] = bad
        out, sums = run(args._replace(x=x), device, backend)
        others = torch.arange(12) != 5
        assert torch.equal(out[others], clean[others])
        assert not out[5].isfinite().any()
        assert sums.max_abs.isfinite().tolist() == [e != int(args.topk_idx[5]) for e in range(3)]


ARGS = mlp(Case(6, 4, 2, 16, masked=True), 8)
FP8 = mlp(Case(6, 4, 2, 16), 8, fp8=(8, 8))
E5M2 = scaled(torch.zeros(4, 16, 16).to(torch.float8_e5m2), torch.ones(4, 2, 2), (8, 8))
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x": ({"x": torch.zeros(6, 16).double()}, "x: expected float32 or bfloat16 or float16, got float64"),
    "list": ({"x": [0]}, "x: expected a tensor, got list"),
    "hidden": ({"x": torch.zeros(6, 15)}, "gate_up: expected H=15, got 16"),
    "dtype": ({"down": ARGS.down.half()}, "down: expected float32, got float16"),
    "width": ({"gate_up": torch.zeros(4, 14, 16)}, "gate_up: expected 2I=16, got 14"),
    "experts": ({"down": torch.zeros(5, 16, 8)}, "down: expected E=4, got 5"),
    "fp8 experts": ({"down": FP8.down.expert(0)}, "down: expected E=4, got 1"),
    "fp8 hidden": ({"gate_up": FP8.down}, "gate_up: expected H=16, got 8"),
    "e5m2": ({"gate_up": E5M2}, "gate_up: expected a stack of FP8 e4m3 matrices, got e5m2"),
    "order": ({"order": torch.zeros(12).int()}, "order: expected int64, got int32"),
    "offsets": ({"offsets": torch.zeros(6).long()}, r"gate_up: expected E=5, got 4"),
    "wild order": ({"order": ARGS.order.flip(0)}, "order: expected each slot of expert 0 once, got slot"),
    "mask": ({"mask": torch.ones(5).bool()}, "mask: expected T=6, got 5"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[grouped_mlp\] " + message):
        kernels.grouped_mlp(*ARGS._replace(**change), kernels.expert_sums(4, 16))


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[grouped_mlp\] activation: expected one of silu, gelu, .*, got relu"):
        kernels.grouped_mlp(*ARGS, None, activation="relu")
    with pytest.raises(ValueError, match=r"\[grouped_mlp\] norm_sum: expected E=4, got 3"):
        kernels.grouped_mlp(*ARGS, kernels.expert_sums(3))
    with pytest.raises(ValueError, match=r"\[grouped_mlp\] residual: expected float32, got float16"):
        kernels.grouped_mlp(*ARGS, None, residual=torch.zeros(6, 16).half())
    with pytest.raises(NotImplementedError, match=r"\[grouped_mlp\] backend: expected one of .*, got native"):
        kernels.grouped_mlp(*ARGS, None, backend="native")


def test_the_default_is_the_grouped_product_of_torch() -> None:
    for device in ("cpu", "cuda"):
        assert kernels.backend_for("grouped_mlp", device) == "grouped_mm"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_fastest_backend_is_looked_up_by_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    args, (want, _) = moved(ARGS, "cuda"), run(ARGS, "cuda", "triton")
    monkeypatch.setitem(FASTEST, torch.cuda.get_device_capability(), "triton")
    assert torch.equal(kernels.grouped_mlp(*args, kernels.expert_sums(4, device="cuda")).cpu(), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fp8", [None, (128, 128)], ids=str)
def test_a_call_is_captured_in_a_cuda_graph(fp8: tuple[int, int] | None) -> None:
    """Captured on one routing, replayed on another, with tiles of full size and several of them for one expert."""
    case = Case(600, 4, 2, 256, favourite=True)
    first, second = (moved(mlp(case, 128, torch.bfloat16, fp8, seed=seed), "cuda") for seed in (0, 9))
    second = second._replace(gate_up=first.gate_up, down=first.down)
    sums = kernels.expert_sums(case.E, case.H, "cuda")
    kernels.grouped_mlp(*first, sums, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.grouped_mlp(*first, sums, backend="triton")
    for value, new in zip(first, second, strict=True):
        if isinstance(value, Tensor) and isinstance(new, Tensor):
            value.copy_(new)
    for sum in sums:
        sum.zero_()
    graph.replay()
    want, want_sums = run(moved(second, "cpu"), "cuda", "triton", case.H)
    assert torch.equal(out.cpu(), want)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(sums, want_sums, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fp8", [None, (128, 128)], ids=str)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_tiles_of_full_size(dtype: torch.dtype, fp8: tuple[int, int] | None) -> None:
    args = mlp(Case(1500, 5, 2, 640, masked=True, favourite=True), 320, dtype, fp8)
    out, _ = run(args, "cuda", "triton")
    assert_close(out, args, expected(args))

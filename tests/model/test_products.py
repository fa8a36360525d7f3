"""Products of rows grouped by expert: the definition, and the same bits for all numbers of threads and neighbours."""

import pytest
import torch
from torch import Tensor

from moekern.model import products
from moekern.model.products import filled, gathered, grouped_linear, pieces
from tests.helpers.threads import using_threads

COUNTS = (5, 0, 37, 16, 1, 70)
LIBRARIES = (None, products.ONEDNN) if hasattr(torch.ops.mkldnn, "_linear_pointwise") else (None,)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr(products, "library_of", lambda dtype: request.param)
    return request.param  # type: ignore[no-any-return]


def made(dtype: torch.dtype, C: int = 48, R: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, tokens, ends, weight [E, R, C], bias."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (sum(COUNTS),), generator=random)
    ends = torch.tensor(COUNTS).cumsum(0).to(torch.int32)
    weight = torch.randn(len(COUNTS), R, C, generator=random).to(dtype)
    bias = torch.randn(len(COUNTS), R, generator=random).to(dtype)
    return torch.randn(50, C, generator=random).to(dtype), tokens, ends, weight, bias


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_each_row_with_its_experts_weight(
    library: str | None, dtype: torch.dtype, transposed: bool
) -> None:
    hidden, tokens, ends, weight, bias = made(dtype)
    held = weight.mT.contiguous() if transposed else weight
    got = grouped_linear(gathered(hidden, tokens), held, ends, bias, transposed)[: len(tokens)]
    expert = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    want = torch.einsum("nc,nrc->nr", hidden[tokens].double(), weight[expert].double()) + bias[expert].double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=2 * eps * float(want.abs().max()))


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_no_whole_16_bytes_have_products_and_gradients(transposed: bool) -> None:
    hidden, tokens, ends, weight, bias = made(torch.float64, C=9, R=5)
    held = (weight.mT.contiguous() if transposed else weight).requires_grad_()
    rows = hidden[tokens].requires_grad_()
    expert = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    want = torch.einsum("nc,nrc->nr", rows, (held.mT if transposed else held)[expert]) + bias[expert]
    got = grouped_linear(rows, held, ends, bias, transposed)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(each.square().sum(), (rows, held)) for each in (got, want)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_alone_has_the_bits_that_it_has_among_others_for_any_threads(
    library: str | None, dtype: torch.dtype
) -> None:
    hidden, tokens, ends, weight, _ = made(dtype, C=40)  # rows begin in the middle of a line of memory
    whole = grouped_linear(gathered(hidden, tokens), weight, ends)
    for threads in (1, 2, 4):
        with using_threads(threads):
            again = grouped_linear(gathered(hidden, tokens), weight, ends)
            assert torch.equal(again[: len(tokens)], whole[: len(tokens)])
            start = 0
            for e, count in enumerate(COUNTS):
                own = gathered(hidden, tokens[start : start + count])
                alone = grouped_linear(own, weight[e : e + 1].clone(), torch.tensor([count], dtype=torch.int32))
                assert torch.equal(alone[:count], whole[start : start + count])
                start += count


def test_values_of_other_rows_do_not_reach_a_row(library: str | None) -> None:
    hidden, tokens, ends, weight, _ = made(torch.float32)
    rows = gathered(hidden, tokens)
    want = grouped_linear(rows, weight, ends)[: COUNTS[0]].clone()
    rows[COUNTS[0] :] = torch.nan
    assert torch.equal(grouped_linear(rows, weight, ends)[: COUNTS[0]], want)


def test_gathered_rows_have_room_for_the_last_product() -> None:
    hidden = torch.randn(3, 4)
    for count in (0, 1, 16, 17, products.SHARES - 1, products.SHARES):
        rows = gathered(hidden, torch.zeros(count, dtype=torch.int64), torch.full((count,), 2.0))
        assert len(rows) >= count + filled(1) - 1
        assert len(rows) % products.SHARES == 0
        assert torch.equal(rows[:count], 2 * hidden[:1].expand(count, -1))
        assert not rows[count:].any()


@pytest.mark.parametrize(
    ("bounds", "most", "want"),
    [
        ([0, 0, 0], 5, [(0, 0)]),
        ([0, 3, 3, 5, 12, 13], 5, [(0, 5), (5, 12), (12, 13)]),
        ([0, 10, 20], 5, [(0, 10), (10, 20)]),
        ([0, 0, 4, 4], 4, [(0, 4)]),
        ([0, 4], 0, [(0, 4)]),
    ],
)
def test_pieces_are_whole_experts(bounds: list[int], most: int, want: list[tuple[int, int]]) -> None:
    assert [(piece.start, piece.stop) for piece in pieces(bounds, most)] == want

"""vocabulary, popcount and pair_popcount against sets of Python."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekern import _C, kernels
from moekern.kernels import native
from tests.helpers.ops import runs
from tests.helpers.vocabulary import assert_bits_are_sets, batch

BACKENDS = ("native", "reference")


@pytest.mark.parametrize(("device", "backend"), [*runs("vocabulary"), ("cpu", "reference")])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 2, 9), (50, 1, 1, 1), (300, 7, 3, 200), (90, 513, 6, 64), (40, 3, 2, 65)])
@pytest.mark.parametrize("masked", [False, True])
def test_bits_are_the_sets_of_ids(shape: Any, ids: torch.dtype, masked: bool, device: str, backend: str) -> None:
    assert_bits_are_sets(shape, ids, masked, device, backend)


@given(cut=st.integers(0, 30), E=st.integers(1, 6), K=st.integers(1, 4), V=st.integers(1, 200), seed=st.integers(0, 99))
def test_batches_unite_by_or(cut: int, E: int, K: int, V: int, seed: int) -> None:
    args = batch(30, E, K, V, seed)
    whole, inplace = kernels.vocabulary_bits(E, V), kernels.vocabulary_bits(E, V)
    kernels.vocabulary(*args, None, whole)
    parts = []
    for half in (slice(0, cut), slice(cut, 30)):
        parts.append(kernels.vocabulary_bits(E, V))
        kernels.vocabulary(args[0][half], args[1][half], None, parts[-1])
        kernels.vocabulary(args[0][half], args[1][half], None, inplace)
    assert torch.equal(parts[0] | parts[1], whole)
    assert torch.equal(inplace, whole)


@pytest.mark.usefixtures("threads")
def test_threads_and_instruction_sets_change_nothing() -> None:
    args = batch(2000, 40, 6, 5000)
    first = None
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        bits = kernels.vocabulary_bits(40, 5000)
        native.vocabulary(*args, None, bits)
        for level in _C.levels():
            got = bits, native.popcount(bits, level=level), native.pair_popcount(bits, level=level)
            first = first or got
            assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@given(bad=st.integers(-(2**63), -1) | st.integers(128, 2**63 - 1))
def test_wild_ids_are_refused_before_a_bit_is_set(backend: str, bad: int) -> None:
    bits = kernels.vocabulary_bits(2, 100)
    args = torch.tensor([3, bad]), torch.tensor([[0], [1]])
    message = rf"^\[vocabulary\] token_ids: expected ids from 0 to 127, got {bad} for token 1$"
    with pytest.raises(ValueError, match=message):
        kernels.vocabulary(*args, None, bits, backend=backend)
    assert not bits.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_have_any_id(backend: str) -> None:
    bits, mask = kernels.vocabulary_bits(2, 100), torch.tensor([False, True])
    kernels.vocabulary(torch.tensor([-100, 5]), torch.tensor([[0], [1]]), mask, bits, backend=backend)
    assert bits.tolist() == [[0, 0], [32, 0]]


IDS, IDX = batch(6, 4, 2, 100)
BAD = {
    "ids-dtype": ({"token_ids": IDS.float()}, "token_ids: expected int64 or int32, got float32"),
    "ids-length": ({"token_ids": IDS[:5]}, "topk_idx: expected T=5, got 6"),
    "bits-dtype": ({"bits": torch.zeros(4, 2).int()}, "bits: expected int64, got int32"),
    "bits-strides": ({"bits": torch.zeros(2, 4).long().T}, "bits: expected a contiguous tensor"),
    "mask": ({"mask": torch.ones(5).bool()}, "mask: expected T=6, got 5"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_vocabulary_names_the_wrong_argument(change: dict[str, Any], message: str) -> None:
    args = {"token_ids": IDS, "topk_idx": IDX, "mask": None, "bits": torch.zeros(4, 2).long(), **change}
    with pytest.raises(ValueError, match=r"^\[vocabulary\] " + message):
        kernels.vocabulary(**args)
    with pytest.raises(ValueError, match=r"^\[vocabulary\] " + message.split(", got")[0].split(" or ")[0]):
        native.vocabulary(**args)
    with pytest.raises(ValueError, match=r"^\[pair_popcount\] bits: expected int64"):
        kernels.pair_popcount(torch.zeros(2, 2))

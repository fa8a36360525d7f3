"""What continuations tell: cycles, shares, and intervals that few prompts do not make narrow."""

from __future__ import annotations

import math
import random

import pytest

from moekern.judging.decoding import decoding_of
from moekern.judging.figures import MEASURES, ORIGINAL, Continuation, cycle_of, doubts, figure, shift, wilson

BY_NAME = {measure.name: measure for measure in MEASURES}


def rows(yes: int, no: int) -> list[Continuation]:
    """So many that end, and that do not."""
    return [Continuation((1, 2), True)] * yes + [Continuation((1, 2), False)] * no


@pytest.mark.parametrize(
    ("ids", "period"),
    [
        ((7,) * 64, 1),
        ((7,) * 63, None),  # three of a kind are no loop
        ((9, 9, 4) * 30, 3),
        (tuple(range(100)), None),
        (tuple(range(21)) * 4, 21),
        (tuple(range(32)) * 3, 32),
        (tuple(range(32)) * 2, None),  # twice
        (tuple(range(33)) * 4, None),  # too long a cycle
        ((5, 6) * 40 + (1,), None),  # it came out of it
        (tuple(range(50)) + (3, 8) * 32, 2),
    ],
)
def test_a_cycle_is_what_the_last_tokens_repeat(ids: tuple[int, ...], period: int | None) -> None:
    assert cycle_of(ids) == period
    assert Continuation(ids, False).looped == (period is not None)


def test_different_grams() -> None:
    assert Continuation((1, 2, 3), True).distinct is None
    assert Continuation((1, 2, 3, 4, 5), True).distinct == 1
    assert Continuation((1,) * 8, True).distinct == pytest.approx(1 / 5)


def test_shares_have_wilsons_interval() -> None:
    assert wilson(0.0, 50) == pytest.approx((0.0, 0.0713), abs=1e-4)  # of published tables: 0 and 25 of 50
    assert wilson(0.5, 50) == pytest.approx((0.3664, 0.6336), abs=1e-4)
    found = figure(BY_NAME["ended"], rows(1, 3))
    assert found is not None
    assert (found.value, found.prompts) == (0.25, 4)
    assert found.error == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert figure(BY_NAME["end_probability"], rows(1, 3)) is None


def test_few_prompts_that_are_all_alike_prove_nothing() -> None:
    same = shift(BY_NAME["ended"], rows(5, 0), rows(5, 0))
    assert same is not None
    assert same.low < -0.2 < 0.2 < same.high
    few, many = (shift(BY_NAME["ended"], rows(0, n), rows(n // 10, n - n // 10)) for n in (20, 2000))
    assert few is not None
    assert many is not None
    assert few.mean == many.mean == -0.1
    assert (few.clear, many.clear) == (False, True)
    assert few.needed is not None
    assert 20 < few.needed < 100


def test_the_interval_of_two_shares_covers_what_is_true() -> None:
    """Of pairs whose shares differ by 10 %, about 95 % of the intervals do, and no fewer than 92 %."""
    rng, inside, tries = random.Random(0), 0, 600
    for _ in range(tries):
        drawn = [rng.random() for _ in range(60)]
        mine = [Continuation((), d < 0.15) for d in drawn]
        theirs = [Continuation((), 0.1 < d < 0.15) for d in drawn]
        found = shift(BY_NAME["ended"], mine, theirs)
        assert found is not None
        inside += found.low <= 0.1 <= found.high
    assert inside > 0.92 * tries


def test_lengths_are_paired_by_prompt() -> None:
    lengths = [10, 30, 50, 90]
    original = [Continuation((1,) * n, False) for n in lengths]
    longer = [Continuation((1,) * (n + 5), False) for n in lengths]
    found = shift(BY_NAME["length"], longer, original)
    assert found is not None
    assert (found.mean, found.low, found.high) == (5, 5, 5)
    one = shift(BY_NAME["length"], longer[:1], original[:1])
    assert one is not None
    assert not one.clear


def test_what_is_not_told_apart_is_said_with_a_number_of_prompts() -> None:
    other = rows(12, 188)[::-1]  # other prompts than those of which the original ends
    (line,) = doubts({ORIGINAL: rows(20, 180), "half": other, "same": rows(20, 180), "bad": rows(0, 200)})
    assert line.startswith("half: 200 prompts do not tell the share that ends (-4.0%")
    assert "prompts" in line
    assert "would, if it stays so" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gready", "gready is neither a name .*did you mean greedy"),
        ("min_p=2", "min_p: expected a number from 0 to 1, got '2'"),
        ("top_k=1.5", "top_k: expected"),
        ("repetition=nan", "repetition: expected"),
        ("", "nothing is neither"),
    ],
)
def test_ways_to_decode_are_checked(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--decode {text}: {message}"):
        decoding_of(text)


def test_ways_to_decode() -> None:
    assert decoding_of("greedy").greedy
    assert not decoding_of("top_p=0.9").greedy
    guarded = decoding_of("guarded,temperature=0.6")
    assert (guarded.temperature, guarded.min_p, guarded.repetition) == (0.6, 0.05, 1.1)

"""What is held back from calibration: nothing is lost or used twice, and the recipe says it."""

from __future__ import annotations

import pytest
import torch

from moekern.data.batches import Batch, TokenData
from moekern.errors import InputError
from moekern.evaluation.held_out import MOST, apart, held_back


def text(rows: int, length: int, batch: int = 4, domain: str = "a") -> tuple[Batch, ...]:
    ids = torch.arange(rows * length).reshape(rows, length)
    return tuple(Batch(domain, part) for part in ids.split(batch))


def rows_of(data: TokenData, domain: str = "a") -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in data.batches if batch.domain == domain for row in batch.input_ids]


@pytest.mark.parametrize(("rows", "length", "held"), [(3, 5, 0), (4, 5, 1), (19, 5, 1), (40, 5, 4), (200, 2048, 4)])
def test_a_tenth_is_held_back(rows: int, length: int, held: int) -> None:
    whole = TokenData(text(rows, length), {"seed": 0}, chunk=2)
    kept, missing = held_back(whole)
    assert len(rows_of(missing)) == held
    assert sorted(rows_of(kept) + rows_of(missing)) == sorted(rows_of(whole))
    assert [row for row in rows_of(whole) if row not in rows_of(missing)] == rows_of(kept)
    assert sum(missing.tokens.values()) <= MOST
    assert kept.recipe == ({"seed": 0, "held_out": missing.tokens} if held else {"seed": 0})
    assert kept.chunk == 2


def test_domains_are_held_back_apart() -> None:
    whole = TokenData((*text(20, 3), *text(2, 7, domain="b")), {})
    kept, missing = held_back(whole)
    assert missing.tokens == {"a": 6}
    assert kept.tokens == {"a": 54, "b": 14}


def test_one_long_row_is_still_one() -> None:
    _, missing = held_back(TokenData(text(10, MOST + 1, batch=1), {}))
    assert len(rows_of(missing)) == 1


def test_sequences_that_are_judged_are_left_out() -> None:
    seen, judged = TokenData(text(8, 5), {"seed": 0}, chunk=2), TokenData(text(2, 5, domain="b"), {})
    both = TokenData((*seen.batches, *text(3, 7, domain="c")), {"held_out": {"a": 4}}, chunk=2)
    rest, left = apart(both, judged)  # text of another domain, with the same ids
    assert left == 2
    assert rows_of(rest) == rows_of(seen)[2:]
    assert rest.tokens == {"a": 30, "c": 21}
    assert rest.recipe == {"held_out": {"a": 14, "c": 0}}
    assert apart(rest, judged)[0] is rest
    with pytest.raises(InputError, match="all of its sequences are judged too"):
        apart(judged, seen)

"""Sums that no order changes."""

from __future__ import annotations

import json
import random

import pytest
import torch

from moekern.evaluation.tally import Tally

KEY = (0, 1, "d", "x")


def test_no_order_and_no_division_changes_a_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, generator=generator).double() * 10.0**n for n in range(-9, 9)]
    plain, shuffled = Tally(), [Tally(), Tally()]
    for value in values:
        plain.add(KEY, value)
    for n, value in enumerate(random.Random(1).sample(values, len(values))):
        shuffled[n % 2].add((5, *KEY[1:]) if n % 3 else KEY, value)  # two passes, two processes
    (one,), (other,) = list(plain.totals()), list(Tally.of_all(shuffled).totals())
    assert one[:3] == other[:3] == KEY[1:]
    assert torch.equal(one[3], other[3])
    torch.testing.assert_close(one[3], torch.stack(values).sum(0), rtol=1e-14, atol=0)


def test_a_stopped_pass_is_forgotten_and_others_are_read_again() -> None:
    tally = Tally()
    tally.add(KEY, torch.tensor([1.5]))
    tally.add((2, *KEY[1:]), torch.tensor([2.25]))
    again = Tally.read(json.loads(json.dumps(tally.document())))
    assert again.sums == tally.sums
    again.forget(2)
    assert [float(sums) for *_, sums in again.totals()] == [1.5]
    with pytest.raises(ValueError, match="unpack"):
        Tally.read([[1, 2]])

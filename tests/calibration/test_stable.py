"""Text in growing parts: which they are, when they end, and that they add up to what one pass measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekern.calibration.calibrate import calibrate
from moekern.calibration.stable import LEAST, PARTS, Stable, parts_of, until_stable
from moekern.checkpoint.folder import open_checkpoint
from moekern.data.batches import Batch, TokenData
from moekern.data.text import Text
from moekern.demo import MODEL, TEXT
from moekern.errors import InputError
from moekern.plan.agreement import ALL, agreement, mean_of
from moekern.statistics.file import Statistics, merge
from tests.helpers.measured import header, layer_statistics, with_halves


def _text(counts: dict[str, int]) -> TokenData:
    """Chunks of two sequences; each sequence's tokens are its number in its domain."""
    batches = tuple(
        Batch(domain, torch.arange(2 * n)[:, None].expand(-1, 3).contiguous()) for domain, n in counts.items()
    )
    return TokenData(batches, {"chunk": 2}, chunk=2)


@given(st.dictionaries(st.sampled_from("abc"), st.integers(1, 90), min_size=1))
def test_parts_are_the_whole_text_each_as_large_as_all_before(counts: dict[str, int]) -> None:
    parts = list(parts_of(_text(counts)))
    for domain, n in counts.items():
        taken = [p.recipe["part"][domain] for p in parts if domain in p.recipe["part"]]
        assert [a for a, _ in taken] == [0, *(b for _, b in taken[:-1])]
        assert taken[-1][1] == n
        assert taken[0][1] == min(n, max(LEAST, -(-n // PARTS)))
        assert all(b == min(n, 2 * a) for a, b in taken[1:])
        rows = [int(row[0]) for p in parts for b in p.batches if b.domain == domain for row in b.input_ids]
        assert rows == list(range(2 * n))
    assert len(parts) <= 5
    assert all(p.recipe["chunk"] == p.chunk == 2 for p in parts)


def _measured(part: TokenData, number: int, alike_from: int) -> Statistics:
    """Halves that rank experts the other way round; from a part on, so much of the same that nothing else decides."""
    even, odd = layer_statistics(number), layer_statistics(50 + number)
    rising = torch.arange(1.0, 1 + len(even.count))
    even.gated_norm_sum.copy_(1e6 * rising if number >= alike_from else rising)
    odd.gated_norm_sum.copy_(1e6 * rising if number >= alike_from else rising.flip(0))
    run = {"data": part.recipe, "tokens": part.tokens}
    return Statistics(header(["a"], **run), {"0": {"a": with_halves(even, odd)}})


@pytest.mark.parametrize("alike_from", [0, 2, 9])
def test_it_stops_where_the_halves_agree_or_the_text_ends(alike_from: int) -> None:
    told: list[str] = []
    data = _text({"a": 64})
    found = until_stable(data, Stable(1.0, "gated_norm", (3,)), lambda p, n: _measured(p, n, alike_from), told.append)
    chunks = {0: 4, 2: 16}.get(alike_from, 64)
    run = found.header["runs"]
    assert len(run) == 1
    assert run[0]["chunks"] == {"a": chunks}
    assert run[0]["data"] == {"chunk": 2, "until_stable": {"threshold": 1.0, "criterion": "gated_norm", "keep": [3]}}
    assert found.header["tokens"] == {"a": 6 * chunks}
    assert told[-1].startswith(f"{6 * chunks} of 384 tokens: ")
    assert told[-1].endswith("there is no more" if alike_from == 9 else "that is enough")
    assert all(line.endswith("more is measured") for line in told[:-1])
    assert int(found.layer("0").tokens) == 80 * len(told)


def test_the_least_of_several_counts_decides() -> None:
    statistics = Statistics(
        header(["a"]), {str(i): {"a": with_halves(layer_statistics(i), layer_statistics(90 + i))} for i in range(4)}
    )
    each = [mean_of(agreement(statistics, "reap", n)[ALL]).kept for n in (2, 3, 4)]
    assert Stable(0.9, "reap", (2, 3, 4)).agreed(statistics) == min(each)  # type: ignore[type-var]


def test_parts_add_up_to_one_pass(tmp_path: Path) -> None:
    text = Text((f"c={TEXT / 'c' / 'calibration.txt'}", f"de={TEXT / 'german' / 'calibration.txt'}"), 1500, 64, chunk=2)
    data, tiers = text.read(open_checkpoint(MODEL)), ("vocabulary", "coalitions", "weights")
    whole = calibrate(MODEL, data, tiers=tiers)
    paths: list[Path] = []

    def measure(part: TokenData, number: int) -> Statistics:
        paths.append(tmp_path / str(number))
        return calibrate(MODEL, part, tiers=tiers, out=paths[-1])

    found = until_stable(data, Stable(1.0, "usage", (2,)), measure)
    found.save(tmp_path / "s")
    back = Statistics.load(tmp_path / "s")
    assert len(paths) > 1
    used = back.header["runs"][0]["chunks"]
    assert used == {domain: sum(b.domain == domain for b in data.by_chunk().batches) for domain in data.tokens}
    for key in whole.layers:
        a, b = whole.layer(key), back.layer(key)
        for name in ("tokens", "count", "coactivation", "vocabulary", "coalitions", "weight_gram", "max_abs"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        torch.testing.assert_close(a.pair_sum, b.pair_sum, rtol=1e-9, atol=0)
    with pytest.raises(InputError, match="measured the same text"):
        merge([back, whole])


def test_what_cannot_be_is_refused_before_anything_is_measured() -> None:
    for threshold in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(InputError, match="--until-stable .*: expected a share"):
            Stable(threshold, "reap", (4,))
    for name in ("hope", "ecc", "random", "ewn", "worst_domain(reap)"):
        with pytest.raises(InputError, match="is not known of halves of the text"):
            Stable(0.9, name, (4,))
    for name in ("reap", "easy_ep", "rank(reap*2, usage)", "hts(1,1,1)", "inverse(gated_norm)", "rank(usage, ewn)"):
        Stable(0.9, name, (4,))

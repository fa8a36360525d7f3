"""What a recorder adds up does not depend on how many processes have seen the text."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moekern.data.batches import SEGMENTS, segment_of
from moekern.measurement.batch import BatchContext, Seen, route
from moekern.measurement.recorder import OutlierRecorder, Recorder
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import assert_same, with_halves

E, K, H, T = 5, 2, 4, 6
TIERS = ("dimensions", "coalitions", "reap", "vocabulary", "token_counts", "mixture", "gram")


@dataclass(frozen=True)
class Chunk:
    """One chunk of text in one layer; `empty`: its first token's last slot is no expert's."""

    domain: str
    segment: int
    seed: int
    empty: bool = False

    def measure(self, recorder: Recorder) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        ids = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(T)])
        ids[0, -1] = E if self.empty else ids[0, -1]
        routed = route(ids, E, empty_slots=True)
        values = torch.randn(len(routed.order), H, generator=draw) ** 3
        logits, gates = torch.randn(T, E, generator=draw), torch.rand(T, K, generator=draw)

        def outputs(tokens: Tensor, offsets: Tensor) -> Tensor:
            return torch.ones(len(tokens), H)

        words = torch.randint(0, 64, (T,), generator=draw)
        seen = Seen(logits, ids, gates, routed, values, outputs)
        recorder.measure("0", seen, BatchContext(self.domain, (1, T), token_ids=words, segment=self.segment))


def _text(counts: dict[str, int]) -> list[Chunk]:
    return [
        Chunk(domain, segment_of(c, n), 100 * n + c, empty=c % 3 == 0) for domain, n in counts.items() for c in range(n)
    ]


def _recorder(apart: bool = False) -> Recorder:
    return Recorder("softmax", TIERS, words=1, apart=apart)


def _alone(text: list[Chunk]) -> dict[str, LayerStatistics]:
    recorder = _recorder()
    for chunk in text:
        chunk.measure(recorder)
    return recorder.take("0", K)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, SEGMENTS + 9), st.integers(0, 5), st.integers(1, 4), st.randoms(use_true_random=False))
def test_any_number_of_processes_gives_the_same_bytes(a: int, b: int, ranks: int, draw: object) -> None:
    text = _text({"a": a, "b": b} if b else {"a": a})
    owner = {key: draw.randrange(ranks) for key in {(c.domain, c.segment): None for c in text}}  # type: ignore[attr-defined]
    parts = []
    for rank in range(ranks):
        recorder = _recorder(apart=True)
        for chunk in text:
            if owner[chunk.domain, chunk.segment] == rank:
                chunk.measure(recorder)
        parts.append(recorder.leave("0"))
        assert recorder.layers == []
    whole = _recorder()
    whole.join("0", parts)
    joined, alone = whole.take("0", K), _alone(text)
    assert set(joined) == set(alone)
    for domain, sums in alone.items():
        assert int(sums.tokens) == T * {"a": a, "b": b}[domain]
        assert_same(joined[domain], sums)


def test_the_order_of_adding_is_that_of_segments() -> None:
    """Sums of three segments in float64: the first and the third are added first."""
    text = _text({"a": 3})
    singles = [_alone([Chunk("a", 0, chunk.seed, chunk.empty)])["a"] for chunk in text]
    assert_same(_alone(text)["a"], with_halves(singles[0] + singles[2], singles[1]))


def test_no_more_than_three_copies_of_a_domain_are_held() -> None:
    recorder = _recorder()
    for chunk in _text({"a": 9, "b": 4}):
        chunk.measure(recorder)
        assert len(recorder.segments["0"]) == 1
        assert set(recorder.folds["0"]) <= {chunk.domain}
        assert set(recorder.sums["0"]) == {"a", chunk.domain} - {chunk.domain}


def test_a_domain_that_comes_back_is_an_error() -> None:
    recorder = _recorder()
    for chunk in (Chunk("a", 0, 1), Chunk("b", 0, 2), Chunk("a", 1, 3)):
        chunk.measure(recorder)
    with pytest.raises(RuntimeError, match="layer 0: text of domain a came after that of another one"):
        recorder.take("0", K)


def test_outliers_fold_as_everything_else_does() -> None:
    text = _text({"a": 4, "b": 1})
    first, parts = _alone(text), []
    for half in (0, 1):
        second = OutlierRecorder("softmax", ("outliers",), apart=True, first={"0": first})
        for chunk in text:
            if chunk.segment % 2 == half:
                chunk.measure(second)
        parts.append(second.leave("0"))
    joined = OutlierRecorder("softmax", ("outliers",), first={"0": dict(first)})
    joined.join("0", parts)
    alone = OutlierRecorder("softmax", ("outliers",), first={"0": dict(first)})
    for chunk in text:
        chunk.measure(alone)
    found, again = joined.take("0", K), alone.take("0", K)
    for domain in first:
        assert torch.equal(found[domain].outlier_sum, again[domain].outlier_sum)
        assert torch.equal(found[domain].norm_sum, first[domain].norm_sum)
    assert int(found["a"].outlier_sum.sum()) > 0

"""Pairs of experts of a layer: the matrices, and what tells whose outputs are alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from moekern.report.together import LIKE, MATRICES, PAIRS, likeness, room, together
from moekern.statistics.layer import LayerStatistics
from tests.helpers.measured import E, layer_statistics, with_tiers


def test_outputs_are_alike_by_the_best_that_was_measured() -> None:
    sums = with_tiers(layer_statistics(1))
    way, alike = likeness(sums)
    assert way == "replay"
    assert alike is not None
    assert alike[0, 1] == sums.output_cosine[0, 1] / sums.replay_tokens
    assert alike[2, 2].isnan()
    plain = layer_statistics(1, idle=(3,))
    way, alike = likeness(plain)
    assert way == "dimensions"
    assert alike is not None
    means = plain.value_sum / plain.count.clamp(min=1)[:, None]
    assert float(alike[0, 1]) == pytest.approx(float(cosine_similarity(means[0], means[1], dim=0)))
    assert alike[3].isnan().all()  # it has no output
    bare = LayerStatistics.zeros(4)
    assert likeness(replace(bare, logit_gram=torch.eye(4, dtype=torch.float64)))[0] == "routed"
    assert likeness(replace(bare, logit_gram=torch.zeros(0, 0, dtype=torch.float64))) == ("", None)


def test_matrices_are_of_the_most_used_experts_within_their_room() -> None:
    assert room(4, 16) == 16
    n = room(61, 384)
    assert 61 * n * (n - 1) // 2 <= MATRICES < 61 * (n + 1) * n // 2
    sums = layer_statistics(2)
    found = together(sums, 3)
    busy = sorted(range(E), key=lambda e: (-int(sums.count[e]), e))[:3]
    assert found["experts"] == sorted(busy)
    assert found["like"] == LIKE["dimensions"]
    i, j = found["experts"][:2]
    both = int(sums.coactivation[i, j]) * int(sums.tokens) / int(sums.count[i] * sums.count[j])
    assert found["lift"][0][1] == pytest.approx(both, abs=1e-4)
    assert found["lift"][0][0] is None
    alike = likeness(sums)[1]
    assert alike is not None
    order = sorted((-float(alike[i, j]), i, j) for i in range(E) for j in range(i + 1, E))[:PAIRS]
    assert [pair["experts"] for pair in found["nearest"]] == [[i, j] for _, i, j in order]
    assert found["nearest"][0]["cosine"] == -order[0][0]

"""Idle and thin experts, by domain and in all."""

from __future__ import annotations

from dataclasses import replace

import torch

from moekern.statistics.coverage import THIN, Coverage, coverage, too_thin
from moekern.statistics.file import Statistics
from moekern.statistics.layer import LayerStatistics


def statistics(counts: dict[str, list[list[int]]]) -> Statistics:
    """domain -> layer -> tokens of each expert."""
    layers = {
        str(i): {
            domain: replace(LayerStatistics.zeros(len(rows[i])), count=torch.tensor(rows[i]))
            for domain, rows in counts.items()
        }
        for i in range(len(next(iter(counts.values()))))
    }
    tokens = {domain: sum(rows[0]) for domain, rows in counts.items()}
    return Statistics({"tokens": tokens, "domains": list(counts)}, layers)


def test_counts_of_domains_and_of_all() -> None:
    found = coverage(statistics({"a": [[0, THIN, 200], [THIN - 1, 5, 5]], "b": [[0, 1, 1], [1, 0, THIN]]}))
    assert found["a"] == Coverage(200 + THIN, 6, 1, 4)
    assert found["b"] == Coverage(2, 6, 2, 5)
    assert found["all"] == Coverage(202 + THIN, 6, 1, 2)


def test_a_domain_may_be_named_as_the_whole_is() -> None:
    found = coverage(statistics({"all": [[0, 1]], "b": [[1, THIN]]}))
    assert found["all"] == Coverage(2 + THIN, 2, 0, 1)


def test_a_warning_where_too_many_are_thin() -> None:
    assert too_thin({"all": Coverage(1, 100, 5, 5)}) is None
    said = too_thin({"all": Coverage(1, 100, 0, 6)})
    assert said is not None
    assert "6 of 100 experts (6%)" in said

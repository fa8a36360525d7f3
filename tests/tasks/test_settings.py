"""Which tasks are asked, and the table of their scores."""

from __future__ import annotations

import pytest

from moekern.errors import InputError
from moekern.tasks.settings import Score, rows, shots_of


def test_the_table_has_a_row_a_metric_and_a_column_a_model() -> None:
    def score(model: str, task: str, shots: int, value: float, stderr: float | None = 0.1) -> Score:
        return Score(model, task, shots, "acc", "none", value, stderr, 9, True)

    some = [score("original", "a", 0, 0.5), score("original", "b", 0, 1, None), score("original", "a", 2, 0.75)]
    columns, table = rows([*some, score("half", "a", 0, 0.25)])
    assert columns == ("task", "shots", "metric", "original", "half")
    assert table == [
        ("a", "0", "acc", "0.5000 ± 0.1000", "0.2500 ± 0.1000"),
        ("a", "2", "acc", "0.7500 ± 0.1000", ""),
        ("b", "0", "acc", "1.0000", ""),
    ]


def test_numbers_of_examples() -> None:
    assert shots_of("0, 1,5,1") == (0, 1, 5)
    for text in ("", "one", "0,x", "-1", "1.5"):
        with pytest.raises(InputError, match="--shots .*: expected numbers"):
            shots_of(text)

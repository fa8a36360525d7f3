"""A choice of a matrix leaves out no pair."""

from itertools import combinations, product
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.cases import EDGE, Case
from tests.helpers.pairwise import matrix, pairwise


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_every_pair_of_values_meets(sizes: list[int]) -> None:
    rows = [dict(zip("abcde", values, strict=False)) for values in product(*map(range, sizes))]
    taken = [rows[n] for n in pairwise(rows)]
    for a, b in combinations("abcde"[: len(sizes)], 2):
        assert {(row[a], row[b]) for row in taken} == {(row[a], row[b]) for row in rows}
    for a in "abcde"[: len(sizes)]:
        assert {row[a] for row in taken} == {row[a] for row in rows}


def test_what_never_meets_is_not_asked_for() -> None:
    rows = [{"a": a, "b": b, "c": c} for a, b, c in product(range(4), repeat=3) if a <= b]
    taken = [rows[n] for n in pairwise(rows)]
    assert all({(r[x], r[y]) for r in taken} == {(r[x], r[y]) for r in rows} for x, y in ("ab", "ac", "bc"))


def test_what_is_alone_only_has_to_be_there() -> None:
    rows = [{"a": a, "b": b} for a, b in product(range(6), range(3))]
    assert len(pairwise(rows)) == 18
    taken = pairwise(rows, alone=["a"])
    assert len(taken) == 6
    assert {rows[n]["a"] for n in taken} == set(range(6))
    assert {rows[n]["b"] for n in taken} == set(range(3))
    assert taken == pairwise(rows, alone=["a"])


def test_it_is_a_choice() -> None:
    rows = [dict(zip("abcd", values, strict=True)) for values in product(range(4), repeat=4)]
    assert len(pairwise(rows)) <= 32  # of 256; 16 would be the least


def test_a_matrix_keeps_each_case_and_each_property_with_each_value() -> None:
    runs = [("cpu", "native"), ("cpu", "triton")]
    mark = matrix(runs, case=EDGE, score=["softmax", "sigmoid", "identity"]).mark
    assert mark.args[0] == ["device", "backend", "case", "score"]

    def rows(backend: str, kept: bool) -> list[tuple[Case, Any]]:
        return [p.values[2:] for p in mark.args[1] if p.values[1] == backend and (not p.marks) >= kept]

    whole, kept = rows("native", True), rows("triton", True)
    assert len(whole) == len(rows("triton", False)) == 30
    assert 10 <= len(kept) < 15
    assert {case for case, _ in kept} == set(EDGE.values())
    for name in ("masked", "empty", "favourite", "ids"):
        met = [{(getattr(case, name), score) for case, score in some} for some in (whole, kept)]
        assert met[0] == met[1]

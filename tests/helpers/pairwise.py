"""Where all parameters are dear: a choice of a matrix in which every pair of values still meets; and of families."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

from tests.helpers.cases import Case
from tests.helpers.families import FAMILIES

Row = Mapping[str, Hashable]
Values = Mapping[str, Any] | Sequence[Any]
# A kind of experts' call each.
USUAL = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "dbrx", "step3p7")


def pairwise(rows: Sequence[Row], alone: Iterable[str] = ()) -> list[int]:
    """The rows to take: any two values that stand in one row stand together in a row that is taken.

    Values under the names in `alone` need only be there, in whatever company. The row that adds most is taken next,
    the first of equals.
    """
    found = [meetings(row, frozenset(alone)) for row in rows]
    missing, taken = frozenset().union(*found), []
    while missing:
        taken.append(max(range(len(rows)), key=lambda n: len(found[n] & missing)))
        missing -= found[taken[-1]]
    return sorted(taken)


def meetings(row: Row, alone: frozenset[str]) -> frozenset[frozenset[tuple[str, Hashable]]]:
    """Each value of a row, and each pair of those that are not alone."""
    pairs = combinations([item for item in row.items() if item[0] not in alone], 2)
    return frozenset(map(frozenset, [*pairs, *([item] for item in row.items())]))  # type: ignore[arg-type]


def matrix(runs: Iterable[Any] | None, **parameters: Values) -> pytest.MarkDecorator:
    """Parametrizes device and backend by `runs` and the rest by all combinations of the values, each under its name.

    On Triton's interpreter, and where `runs` is None (a simulator), what is not in a pairwise choice is marked whole. A
    Case meets other values by its properties: each case is there, and each property with each other value.
    """
    named = {
        name: dict(values) if isinstance(values, Mapping) else {str(value): value for value in values}
        for name, values in parameters.items()
    }
    combined = [dict(zip(named, ids, strict=True)) for ids in product(*named.values())]
    rows = [
        {key: value for name, id in ids.items() for key, value in properties(name, id, named[name][id]).items()}
        for ids in combined
    ]
    chosen = set(pairwise(rows, alone=[name for name, values in named.items() if any(map(case_of, values.values()))]))
    params = []
    for run in [pytest.param()] if runs is None else runs:
        values, marks, run_id = run if hasattr(run, "marks") else (tuple(run), (), "-".join(run))
        for n, ids in enumerate(combined):
            spare = n not in chosen and values in ((), ("cpu", "triton"))
            params.append(
                pytest.param(
                    *values,
                    *(named[name][id] for name, id in ids.items()),
                    marks=[*marks, *([pytest.mark.whole] if spare else [])],
                    id="-".join([*ids.values(), *([str(run_id)] if run_id else [])]),
                )
            )
    return pytest.mark.parametrize(([] if runs is None else ["device", "backend"]) + [*named], params)


def case_of(value: Any) -> Case | None:
    """The case that a value is or, beside others, holds."""
    parts = value if isinstance(value, tuple) and not isinstance(value, Case) else [value]
    return next((part for part in parts if isinstance(part, Case)), None)


def properties(name: str, id: str, value: Any) -> dict[str, Hashable]:
    case = case_of(value)
    special = {} if case is None else dict(zip(Case._fields[4:], case[4:], strict=True))
    return {name: id, **special}


def thirds(names: Sequence[str], n: int) -> list[Any]:
    """Names as parameters of a test that is dear, beside one of all families: by default the usual ones and every third
    from the n-th on, so that of three such tests each family meets one; the rest is marked whole."""
    places = {name: place for place, name in enumerate(FAMILIES)}
    chosen = {name for name in names if name in USUAL or places[name] % 3 == n}
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.whole) for name in names]

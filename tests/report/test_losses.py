"""Losses that `evaluate` has written, read again; and files that hold none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from moekern.errors import InputError
from moekern.report.losses import losses_problem, read_losses, told, warnings_of

LOSS = {"nll": 2.0, "kl": 0.5, "top1": 0.75, "tokens": 100, "sequences": 4, "nll_error": 0.1, "kl_error": None,
        "top1_error": 0.01}  # fmt: skip
PAIR = {"plan": "a.json", "than": "b.json", "metric": "kl", "mean": 0.1, "low": None, "high": None, "clear": False}
GOOD: dict[str, Any] = {
    "losses": {name: {"code": LOSS, "prose": {**LOSS, "nll": 4.0}} for name in ("original", "a.json", "b.json")},
    "differences": [PAIR],
}


def test_means_over_domains_and_names() -> None:
    found = told(GOOD, {"a.json": "a"})
    assert [row["name"] for row in found["rows"]] == ["original", "a", "b.json"]
    assert found["rows"][1]["nll"] == {"value": 3.0, "error": pytest.approx(0.1 * 2**0.5 / 2)}
    assert found["rows"][1]["kl"] == {"value": 0.5, "error": None}
    assert (found["tokens"], found["sequences"], found["original"]) == (200, 8, "original")
    assert found["pairs"][0]["plan"] == "a"
    lines = warnings_of(found, ["a", "c"])
    assert lines[0] == "the evaluation holds no losses of c"
    assert "do not tell these plans apart by KL: a and b.json" in lines[1]
    assert "none of these plans" in warnings_of(found, ["c"])[0]


def test_buckets_and_layers_are_means_over_domains() -> None:
    def bucket(start: float, end: float | None, kl: float) -> dict[str, Any]:
        return {"from": start, "to": end, "nll": 1.0, "kl": kl, "top1": 0.5, "kl_error": 0.3, "tokens": 9}

    layer = {"error": 0.25, "cosine": None, "orphans": 0.0, "load": 2.0, "same_top1": 0.5, "overlap": 0.5}
    more = {
        **GOOD,
        "by_position": {"a.json": {"code": [bucket(1, 1, 0.5), bucket(2, 3, 1.0)], "prose": [bucket(2, 3, 3.0)]}},
        "by_entropy": {"a.json": {"code": [bucket(8.0, None, 0.5)], "prose": [bucket(0.0, 0.25, 0.5)]}},
        "layers": {name: {"code": {"0": layer, "1": layer}, "prose": {"0": {**layer, "error": 0.75}}}
                   for name in ("original", "a.json")},
    }  # fmt: skip
    assert losses_problem(more) is None
    found = told(more, {"a.json": "a"})
    first, second = found["buckets"]["position"]
    assert (first["label"], second["label"]) == ("1", "2 to 3")
    assert first["plans"]["a"]["kl"] == {"value": 0.5, "error": pytest.approx(0.3)}
    assert second["plans"]["a"]["kl"] == {"value": 2.0, "error": pytest.approx(0.3 / 2**0.5)}
    assert [row["label"] for row in found["buckets"]["entropy"]] == ["0 to < 0.25", "from 8"]
    assert found["layers"] == {"a": {"0": {**layer, "error": 0.5}}}  # the other domain does not know layer 1
    assert found["rows"][1]["bits_per_byte"] == {"value": None, "error": None}
    for name, wrong in (
        ("by_position", {"c.json": more["by_position"]["a.json"]}),
        ("by_position", {"a.json": {"code": []}}),
        ("by_entropy", {"a.json": {"code": [{"from": 0}], "prose": []}}),
        ("layers", {"a.json": {"code": {"0": {"error": "much"}}, "prose": {}}}),
        ("layers", []),
    ):
        assert losses_problem({**more, name: wrong}) == f"{name}: not as it is written"


def changed(*path: Any, value: Any) -> Any:
    document = copy.deepcopy(GOOD)
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return document


@pytest.mark.parametrize(
    "document",
    [
        {}, {"tasks": {}}, {"losses": {}}, {"losses": []}, {"losses": {"a": {}}}, {"losses": {"a": {"code": 3}}},
        changed("losses", "a.json", "code", value={**LOSS, "more": 1}),
        changed("losses", "a.json", "code", value={**LOSS, "kl": "0.5"}),
        changed("losses", "a.json", "code", value={**LOSS, "kl": 1e308}),
        changed("losses", "a.json", "code", value={**LOSS, "kl_error": []}),
        changed("losses", "a.json", "code", value={**LOSS, "bits_per_byte": "few"}),
        changed("losses", "a.json", "code", value={**LOSS, "sequences": 1.5}),
        changed("losses", "a.json", "code", value={**LOSS, "sums": [[1]]}),
        changed("losses", "a.json", value={"code": LOSS}),
        changed("differences", value={}),
        changed("differences", 0, value={**PAIR, "plan": "c.json"}),
        changed("differences", 0, value={**PAIR, "mean": None}),
        changed("differences", 0, value={**PAIR, "clear": 1}),
        changed("differences", 0, value=[]),
    ],
)  # fmt: skip
def test_other_documents_are_refused(document: Any, tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="no losses of plans .*; name the file that `moekern evaluate"):
        read_losses(path)
    path.write_text(json.dumps(GOOD))
    assert read_losses(path) == GOOD

"""A contrast as a document: what it holds, and what else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moekern.errors import InputError
from moekern.plan.contrast import Contrast
from moekern.plan.guards import Behaviour, contrast, distinctive
from tests.helpers.measured import model_statistics

DOMAINS = ("asked", "refused", "other")


def test_it_is_the_numbers_of_the_guards(tmp_path: Path) -> None:
    s = model_statistics(domains=DOMAINS)
    found = Contrast.of(s, ["refused"])
    assert dict(found.layers) == contrast(s, ["refused"])
    for count in (1, 3, 100):
        assert found.distinctive(count) == distinctive(s, Behaviour(("refused",), count))
    one = Contrast.of(s, ["refused"], ["asked"])
    assert one.layers["2"] != found.layers["2"]
    assert one.layers["2"] == pytest.approx([-value for value in Contrast.of(s, ["asked"], ["refused"]).layers["2"]])
    assert one.provenance["against"] == ["asked"]
    assert one.provenance["tokens"] == {"refused": 40, "asked": 40}
    one.save(tmp_path / "map.json", new=True)
    again = Contrast.load(tmp_path / "map.json")
    assert {key: list(row) for key, row in again.layers.items()} == dict(one.layers)
    assert list(again.layers) == ["0", "2", "10"]
    assert again.provenance == json.loads(json.dumps(one.provenance))


@pytest.mark.parametrize(
    ("of", "against", "message"),
    [
        (["x"], [], "--of x: no such domain; the statistics hold asked, refused, other"),
        (["asked"], ["x"], "--against x: no such domain"),
        (["asked"], ["other", "asked"], "--against asked: is what --of names too"),
        (list(DOMAINS), [], "no domain is left to compare with"),
    ],
)
def test_classes_that_are_none_are_refused(of: list[str], against: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Contrast.of(model_statistics(domains=DOMAINS), of, against)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"format": "moekern.plan/1", "layers": {"0": [1]}}, 'expected an object with "format": "moekern.contrast/1"'),
        ({"format": "moekern.contrast/1", "layers": {}}, 'and "layers"'),
        ({"format": "moekern.contrast/1", "layers": {"0": [1, "x"]}}, "layer '0': expected a list with a number"),
        ({"format": "moekern.contrast/1", "layers": {"0": [True]}}, "layer '0': expected a list with a number"),
        ({"format": "moekern.contrast/1", "layers": {"0": [1]}, "provenance": 3}, "provenance: expected an object"),
        ({"format": "moekern.contrast/1", "layers": {"k" * 300: [1]}}, "a name of 300 characters"),
    ],
)
def test_a_hostile_document_is_one_line(document: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        Contrast.load(tmp_path / "map.json")
    (tmp_path / "map.json").write_text('{"format": "moekern.contrast/1", "layers": {"0": [NaN]}}')
    with pytest.raises(InputError, match="map.json"):
        Contrast.load(tmp_path / "map.json")

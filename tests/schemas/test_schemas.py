"""The schemas describe what moekern writes, refuse what it does not, and take every plan that its reader takes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.demo import MODEL, TEXT
from moekern.errors import InputError
from moekern.plan.document import Plan
from moekern.pruning.prune import prune
from moekern.recipe import Recipe
from moekern.schemas import NAMES, STORED, schema
from moekern.statistics.file import Statistics
from moekern.statistics.header import header_problem
from tests.helpers.commands import moekern

jsonschema = pytest.importorskip("jsonschema")

MERGED = {"keep": [0, 2], "groups": {"0": {"0": 1.0, "1": 0.5}}}
PLANS: list[dict[str, Any]] = [
    {"format": "moekern.plan/1", "layers": {"0": {"keep": [0, 2], "scores": [1, 0.5, -2e300]}, "10": {"keep": [1]}}},
    {"format": "moekern.plan/1", "layers": {"a": {"keep": [3]}}, "provenance": {"mtp": "drop", "any": [None]}},
    {"format": "moekern.plan/2", "layers": {"0": {"keep": [0, 2], "channels": ["c0", [0, 1]]}}},
    {"format": "moekern.plan/2", "layers": {"0": MERGED, "1": {"keep": [1]}}},
    {"format": "moekern.plan/2", "layers": {"0": {"keep": [1]}}, "replace": {"constants": "zero", "domains": ["a"]}},
]
VALUES = st.sampled_from(
    [0, 1, -1, 2.5, True, None, "0", "c0", "zero", "moekern.plan/2", [], [0], [0, 0], {}, {"0": 1}]
)
KEYS = st.sampled_from(["keep", "scores", "channels", "groups", "replace", "0", "1", "x", "format", "provenance"])


def valid(name: str, document: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema(name)).is_valid(document))


def loads(document: Any) -> bool:
    try:
        Plan.from_json(json.dumps(document))
    except InputError:
        return False
    return True


def places(value: Any) -> list[Any]:
    """Every object and list in it."""
    if not isinstance(value, (dict, list)):
        return []
    return [
        value,
        *(place for each in (value.values() if isinstance(value, dict) else value) for place in places(each)),
    ]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    document = copy.deepcopy(PLANS[draw(st.integers(0, len(PLANS) - 1))])
    for _ in range(draw(st.integers(0, 2))):
        found = places(document)
        place = found[draw(st.integers(0, len(found) - 1))]
        key, value = draw(KEYS), copy.deepcopy(draw(VALUES))
        if isinstance(place, list):
            place.append(value)
        elif draw(st.booleans()):
            place.pop(sorted(place)[draw(st.integers(0, 9)) % len(place)] if place else "", None)
        else:
            place[sorted(place)[draw(st.integers(0, 9)) % len(place)] if place and draw(st.booleans()) else key] = value
    return document


@settings(max_examples=100, deadline=None)
@given(mutated())
def test_what_the_reader_of_plans_takes_the_schema_takes(document: Any) -> None:
    assert valid("plan", document) or not loads(document)


def test_schemas_are_schemas_and_plans_of_every_form_are_plans() -> None:
    for name in NAMES:
        jsonschema.Draft202012Validator.check_schema(schema(name))
    assert all(loads(plan) and valid("plan", plan) for plan in PLANS)
    assert sorted(STORED) == sorted(path.stem for path in Path(__file__).parents[2].glob("moekern/schemas/*.json"))


@pytest.mark.parametrize(
    ("plan", "keys", "value"),
    [
        (0, ["format"], "moekern.plan/3"),
        (0, ["more"], 1),
        (0, ["layers"], {}),
        (0, ["layers", "0", "keep"], []),
        (0, ["layers", "0", "keep"], [1, 1]),
        (0, ["layers", "0", "keep"], ["1"]),
        (0, ["layers", "0", "more"], 1),
        (0, ["layers", "0", "scores"], ["x"]),
        (0, ["layers", "0", "channels"], ["c0", "c0"]),
        (2, ["layers", "0"], {"keep": [0]}),
        (2, ["layers", "0", "channels"], ["C0", "c0"]),
        (3, ["layers", "0", "groups"], {"x": {"0": 1}}),
        (3, ["layers", "0", "groups"], {"0": {"0": -1}}),
        (4, ["replace"], {"constants": "one"}),
        (4, ["replace"], {"constants": "zero", "more": 1}),
    ],
)
def test_what_is_no_plan_the_schema_does_not_take(plan: int, keys: list[str], value: Any) -> None:
    document = copy.deepcopy(PLANS[plan])
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    assert not loads(document)
    assert not valid("plan", document)


def test_files_that_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same files with one thing wrong in them."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(next(iter(sorted((TEXT / "c").iterdir()))).read_text()[:4000])
    text = ("--data", "a=book.txt", "--tokens", 1000, "--sequence-length", 64)
    done = moekern("run", MODEL, *text, "--keep", "0.5", "--no-forward", "--no-quality", "--out", "out")
    assert done.returncode == 0, done.stderr
    plan = Plan.load("out.moekern/plan.json")
    assert moekern("evaluate", MODEL, "out.moekern/plan.json", *text, "--out", "e.json").returncode == 0
    prune(MODEL, plan, "none", checksum="none")
    record = json.loads(Path("out/moekern_plan.json").read_text())
    written = [Path(folder, "moekern_manifest.jsonl").read_text() for folder in ("out", "none")]
    lines = [json.loads(line) for text in written for line in text.splitlines()]
    header = Statistics.load("out.moekern/statistics.safetensors").header
    recipe = json.loads(json.dumps(Recipe(format="moekern.recipe/1", model="a/b", keep=["0.5", 3]).options()))
    for name, document, wrong in (
        ("plan", record["plan"], {"layers": []}),
        ("pruned", record, {"plan_sha256": "x"}),
        ("manifest", lines[0], {"size": "1"}),
        ("statistics", header, {"tokens": {"a": -1}}),
        ("evaluation", json.loads(Path("e.json").read_text()), {"losses": {"a": {"b": {}}}}),
        ("recipe", {"format": "moekern.recipe/1"} | recipe, {"sed": 1}),
    ):
        assert valid(name, document), name
        assert not valid(name, document | wrong), name
    assert all(valid("manifest", line) for line in lines)
    for key in header:  # every key that the reader asks for
        less = {name: value for name, value in header.items() if name != key}
        assert (header_problem(less) is None and key != "format") == valid("statistics", less), key
    assert not valid("recipe", {"format": "moekern.recipe/1", "model": "a", "keep": [1.5]})


def test_the_command_prints_one(tmp_path: Path) -> None:
    for name in NAMES:
        assert json.loads(moekern("schema", name).stdout) == schema(name)
    refused = moekern("schema", "plans")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "did you mean plan?" in refused.stderr

"""Recipes: what `run` writes and reads again, and what no recipe is."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.architectures.substitution import FORMS
from moekern.cli.app import app
from moekern.cli.options import Computed, Mix, MtpMode, Thinking
from moekern.cli.recipes import BESIDE, PARAMETER
from moekern.errors import InputError
from moekern.plan.budgets import KINDS, NORMALISATIONS
from moekern.plan.replacement import KINDS as CONSTANTS
from moekern.recipe import FOUND, Recipe, is_plug_in, read_recipe, recipe_with

LEAST = {"format": "moekern.recipe/1", "model": "some/model"}
NOT_DECIDING = {
    "recipe", "out", "batch_size", "memory", "gpu_memory", "spill", "copy", "forward", "restart", "as_json",
    "trust_remote_code", "quiet", "verbose", "log_file",
}  # fmt: skip


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_every_option_of_run_is_in_a_recipe_or_decides_no_bytes() -> None:
    """And code that comes with a model is never started by one."""
    run: Any = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    names = {parameter.name for parameter in run.params if parameter.name is not None}
    asked = {PARAMETER.get(key, key) for key in Recipe.model_fields if key not in FOUND}
    assert names - asked == NOT_DECIDING
    assert asked <= names
    assert set(BESIDE) <= asked


def test_the_words_of_a_recipe_are_those_of_the_flags() -> None:
    hints = get_type_hints(Recipe)
    for key, words in {
        "budget": KINDS, "normalise": NORMALISATIONS, "replace": CONSTANTS, "form": FORMS,
        "preset": [each.value for each in Mix], "thinking": [each.value for each in Thinking],
        "mtp": [each.value for each in MtpMode], "computed_dtype": [each.value for each in Computed],
    }.items():  # fmt: skip
        assert set(get_args(get_args(hints[key])[0])) == set(words), key


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sed": 0}, "unknown key 'sed'; did you mean seed?"),
        ({"seed": "0"}, "seed: expected a valid integer, got '0'"),
        ({"seed": True}, "seed: expected a valid integer, got True"),
        ({"seed": -1}, "seed: expected greater than or equal to 0, got -1"),
        ({"model": None}, "model: expected a valid string, got None"),
        ({"format": "moekern.recipe/9"}, "format: expected \"moekern.recipe/1\", got 'moekern.recipe/9'"),
        ({"pack": "no"}, "pack: expected a valid boolean, got 'no'"),
        ({"data": "book.txt"}, "data: expected a valid list, got 'book.txt'"),
        ({"data": ["a", 3]}, "data.1: expected a valid string, got 3"),
        ({"keep": [1.5]}, "keep.0: expected "),
        ({"thinking": "maybe"}, "thinking: expected 'on', 'off' or 'row', got 'maybe'"),
        ({"fingerprint": "x"}, "fingerprint: "),
        ({"until_stable": 2}, "until_stable: expected less than or equal to 1, got 2"),
        ({"trust_remote_code": True}, "unknown key 'trust_remote_code'"),
        ({"budget": {"kind": "global"}}, "budget: expected 'uniform', "),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_key(tmp_path: Path, change: Any, line: str) -> None:
    path = write(tmp_path / "r.yaml", LEAST | change)
    with pytest.raises(InputError) as error:
        read_recipe(path)
    assert line in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "expected keys and values, found NoneType"),
        ("a: [", "not valid YAML: "),
        ("model: !!python/name:os.system", "not valid YAML: could not determine a constructor"),
        ("format: &a moekern.recipe/1\nmodel: *a", "not valid YAML: refers to another of its values"),
        ("model: a\nmodel: b", "not valid YAML: duplicate key 'model'"),
        ("[a]: b", "not valid YAML: a key that is no text"),
        ("model: " + "[" * 2_000, "not valid YAML: "),
        ("x" * 1_100_000, "more than the limit of 1048576"),
        ("model: a\0", "not valid YAML: "),
        ("format: moekern.recipe/1", "model: is missing"),
        ("format: moekern.recipe/1\nmodel: a\n<<: {seed: 3}", "unknown key '<<'"),
        ("format: moekern.recipe/1\nmodel: a\n!!merge m: {seed: 3}", "not valid YAML: could not determine"),
    ],
)
def test_texts_that_are_no_recipe(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(InputError) as error:
        read_recipe(write(tmp_path / "r.yaml", text))
    assert line in str(error.value)


@pytest.mark.parametrize("text", ["010", "1:30", "0b11", "0x1F", "1_000", "no", "On"])
def test_words_that_only_old_yaml_takes_for_numbers_are_text(tmp_path: Path, text: str) -> None:
    """There 010 is 8, and 1:30 is 90."""
    path = write(tmp_path / "r.yaml", f"format: moekern.recipe/1\nmodel: a\nkeep: [{text}]\n")
    assert read_recipe(path).keep == [text]


def test_places_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=str(path)):
            read_recipe(path)
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_recipe(tmp_path / "bytes")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x85"), min_size=1, max_size=30), min_size=1))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    recipe = Recipe(format="moekern.recipe/1", model=words[0], data=words, keep=["0.5", 64, 0.25], bits=4.5)
    path = tmp_path_factory.mktemp("r") / "r.yaml"
    path.write_text(recipe.text("r.yaml"), encoding="utf-8", newline="")
    assert read_recipe(path) == recipe
    assert read_recipe(path).text("r.yaml") == recipe.text("r.yaml")


def test_a_flag_that_no_recipe_holds_is_named() -> None:
    with pytest.raises(InputError, match=r"^--until-stable: expected less than or equal to 1, got 2$"):
        recipe_with(LEAST | {"until_stable": 2})


def test_criteria_that_are_code_are_known() -> None:
    assert all(map(is_plug_in, ("my.py:score", "package.module:f", "rank(my.py:score*2, usage)")))
    assert not any(map(is_plug_in, ("reap", "hts(1,1,1)", "union(reap, hope)")))

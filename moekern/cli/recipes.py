"""The recipe of a run: read in the place of flags, and written beside what was made."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.checkpoint.strict_json import short
from moekern.cli.console import say
from moekern.cli.given import is_typed
from moekern.errors import InputError
from moekern.version import __version__

if TYPE_CHECKING:
    from moekern.checkpoint.folder import Checkpoint
    from moekern.data.batches import TokenData
    from moekern.evaluation.losses import Evaluation
    from moekern.model.compute import Compute
    from moekern.publishing.card import About
    from moekern.recipe import Recipe
    from moekern.statistics.file import Statistics

PARAMETER = {"reestimate": "re_estimate"}  # key of a recipe -> name of the function's parameter, where it is another
BESIDE = ("model", "device")  # where the model lies and what computes it may be told beside a recipe


def take_recipe(ctx: typer.Context, path: Path | None) -> Path | None:
    """The recipe's values become the defaults of the other flags. Raises InputError for a file that is no recipe."""
    if path is not None and not ctx.resilient_parsing:
        from moekern.recipe import read_recipe

        recipe = read_recipe(path)
        ctx.default_map = {PARAMETER.get(key, key): value for key, value in recipe.options().items()}
    return path


RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="Take MODEL and all flags that decide the bytes from this file, which an earlier run has written "
        "(moekern_recipe.yaml); none of these flags may stand beside it, but MODEL and --device.",
        callback=take_recipe,
        is_eager=True,
    ),
]


def recipe_of(ctx: typer.Context, path: Path | None) -> Recipe:
    """What this command would be given again; of the recipe at `path`, what the run must find. Raises InputError for
    flags beside a recipe that say something else than it, and for criteria of code that stand in it alone."""
    from moekern.recipe import FORMAT, Recipe, read_recipe, recipe_with

    given = None if path is None else read_recipe(path)
    if given is not None:
        _check_beside(ctx, given)
    values: dict[str, Any] = {"format": FORMAT, "moekern": __version__}
    for key in Recipe.model_fields:
        value = _plain(ctx.params.get(PARAMETER.get(key, key)))
        if value is not None:
            values[key] = value
    if given is not None:
        values |= {"fingerprint": given.fingerprint, "ids_sha256": given.ids_sha256}
        if given.moekern not in (None, __version__):
            say(f"{path}: written by moekern {given.moekern}; this is {__version__}, whose bytes may be others")
    return recipe_with(values)


def _check_beside(ctx: typer.Context, given: Recipe) -> None:
    from moekern.recipe import is_plug_in

    for parameter in ctx.command.params:
        name = str(parameter.name)
        key = next((key for key, other in PARAMETER.items() if other == name), name)
        if key not in type(given).model_fields or key in BESIDE or not is_typed(ctx, name):
            continue
        said, wanted = _plain(ctx.params[name]), given.options().get(key)
        if _words(said) != _words(wanted):
            says = "leaves it at its default" if wanted is None else f"says {short(wanted)}"
            what = f"the recipe {says} ({key}); change it in a copy of the recipe, or leave it out"
            raise InputError(f"{parameter.opts[0]}: {what}")
    for name, criteria in (("criterion", [given.criterion or ""]), ("candidate", given.candidate or [])):
        for criterion in filter(is_plug_in, () if is_typed(ctx, name) else criteria):
            what = "is code, which a recipe alone does not start"
            raise InputError(f"--recipe: {name} {criterion} {what}; if you trust it, give the same --{name} too")


def _plain(value: Any) -> Any:
    """A parameter's value as YAML holds it; None for what was not given."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value] or None
    return value.value if isinstance(value, Enum) else value


def _words(value: Any) -> list[str]:
    return [str(each) for each in (value if isinstance(value, list) else [value])]


def revision_of(ctx: typer.Context, path: Path | None, revision: str | None) -> str | None:
    """The recipe's is of the recipe's model, and not of another that is named beside it."""
    return None if path is not None and is_typed(ctx, "model") and not is_typed(ctx, "revision") else revision


def check_model_of(recipe: Recipe | None, checkpoint: Checkpoint) -> None:
    """Raise InputError for another model than the recipe's."""
    if recipe is not None and recipe.fingerprint not in (None, checkpoint.fingerprint):
        what = f"its fingerprint is {checkpoint.fingerprint[:12]}, and that of the recipe's {recipe.fingerprint[:12]}"
        raise InputError(f"{checkpoint.name}: is another model than the recipe's: {what}; name that one as MODEL")


def check_text_of(recipe: Recipe | None, data: TokenData) -> None:
    """Raise InputError for other text than the recipe's."""
    if recipe is None or recipe.ids_sha256 is None:
        return
    found = ids_of(data)
    for name in sorted(recipe.ids_sha256.keys() | found.keys()):
        if recipe.ids_sha256.get(name) != found.get(name):
            what = "its tokens are not those that the recipe was written with (ids_sha256)"
            raise InputError(f"--data {name}: {what}; give back the files, or take the key out of the recipe")


def ids_of(data: TokenData) -> dict[str, str]:
    """Domain -> sha256 of its token ids."""
    return {name: str(each["ids_sha256"]) for name, each in data.recipe["sources"].items()}


def written_recipe(recipe: Recipe | None, checkpoint: Checkpoint, data: TokenData, compute: Compute) -> str | None:
    """The text of the recipe, with what was found: the commit, the fingerprint, the text's ids, type and device."""
    if recipe is None:
        return None
    from moekern.publishing.card import RECIPE

    identity, _, commit = (checkpoint.repository or "").partition("@")
    found = {
        "model": identity or recipe.model,
        "revision": commit or recipe.revision,
        "fingerprint": checkpoint.fingerprint,
        "ids_sha256": ids_of(data),
        "sequence_length": data.recipe.get("sequence_length", recipe.sequence_length),
        "dtype": compute.dtype_name,
        "device": compute.place.type,
    }
    return recipe.model_copy(update=found).text(RECIPE)


def about_of(
    losses: Evaluation | None, row: str, statistics: Statistics | None = None, recipe: str | None = None
) -> About:
    """What the card of a result tells of its losses on text that was held back, where they were measured, and of the
    text that chose its experts."""
    from moekern.evaluation.losses import losses_document
    from moekern.publishing.card import About

    measured = losses is not None and any(losses.values())
    document = {"losses": losses_document(losses or {})} if measured else None
    return About(recipe, document, row, None if statistics is None else statistics.header)

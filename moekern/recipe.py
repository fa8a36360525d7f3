"""The recipe of a run: the model and every option of `run` that decides its bytes, as YAML that gives them again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moekern.checkpoint.strict_json import read_file, short
from moekern.checkpoint.strict_yaml import parse_yaml, yaml_text
from moekern.errors import InputError, nearest_name

FORMAT = "moekern.recipe/1"
SIZE_CAP = 1 << 20  # bytes of a file
FOUND = ("format", "moekern", "fingerprint", "ids_sha256")  # keys that are no options: what the run came upon
HEAD = "# moekern run --recipe {name} --out OUT\n"

Text = Annotated[str, Field(min_length=1, max_length=1 << 14)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=1 << 12)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, lt=1 << 53)]


class Recipe(BaseModel):
    """Keys are those of the command line; what a key is not given for has that one's default.

    revision: the commit, of a model of the hub. fingerprint, and ids_sha256 of each domain's token ids, are held
    against the model and the text that a run finds; dtype and device are those that layers were computed in and on.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), title="moekern recipe")

    format: Literal["moekern.recipe/1"]
    moekern: Text | None = None  # the version that wrote it
    model: Text
    revision: Text | None = None
    fingerprint: Digest | None = None
    ids_sha256: dict[Text, Digest] | None = None
    data: Texts | None = None
    preset: Literal["code", "general", "reasoning"] | None = None
    tokens: Text | Count | None = None
    sequence_length: Annotated[int, Field(ge=2, lt=1 << 31)] | None = None
    pack: bool | None = None
    chunk: Count | None = None
    column: Texts | None = None
    thinking: Literal["on", "off", "row"] | None = None
    strict: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    keep: Annotated[list[Text | Count | Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] | None = None
    fit: Text | None = None
    bits: Annotated[float, Field(gt=0, le=64)] | None = None
    context: Annotated[int, Field(ge=0)] | None = None
    sequences: Annotated[int, Field(ge=0)] | None = None
    reserve: Text | None = None
    criterion: Text | None = None
    candidate: Texts | None = None
    domain: Texts | None = None
    tier: Texts | None = None
    until_stable: Annotated[float, Field(gt=0, le=1)] | None = None
    budget: Literal["uniform", "global", "adaptive", "waterfill", "relative"] | None = None
    normalise: Literal["none", "sum", "max", "mean", "zscore"] | None = None
    allow_nonuniform: bool | None = None
    protect_super: bool | None = None
    replace: Literal["zero", "mean", "least-squares"] | None = None
    form: Literal["approximate-experts", "compression-config"] | None = None
    target: Texts | None = None
    mtp: Literal["prune", "drop", "keep"] | None = None
    quality: bool | None = None
    refit: bool | None = None
    refine: bool | None = None
    shape: Text | None = None
    reestimate: bool | None = None
    computed_dtype: Literal["source", "bf16"] | None = None
    dtype: Text | None = None
    device: Text | None = None

    def options(self) -> dict[str, Any]:
        """Flag, with underscores, -> value, of those that are given."""
        return {key: value for key, value in self.model_dump().items() if key not in FOUND and value is not None}

    def text(self, name: str) -> str:
        """As a file of this name: keys in the order of the class, without those that have no value."""
        return HEAD.format(name=name) + yaml_text({k: v for k, v in self.model_dump().items() if v is not None})


def is_plug_in(criterion: str) -> bool:
    """Whether a criterion's text names code; a combination may hold such a name."""
    return ":" in criterion


def recipe_with(values: dict[str, Any]) -> Recipe:
    """Raises InputError that names the option whose value no recipe holds."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(f"--{_problem(error).replace('_', '-', 1)}", kind="option") from None


def read_recipe(path: Path) -> Recipe:
    """Raises InputError that names the file and the first key that is wrong."""
    try:
        text = read_file(path, SIZE_CAP).decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    try:
        return Recipe.model_validate(parse_yaml(text, str(path), SIZE_CAP))
    except ValidationError as error:
        raise InputError(f"{path}: {_problem(error)}") from None


def _problem(error: ValidationError) -> str:
    """The key of the first error, by its path, and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    place = [str(each) for each in first["loc"] if not isinstance(each, str) or each in Recipe.model_fields]
    key = ".".join(place) or short(str(first["loc"][0]) if first["loc"] else "")
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][0])
        return f"unknown key {short(name)}{nearest_name(name, Recipe.model_fields)}"
    if first["type"] == "missing":
        return f"{key}: is missing"
    if key == "format":
        return f'format: expected "{FORMAT}", got {short(first["input"])}'
    said = first["msg"].removeprefix("Input should be ")
    return f"{key}: expected {said}, got {short(first['input'])}"

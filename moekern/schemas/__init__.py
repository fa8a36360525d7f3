"""JSON Schemas (draft 2020-12) of what is written and read: they describe; what is wrong in a file is told by its
reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moekern.errors import InputError, nearest_name

STORED = ("evaluation", "manifest", "plan", "pruned", "statistics")  # a file each beside this one
RECIPE = "recipe"  # made of the class that reads recipes
NAMES = (*STORED, RECIPE)


def check_schema(name: str) -> str:
    """The name. Raises InputError for one that is none."""
    if name not in NAMES:
        raise InputError(f"{name:.40}: no schema; expected one of {', '.join(NAMES)}{nearest_name(name, NAMES)}")
    return name


def schema(name: str) -> dict[str, Any]:
    """The schema of that name. Raises InputError for one that is none."""
    if check_schema(name) != RECIPE:
        found: dict[str, Any] = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
        return found
    from moekern.recipe import Recipe

    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}

"""The YAML front matter of model cards, which is what the hub knows of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moekern.checkpoint.strict_json import read_start, regular_size
from moekern.checkpoint.strict_yaml import SIZE_CAP, parse_yaml, without_keys, yaml_text
from moekern.errors import InputError

FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n|(?<=\n))---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
NAME = r"(?![.-])(?:(?!--|\.\.)[\w.-]){1,96}(?<![.-])"  # of an owner, and of what is theirs, as the hub has them
HUB_ID = re.compile(rf"{NAME}/{NAME}(?<!\.git)", re.ASCII)
LICENSE, LICENSE_LINK = "license", "license_link"
INHERITED = (LICENSE, "license_name", LICENSE_LINK, "language", "library_name", "pipeline_tag")
TAGS = ("moe", "expert-pruning", "pruned", "moekern")
LINK, WORDS = re.compile(r"(https?://)?[\w./%?=#&+~-]{1,300}"), re.compile(r"[\w .+/()-]{1,100}")  # that are taken over
MOST = 100  # languages


def split(card: str) -> tuple[str | None, str]:
    """Front matter, None where there is none, and the text behind it."""
    found = FRONT_MATTER.match(card)
    return (found[1], card[found.end() :]) if found else (None, card.removeprefix("\ufeff"))


def values_of(path: Path) -> dict[str, Any]:
    """The front matter of a card. Empty where nothing can be read: the card is somebody else's."""
    with suppress(InputError):
        size = min(regular_size(path), 4 * SIZE_CAP)
        front, _ = split(read_start(path, size)[0].decode(errors="replace"))
        return {} if front is None else parse_yaml(front, path.name)
    return {}


def inherited(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a model takes over of the card of the one that it is made of: license, language, library."""
    return {key: values[key] for key in INHERITED if _is_short(values.get(key), LINK if key == LICENSE_LINK else WORDS)}


def base_of(values: Mapping[str, Any]) -> str | None:
    """The model that a card names as the one it is made of, where that is one id of the hub."""
    base = values.get("base_model")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return base if isinstance(base, str) and HUB_ID.fullmatch(base) else None


def _is_short(value: Any, form: re.Pattern[str]) -> bool:
    """Whether it is a text of this form, or a list of few."""
    if isinstance(value, list):
        return 0 < len(value) <= MOST and all(isinstance(each, str) and form.fullmatch(each) for each in value)
    return isinstance(value, str) and form.fullmatch(value) is not None


def front_matter(known: Mapping[str, Any], base: str | None, datasets: list[str]) -> str:
    """Of a pruned model's card, between its lines of dashes. known: what it takes over of the original's."""
    values: dict[str, Any] = {} if base is None else {"base_model": base, "base_model_relation": "finetune"}
    values |= {key: known[key] for key in INHERITED if key in known}
    values |= {"tags": list(TAGS)} | ({"datasets": datasets} if datasets else {})
    return f"---\n{yaml_text(values)}---\n"


def with_values(card: str, values: Mapping[str, Any], source: str) -> str:
    """A card with these values at the head of its front matter, whose other lines stay as they are where each key has
    lines of its own. Raises InputError, naming `source`, where that cannot be read."""
    front, text = split(card)
    where, front = f"{source}: front matter", (front or "").replace("\r\n", "\n")
    before = parse_yaml(front, where) if _has_values(front) else {}
    wanted = {**values, **{key: value for key, value in before.items() if key not in values}}
    made = yaml_text(dict(values)) + without_keys(front, values)
    with suppress(InputError):
        if parse_yaml(made, where) == wanted:
            return f"---\n{made}---\n{text}"
    return f"---\n{yaml_text(wanted)}---\n{text}"


def _has_values(front: str) -> bool:
    return any(line.strip() and not line.startswith("#") for line in front.splitlines())

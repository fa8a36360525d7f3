"""YAML of a hostile text: plain values alone, without references, which can stand for more than memory holds."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, ClassVar

import yaml

from moekern.checkpoint.strict_json import check_depth, unique
from moekern.errors import InputError

SIZE_CAP = 1 << 16  # characters of a text, where real ones have a few hundred
# Plain values that are no text, alike in YAML 1.1 and 1.2: of 1.1 alone are 010 (8), 1:30 (90), `no`, dates and `<<`.
PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """safe_load's, which makes no objects; a key stands once, and all that a mapping has stands in it."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, list[tuple[str, re.Pattern[str]]]]] = {
        None: [(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{form})\Z")) for kind, form in PLAIN.items()]
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("refers to another of its values (*name); write the value out")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        """Keys of another mapping are not put in: a key that asks for it (`!!merge`) is one of an unknown kind."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        keys = [key.value for key, _ in node.value]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key that is no text")
        unique([(key, None) for key in keys])
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


def parse_yaml(text: str, source: str, cap: int = SIZE_CAP) -> dict[str, Any]:
    """The mapping in a text. Raises InputError that begins with `source` for anything else, for references, duplicate
    keys, deep nesting, tags of objects and more than `cap` characters."""
    if len(text) > cap:
        raise InputError(f"{source}: {len(text)} characters, more than the limit of {cap}")
    try:
        value = yaml.load(text, _Plain)
    except yaml.MarkedYAMLError as error:
        at = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise InputError(f"{source}: not valid YAML: {error.problem or error.context}{at}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: expected keys and values, found {type(value).__name__}")
    check_depth(value, source)
    return value


def yaml_text(values: dict[str, Any]) -> str:
    """The same turned round: keys in their order, one to a line."""
    return str(yaml.safe_dump(values, allow_unicode=True, sort_keys=False, default_flow_style=False, width=2**31))


def without_keys(text: str, keys: Collection[str]) -> str:
    """A text that `parse_yaml` takes, without the lines of these keys of its mapping; all others as they are."""
    node, lines = yaml.compose(text, _Plain), text.splitlines(keepends=True)
    marks = [] if node is None else [(key.start_mark, value.end_mark) for key, value in node.value if key.value in keys]
    gone = {i for start, end in marks for i in range(start.line, end.line + (end.column > 0))}
    kept = [line for i, line in enumerate(lines) if i not in gone]
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in kept)

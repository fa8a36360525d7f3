"""YAML of a hostile text: plain values alone, without references, which can stand for more than memory holds."""

from __future__ import annotations

from typing import Any

import yaml

from moekern.checkpoint.strict_json import check_depth, unique
from moekern.errors import InputError

SIZE_CAP = 1 << 16  # characters of a text, where real ones have a few hundred
TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """safe_load's, which makes no objects; dates stay text, and a key stands once."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != TIMESTAMP]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("refers to another of its values (*name); write the value out")
        return super().compose_node(parent, index)

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

"""Numbers in a configuration, by where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Numbers = Mapping[tuple[str, ...], int]  # config path -> what stands there


def put_numbers(config: Any, numbers: Numbers) -> Any:
    """Change the numbers at these paths of a configuration, which is returned."""
    for (*sections, key), number in numbers.items():
        section = config
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else getattr(section, name, None)
        if isinstance(section, dict):
            section[key] = number
        elif section is not None:
            setattr(section, key, number)
    return config

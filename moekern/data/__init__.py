"""Calibration and evaluation text as token batches: named domains, packed to one length, seeded.

The names are imported on first use: what a spec of text means is looked at before torch is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moekern.data.batches import DEFAULT_DOMAIN as DEFAULT_DOMAIN
    from moekern.data.batches import Batch as Batch
    from moekern.data.batches import TokenData as TokenData
    from moekern.data.read import read_data as read_data
    from moekern.data.text import Text as Text

HOMES = {
    "Batch": "batches",
    "DEFAULT_DOMAIN": "batches",
    "Text": "text",
    "TokenData": "batches",
    "read_data": "read",
}

__all__ = list(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'moekern.data' has no attribute {name!r}")
    return getattr(import_module(f"moekern.data.{HOMES[name]}"), name)

"""Calibration and evaluation text as token batches: named domains, packed to one length, seeded."""

from moekern.data.batches import DEFAULT_DOMAIN, Batch, TokenData
from moekern.data.read import read_data
from moekern.data.text import Text

__all__ = ["Batch", "DEFAULT_DOMAIN", "Text", "TokenData", "read_data"]

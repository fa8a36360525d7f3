"""Calibration and evaluation text as token batches: named domains, packed to one length, seeded."""

from moekern.data.batches import DEFAULT_DOMAIN, Batch, TokenData
from moekern.data.read import read_data

__all__ = ["Batch", "DEFAULT_DOMAIN", "TokenData", "read_data"]

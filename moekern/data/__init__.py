"""Calibration and evaluation text as token batches: named domains, packed to one length, seeded."""

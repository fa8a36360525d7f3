"""Calibration text streams through a model, and its experts are measured."""

from moekern.calibration.calibrate import calibrate
from moekern.calibration.observe import observe

__all__ = ["calibrate", "observe"]

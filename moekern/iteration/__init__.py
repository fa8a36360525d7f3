"""Calibrate and plan in one: layers pruned on the way, in rounds that score survivors again."""

from moekern.iteration.rounds import Method, iterate

__all__ = ["Method", "iterate"]

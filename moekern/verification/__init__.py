"""A pruned checkpoint against its original: every byte, read by a road of its own; then the logits."""

from moekern.verification.tensors import VerifyReport, verify

__all__ = ["VerifyReport", "verify"]

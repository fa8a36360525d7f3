"""The table of model families, and the detection of a checkpoint's layout."""

from moekern.architectures.detect import find_layout
from moekern.architectures.layout import ExpertTensor, Layout, MoeLayer
from moekern.architectures.table import FAMILIES, Family, built_by_transformers, family_named

__all__ = [
    "FAMILIES", "ExpertTensor", "Family", "Layout", "MoeLayer", "built_by_transformers", "family_named", "find_layout",
]  # fmt: skip

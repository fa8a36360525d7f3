"""The small trained model that ships with moekern, the text it is measured on, and the tour that uses them."""

from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE / "model"
TEXT = HERE / "text"


def text_sources(part: str) -> tuple[str, ...]:
    """NAME=PATH of every domain's held-out text; `part` is "calibration" or "evaluation"."""
    return tuple(f"{path.parent.name}={path}" for path in sorted(TEXT.glob(f"*/{part}.txt")))

"""What tests share: models, layouts, shapes, file systems, faults."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository

"""What every benchmark says about the machine, and how it keeps its records."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path

from moekern.files import told

Line = dict[str, object]


def machine() -> Line:
    """Date, processor and Python."""
    try:
        cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        cpu = []
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": cpu[0].split(":")[1].strip() if cpu else platform.machine(),
        "python": platform.python_version(),
    }


def append(path: Path | None, lines: Iterable[Mapping[str, object]]) -> None:
    """Append one JSON line a record, to nowhere when path is None."""
    if path:
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

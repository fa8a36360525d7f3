"""The import law of DESIGN.md: data flows one way, and light parts stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moekern"

# A part may import the parts named here, and those parts only. A folder is one part.
LAW: dict[str, set[str]] = {
    "errors": set(),
    "keys": set(),
    "version": set(),
    "files": {"errors"},
    "kernels": {"_C"},
    "dtypes": set(),
    "checkpoint": {"dtypes", "errors"},
    "architectures": {"checkpoint", "errors"},
    "plan": {"errors", "files", "keys"},
    "sums": set(),
    "statistics": {"errors", "files", "keys", "sums"},
    "criteria": {"errors", "sums"},
    "budgets": {"errors", "plan"},
    "targets": {"errors", "plan"},
    "footprint": {"architectures", "checkpoint", "errors"},
    "comparison": {"errors", "plan", "statistics"},
    "interchange": {"architectures", "errors", "keys", "plan", "version"},
    "guards": {"errors", "keys", "plan", "statistics"},
    "planning": {
        "budgets",
        "criteria",
        "errors",
        "guards",
        "keys",
        "plan",
        "statistics",
        "targets",
        "version",
    },
    "cuts": {"architectures", "checkpoint", "errors", "plan"},
    "ranges": {"architectures", "checkpoint", "cuts"},
    "sidefiles": {"architectures", "checkpoint", "cuts", "errors", "plan", "ranges", "rewrite_config"},
    "workfolder": {"errors", "files"},
    "copying": {"_C", "checkpoint", "errors", "ranges"},
    "preflight": {"errors", "workfolder"},
    "rewrite_config": {"architectures", "errors"},
    "pruning": {
        "_C",
        "architectures",
        "checkpoint",
        "copying",
        "cuts",
        "errors",
        "files",
        "plan",
        "preflight",
        "ranges",
        "sidefiles",
        "workfolder",
    },
    "verification": {"architectures", "checkpoint", "plan", "verification_config"},
    "verification_config": {"architectures"},
    "data": {"errors", "files"},
    "decoder": {"_C", "architectures", "checkpoint", "cuts", "errors"},
    "routed": {"kernels"},
    "tiers": {"errors", "routed", "sums"},
    "recorder": {"errors", "kernels", "routed", "statistics", "sums", "tiers"},
    "seam": {"decoder", "errors", "recorder", "routed"},
    "replay": {"architectures", "decoder", "errors", "kernels", "seam", "sums"},
    "gradients": {"data", "decoder", "errors", "seam", "sums"},
    "calibration": {
        "gradients",
        "architectures",
        "checkpoint",
        "data",
        "decoder",
        "errors",
        "kernels",
        "recorder",
        "replay",
        "seam",
        "statistics",
        "sums",
        "tiers",
        "version",
        "weighing",
    },
    "observation": {
        "architectures",
        "checkpoint",
        "data",
        "decoder",
        "errors",
        "recorder",
        "seam",
        "statistics",
        "tiers",
        "version",
    },  # fmt: skip
    "benchmark": {"_C", "decoder", "errors", "kernels", "recorder", "seam"},
    "stored": {"architectures", "checkpoint", "decoder", "errors", "kernels"},
    "weighing": {
        "architectures",
        "checkpoint",
        "decoder",
        "errors",
        "kernels",
        "statistics",
        "stored",
        "sums",
        "version",
    },
    "iteration": {
        "architectures",
        "calibration",
        "checkpoint",
        "criteria",
        "data",
        "decoder",
        "errors",
        "kernels",
        "plan",
        "planning",
        "recorder",
        "seam",
        "statistics",
        "version",
        "weighing",
    },
    "evaluation": {"architectures", "checkpoint", "data", "decoder", "plan"},
    "forward": {"architectures", "checkpoint", "data", "decoder", "evaluation", "plan"},
    "overview": {"architectures", "checkpoint", "plan"},
}
# Everything above the stages may import everything; nothing above it is imported by a stage.
SHELL = {
    "__init__",
    "__main__",
    "cli",
    "cli_iteration",
    "cli_options",
    "cli_planning",
    "console",
    "demo",
    "hub",
    "stages",
    "stages_iteration",
    "stages_planning",
    "tables",
    "tables_planning",
}
NO_TORCH = ("moekern.plan", "moekern.ranges", "moekern.pruning", "moekern.architectures", "moekern.checkpoint")


def parts() -> dict[str, set[str]]:
    """Part -> the parts of moekern it imports."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        names = found.setdefault(part, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "moekern":
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moekern."):
                names.add(str(node.module).split(".")[1])
            elif isinstance(node, ast.Import):
                names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("moekern.")}
        names.discard(part)
    return found


def test_every_part_is_in_the_law() -> None:
    assert set(parts()) == set(LAW) | SHELL


@pytest.mark.parametrize("part", LAW)
def test_a_part_imports_what_the_law_allows(part: str) -> None:
    assert parts()[part] <= LAW[part]


@pytest.mark.parametrize("module", NO_TORCH)
def test_the_byte_road_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, moekern.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kernels_need_neither_transformers_nor_greenlet() -> None:
    code = "import sys, moekern.kernels; sys.exit(bool({'transformers', 'greenlet', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

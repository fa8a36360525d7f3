"""The import law of DESIGN.md: data flows one way, and light parts stay light."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "moekern"


def law() -> tuple[str, ...]:
    """The first column of the table of parts in DESIGN.md: a part imports only parts above it. A folder is one part."""
    section = (ROOT / "DESIGN.md").read_text().partition("\n## Parts\n")[2].partition("\n## ")[0]
    return tuple(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


LAW = law()
NO_TORCH = ("moekern.plan", "moekern.pruning", "moekern.architectures", "moekern.checkpoint")


@functools.cache
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
        names -= {part, "_C"}
    return found


def test_every_part_is_in_the_law() -> None:
    assert sorted(parts()) == sorted(LAW)


@pytest.mark.parametrize("part", LAW)
def test_no_import_runs_upwards(part: str) -> None:
    assert parts()[part] <= set(LAW[: LAW.index(part)])


@pytest.mark.parametrize("module", NO_TORCH)
def test_the_byte_road_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, moekern.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kernels_need_neither_transformers_nor_greenlet() -> None:
    code = "import sys, moekern.kernels; sys.exit(bool({'transformers', 'greenlet', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

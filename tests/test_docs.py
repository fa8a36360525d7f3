"""The pages under docs/ say what the code does: examples run, and the table of criteria is the code's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from moekern.cli.criteria import markdown
from moekern.criteria import criterion_named, score_layer
from moekern.criteria.table import described
from moekern.data.mixes import PRESETS
from moekern.data.readers import COMPRESSED, FORMATS, TEXT_SUFFIXES
from tests.helpers import ROOT
from tests.helpers.measured import layer_statistics

DOCS = ROOT / "docs"


def code(page: str) -> str:
    found = re.search(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_kernels_example_runs_as_it_stands(tmp_path: Path) -> None:
    check = """
whole = torch.einsum("th,ehd->ted", hidden, experts)
want = (whole.gather(1, ids[..., None].expand(-1, -1, H)) * gates[..., None]).sum(1)
torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
norm = whole.norm(dim=2)
means = [(gates[ids == e] * norm[:, e][(ids == e).any(1)]).mean() for e in range(E)]
torch.testing.assert_close(reap, torch.stack(means).double(), rtol=1e-4, atol=1e-4)
"""
    (tmp_path / "example.py").write_text(code("kernels.md") + check)
    done = subprocess.run([sys.executable, tmp_path / "example.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("drop first: ")
    assert len(code("kernels.md").splitlines()) <= 22


def test_the_table_of_criteria_is_the_codes() -> None:
    page = (DOCS / "criteria.md").read_text()
    assert markdown(described()) in page, "run: moekern criteria --markdown"


def test_the_presets_of_the_page_are_the_codes() -> None:
    page = (DOCS / "data.md").read_text()
    rows = {name: mix.replace(",", ", ") for name, mix in PRESETS.items()}
    assert all(f"| `{name}` | `{mix}` |" in page for name, mix in rows.items())
    assert all(suffix in page for suffix in (*COMPRESSED, *FORMATS) if suffix not in TEXT_SUFFIXES)


def test_the_plug_in_of_the_page_scores(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(code("criteria.md"))
    s = layer_statistics(0)
    want = s.norm_sum / s.count - s.count / s.tokens
    torch.testing.assert_close(score_layer(criterion_named(f"{tmp_path}/my.py:score"), s, "0"), want)

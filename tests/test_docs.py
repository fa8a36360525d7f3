"""README and the pages under docs/ say what the code does: every command and example runs, tables are the code's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from glob import glob
from pathlib import Path

import pytest
import torch

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


def code(page: str, block: int = 0) -> str:
    return str(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)[block])


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


def test_the_example_of_a_refit_predicts_what_it_is_given() -> None:
    planted = code("kernels.md", 1).replace(
        "sums = kernels",
        "residual.zero_()\n"
        "kernels.scatter_residual(residual, a[: offsets[1]], -torch.randn(M, H), tokens[: offsets[1]], offsets[:2])\n"
        "offsets = offsets[:2].clone()\nE, before = 1, residual.norm()\nsums = kernels",
    )
    for script in (code("kernels.md", 1), planted + "assert residual.norm() < 1e-2 * before, residual.norm()\n"):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


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


def test_the_model_in_memory_of_the_page_is_pruned_and_steered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    little_text(["MODEL"])
    layers = {str(i): (*range(0, 16, 2),) for i in range(4)}
    Plan({key: LayerPlan(keep) for key, keep in layers.items()}).save("half.json")
    Contrast({"1": tuple(range(16))}).save("code.json")
    exec(code("judging.md"), {})


def commands(page: Path) -> list[list[str]]:
    """The command lines of moekern in a page's blocks, without comments, continued lines joined."""
    blocks = re.findall(r"^```(?:bash|sh|)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("moekern ")]


PAGES = {page.name: commands(page) for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
del PAGES["machines.md"]  # below
TESTED_ELSEWHERE = ("demo", "bench")  # minutes long
# By tests/cli/test_replacing.py, tests/masks, tests/cli/test_continuing.py, tests/merging, tests/cli/test_report.py,
# tests/publishing with tests/cli/test_recipes.py:
TESTED_TOO = ("substitution.md", "masks.md", "judging.md", "merging.md", "report.md", "publishing.md")
FROM_THE_HUB = re.compile(r"^--preset|\w/[\w-]+(\[\w+\])?:\d")  # data sets: tests/data/test_hub.py


def test_the_pages_hold_commands() -> None:
    assert len(PAGES["README.md"]) > 20


def little_text(models: Iterable[str]) -> str:
    """Put what the pages speak of into the current folder; the text."""
    for name in models:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(MODEL)
    text = "".join(path.read_text()[:2000] for path in sorted((TEXT / "c").iterdir())[:4])
    for name in ("src/a.c", "book.txt", "chats/a.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("held-out.txt").write_text(text[:3000])
    return text


LITTLE = {"--tokens-per-round": "300", "--steps": "2"}


def with_little_text(command: list[str]) -> list[str]:
    """A command that does not train on what little text there is a hundred times over."""
    return [LITTLE.get(before, word) for before, word in zip(["", *command], command, strict=False)]


def goes_on(page: list[list[str]], command: list[str]) -> bool:
    """Whether other commands of a page read what this one writes."""
    written = [word for before, word in zip(command, command[1:], strict=False) if before == "--out"]
    return any(word in other for word in written for other in page if other != command)


WITH_COMMANDS = [
    pytest.param(page, marks=pytest.mark.whole if page in TESTED_TOO else ()) for page, found in PAGES.items() if found
]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_of_the_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, one after another, where every model's name is the model that ships and files hold little text.

    What README.md has too is run there, but where others of the page go on with it.
    """
    monkeypatch.chdir(tmp_path)
    names = re.findall(r"(?:Qwen|MODEL)[\w./-]*", " ".join(" ".join(command) for command in PAGES[page]))
    models = {name for name in names if name == "MODEL" or ("/" in name and not name.endswith(".json"))}
    text = little_text(models)
    Path("held-out.jsonl").write_text(json.dumps({"text": text[:3000]}) + "\n")
    Path("sharegpt.json").write_text(json.dumps([{"text": text[:3000]}]))  # the tokenizer has no template of chats
    for number in (1, 2):
        part = ["--data", "a=src/", "--seed", number, "--sequence-length", 64, "--tokens", 300]
        assert moekern("calibrate", MODEL, *part, "--out", f"s{number}.safetensors").returncode == 0
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
    page = (DOCS / "machines.md").read_text()
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    lines = [line for line in blocks.splitlines() if line and not line.startswith("#")]
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

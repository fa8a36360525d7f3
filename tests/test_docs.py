"""Every command and every example in Python of README and the pages under docs/ runs."""

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
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekern.demo import MODEL, TEXT
from moekern.plan.contrast import Contrast
from moekern.plan.document import LayerPlan, Plan
from tests.helpers.commands import moekern
from tests.helpers.pages import PYTHON, SHELL, code
from tests.helpers.ranks import torchrun

IN_PYTHON = ("README.md", "backend.md", "formats.md", "judging.md", "refit.md")  # examples that run as they stand
FROM_THE_HUB = re.compile(r"^--preset|\w/[\w-]+(\[\w+\])?:\d")  # data sets: tests/data/test_hub.py
TESTED_ELSEWHERE = ("demo", "bench")  # minutes long
# Pages whose commands other tests run at every `make test`: tests/cli/test_replacing.py, tests/masks,
# tests/cli/test_continuing.py, tests/merging, tests/cli/test_report.py, tests/cli/test_choosing.py,
# tests/cli/test_whole_recovery.py, tests/publishing with tests/cli/test_recipes.py.
TESTED_TOO = ("substitution.md", "masks.md", "judging.md", "merging.md", "report.md", "criteria.md", "recovery.md",
              "publishing.md")  # fmt: skip
PAGES = {page: [line for block in SHELL if block.page == page for line in block.commands] for page, *_ in SHELL}
del PAGES["machines.md"]  # below
IN_ORDER = sorted((page for page, lines in PAGES.items() if lines), key=lambda page: (page in TESTED_TOO, page))


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
    "page", [pytest.param(page, marks=pytest.mark.whole if page in TESTED_TOO else ()) for page in IN_ORDER]
)
def test_every_command_of_the_pages_runs(
    page: str, measured: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, one after another, where every model's name is the model that ships and files hold little text.

    What is on a page before it too is run there, but where others of the page go on with it.
    """
    monkeypatch.chdir(tmp_path)
    names = re.findall(r"(?:Qwen|MODEL)[\w./-]*", " ".join(" ".join(command) for command in PAGES[page]))
    given = {name for name in names if name in ("MODEL", "MODEL-FP8")}
    models = given | {name for name in names if "/" in name and not name.endswith(".json")}
    text = little_text(models)
    Path("held-out.jsonl").write_text(json.dumps({"text": text[:3000]}) + "\n")
    Path("sharegpt.json").write_text(json.dumps([{"text": text[:3000]}]))  # the tokenizer has no template of chats
    for path in measured:
        shutil.copy(path, path.name)
    before = [command for other in IN_ORDER[: IN_ORDER.index(page)] for command in PAGES[other]]
    for command in PAGES[page]:
        if command[0] in TESTED_ELSEWHERE or any(FROM_THE_HUB.search(word) for word in command):
            continue
        if command in before and not goes_on(PAGES[page], command):
            continue
        if "--out" in command:  # of an earlier block
            out = Path(command[command.index("--out") + 1])
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        done = moekern(*(word for each in with_little_text(command) for word in sorted(glob(each)) or [each]))
        assert done.returncode == 0, f"moekern {shlex.join(command)}: {done.stderr}"


def test_the_pages_hold_commands() -> None:
    assert sum(map(len, PAGES.values())) > 80


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
        for page in IN_PYTHON
        for i in range(sum(each.page == page for each in PYTHON))
    ],
)
def test_every_example_in_python_runs(page: str, number: int, example: dict[str, Any]) -> None:
    if "compressed_tensors" in code(page, number):
        pytest.importorskip("compressed_tensors")
    exec(code(page, number), example)


def test_every_example_in_python_is_run() -> None:
    others = [block.page for block in PYTHON if block.page not in IN_PYTHON]
    # in tests/test_pages.py; make test-engines; below, twice
    assert others == ["criteria.md", "engines.md", "kernels.md", "kernels.md"]


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

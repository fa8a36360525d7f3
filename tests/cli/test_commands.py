"""The commands as a user types them: results, JSON, and one clear line with a non-zero exit for everything wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekern.criteria import CRITERIA
from moekern.statistics.file import Statistics
from tests.helpers import families
from tests.helpers.commands import contents, document, model_and_ids, moekern

MakeCheckpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, token ids, statistics and a plan."""
    folder = model_and_ids(tmp_path_factory.mktemp("cli"), 600, "deepseek_v3")
    calibrate = ("calibrate", folder / "model", "--data", f"a={folder / 'ids.npy'}", "--sequence-length", 40)
    assert moekern(*calibrate, "--out", folder / "s.safetensors").returncode == 0
    assert moekern("plan", folder / "s.safetensors", "--keep", 4, "--out", folder / "plan.json").returncode == 0
    return folder


def test_the_stages_one_by_one(work: Path, tmp_path: Path) -> None:
    found = document("inspect", work / "model")
    assert (found["num_experts"], found["top_k"], found["n_group"]) == (8, 2, 2)
    assert found["legal_counts"] == [4, 6, 8]
    scores = document("score", work / "s.safetensors", "--criterion", "gate_mass")
    assert [len(s) for s in scores["layers"].values()] == [8, 8, 8]  # type: ignore[attr-defined]
    out = tmp_path / "out"
    assert document("prune", work / "model", work / "plan.json", "--out", out)["experts_after"] == 4
    verdict = document("verify", work / "model", work / "plan.json", out, "--forward")
    assert verdict["good"] is True
    assert verdict["forward"]["max_difference"] < 1e-4  # type: ignore[index]
    data = ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 40)
    losses: Any = document("evaluate", work / "model", *data, work / "plan.json")["losses"]
    alone: Any = document("evaluate", out, *data)["losses"]
    on_the_fly, pruned = losses[str(work / "plan.json")]["a"], alone["original"]["a"]
    assert on_the_fly["tokens"] == pruned["tokens"] == 585
    assert abs(on_the_fly["nll"] - pruned["nll"]) < 1e-5 < abs(losses["original"]["a"]["nll"] - pruned["nll"])


def test_merged_statistics_are_the_sum(work: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other.safetensors", tmp_path / "sum.safetensors"
    data = ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 30, "--tokens", 300)
    assert moekern("calibrate", work / "model", *data, "--out", other).returncode == 0
    assert document("merge", work / "s.safetensors", other, "--out", out)["tokens"] == {"a": 900}
    assert int(Statistics.load(out).layer("1").count.sum()) == 1800


@pytest.mark.parametrize(("options", "backend"), [((), "native"), (("--backend", "reference"), "reference")])
def test_calibrate_says_which_kernels_it_uses(
    options: tuple[str, ...], backend: str, work: Path, tmp_path: Path
) -> None:
    data = ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 40, "--tokens", 80)
    done = moekern("calibrate", work / "model", *data, "--out", tmp_path / "s.safetensors", "--json", *options)
    ops = ("combine_and_measure", "router_stats", "sort_by_expert")
    notes = [json.loads(line).get("note") for line in done.stderr.splitlines()]
    assert f"kernels: {backend} ({', '.join(ops)})" in notes
    assert json.loads(done.stdout)["runs"][0]["backend"] == dict.fromkeys(ops, backend)


def test_python_m_moekern_is_the_command_line(work: Path) -> None:
    command = [sys.executable, "-m", "moekern", "inspect", str(work / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"moekern: {work / 'nothing'}: no such folder\n"


def test_tables_are_for_people(work: Path) -> None:
    done = moekern("inspect", work / "model")
    assert "deepseek_v3" in done.stdout
    assert "8, 2" in done.stdout
    assert "arXiv:2510.13999" in moekern("criteria").stdout
    assert len(document("criteria")) == len(CRITERIA)


def test_run_uses_what_a_killed_run_left(work: Path, tmp_path: Path) -> None:
    arguments = ("run", work / "model", "--data", f"a={work / 'ids.npy'}", "--sequence-length", 40, "--keep", "50%")
    first = document(*arguments, "--out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    stamp = Path(str(first["statistics"])).stat().st_mtime_ns
    again = moekern(*arguments, "--out", tmp_path / "out", "--criterion", "ean")
    assert again.returncode == 0, again.stderr
    assert "using the statistics of an earlier run" in again.stderr
    assert Path(str(first["statistics"])).stat().st_mtime_ns == stamp
    shutil.rmtree(tmp_path / "out")
    other = moekern(*arguments, "--out", tmp_path / "out", "--seed", 5)
    assert other.returncode == 2
    assert "another text" in other.stderr
    anew = moekern(*arguments, "--out", tmp_path / "out", "--seed", 5, "--restart")
    assert anew.returncode == 0, anew.stderr
    assert "earlier run" not in anew.stderr


def test_a_damaged_result_is_found(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert moekern("prune", work / "model", work / "plan.json", "--out", out).returncode == 0
    shard = max(out.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    done = moekern("verify", work / "model", work / "plan.json", out, "--forward")
    assert done.returncode == 1
    assert "NOT verified" in done.stderr


@pytest.mark.parametrize("what", ["a link to nothing", "something", "in a file"])
@pytest.mark.parametrize(
    "command", ["calibrate", "iterate", "plan", "plans", "merge", "convert", "demo", "run", "prune"]
)
def test_every_target_is_checked_alike_and_first(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, what: str
) -> None:
    """No statistics and no plan is read before: those named here are not there."""
    monkeypatch.setattr(Statistics, "load", lambda path: pytest.fail("statistics were read"))
    data, none = ("--data", f"a={work / 'ids.npy'}"), tmp_path / "none"
    arguments: dict[str, tuple[object, ...]] = {
        "calibrate": ("calibrate", work / "model", *data),
        "iterate": ("iterate", work / "model", *data, "--keep", 4),
        "plan": ("plan", none, "--keep", 4),
        "plans": ("plan", none, "--keep", 4, "--keep", 5),
        "merge": ("merge", none),
        "convert": ("convert", none, "--to", "moekern"),
        "demo": ("demo",),
        "run": ("run", work / "model", *data, "--keep", 4),
        "prune": ("prune", work / "model", work / "plan.json"),
    }
    out, says = tmp_path / "out", "exists already; name a new "
    if what == "a link to nothing":
        out.symlink_to("nowhere")
    elif what == "something" and command not in ("plan", "plans"):  # plans go into a folder that is there
        out.mkdir()
    elif what == "something":
        out.touch()
    else:
        (tmp_path / "file").touch()
        out, says = tmp_path / "file" / "out", f"{tmp_path / 'file'} is no folder; name another place"
    before = contents(tmp_path)
    done = moekern(*arguments[command], "--out", out)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"moekern: --out {out}: {says}")
    assert len(done.stderr.strip().splitlines()) == 1
    assert contents(tmp_path) == before


class Wrong:
    """A copy of the model to spoil, and a place where nothing may appear."""

    def __init__(self, work: Path, folder: Path) -> None:
        self.work, self.folder, self.model = work, folder, folder / "model"
        shutil.copytree(work / "model", self.model)
        self.data = f"a={work / 'ids.npy'}"
        self.out = folder / "out"

    def calibrate(self, *more: object) -> tuple[object, ...]:
        return ("calibrate", self.model, "--data", self.data, "--out", self.out, *more)

    def run(self, *more: object) -> tuple[object, ...]:
        return ("run", self.model, "--data", self.data, "--keep", 4, "--out", self.out, *more)

    def prune(self) -> tuple[object, ...]:
        return ("prune", self.model, self.work / "plan.json", "--out", self.out)


def _not_moe(w: Wrong) -> None:
    for shard in w.model.glob("*.safetensors"):
        shard.unlink()
    (w.model / "model.safetensors.index.json").unlink()
    from safetensors.numpy import save_file

    save_file({"model.embed_tokens.weight": np.zeros((96, 32), np.float32)}, w.model / "model.safetensors")


def _no_shard(w: Wrong) -> None:
    min(w.model.glob("*.safetensors")).unlink()


def _truncate(w: Wrong) -> None:
    shard = min(w.model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def _other_model(w: Wrong) -> None:
    shutil.rmtree(w.model)
    families.save("deepseek_v3", w.model, seed=9)


def _corrupt(w: Wrong) -> Path:
    bad = w.folder / "bad.safetensors"
    bad.write_bytes((w.work / "s.safetensors").read_bytes()[:-50])
    return bad


def _empty(w: Wrong) -> None:
    (w.folder / "empty.txt").write_text("\n")
    w.data = f"a={w.folder / 'empty.txt'}"


def _high(w: Wrong) -> None:
    np.save(w.folder / "high.npy", np.arange(90, 120))
    w.data = f"a={w.folder / 'high.npy'}"


def _exists(w: Wrong) -> None:
    w.out.mkdir()


def _linked_work(w: Wrong) -> None:
    w.out.with_name(f"{w.out.name}.moekern").symlink_to("elsewhere")


WRONG: dict[str, tuple[Callable[[Wrong], object], Callable[[Wrong], tuple[object, ...]], str]] = {
    "no such folder": (lambda w: shutil.rmtree(w.model), Wrong.run, "no such folder"),
    "not a MoE": (_not_moe, Wrong.run, "not a Mixture-of-Experts"),
    "missing shard": (_no_shard, Wrong.run, "model-00001-of"),
    "missing shard, prune": (_no_shard, Wrong.prune, "model-00001-of"),
    "truncated shard": (_truncate, Wrong.run, "model-00001-of"),
    "truncated shard, prune": (_truncate, Wrong.prune, "model-00001-of"),
    "plan for another model": (_other_model, Wrong.prune, "another model"),
    "keep below top_k": (lambda w: None, lambda w: w.run("--keep", 1), "top_k"),
    "keep not divisible by n_group": (lambda w: None, lambda w: w.run("--keep", 5), "n_group"),
    "keep that is no number": (lambda w: None, lambda w: w.run("--keep", "half"), "--keep half"),
    "keep too large": (lambda w: None, lambda w: w.run("--keep", 9), "more than the 8"),
    "existing output": (_exists, Wrong.run, "exists already"),
    "existing output, prune": (_exists, Wrong.prune, "exist"),
    "a link at the work folder's name": (_linked_work, Wrong.run, "out.moekern: is no folder"),
    "a link at the work folder's name, prune": (_linked_work, Wrong.prune, "out.moekern: is no folder"),
    "empty text": (_empty, Wrong.run, "holds no text"),
    "no such text": (lambda w: setattr(w, "data", "a=/nowhere.txt"), Wrong.run, "no such file"),
    "corrupted statistics": (
        lambda w: None,
        lambda w: ("plan", _corrupt(w), "--keep", 4, "--out", w.out),
        "bad.safetensors",
    ),
    "one file merged twice": (
        lambda w: None,
        lambda w: ("merge", w.work / "s.safetensors", w.work / "s.safetensors", "--out", w.out),
        "given twice",
    ),
    "one plan evaluated twice": (
        lambda w: None,
        lambda w: ("evaluate", w.model, "--data", w.data, w.work / "plan.json", w.work / "plan.json"),
        "evaluate: the same file is named twice",
    ),
    "unknown criterion": (lambda w: None, lambda w: w.run("--criterion", "best"), "unknown"),
    "unknown device": (lambda w: None, lambda w: w.calibrate("--device", "gpu9"), "--device gpu9"),
    "unknown backend": (lambda w: None, lambda w: w.calibrate("--backend", "magic"), "magic"),
    "vocabulary": (
        lambda w: (
            np.save(w.folder / "high.npy", np.arange(90, 120)),
            setattr(w, "data", f"a={w.folder / 'high.npy'}"),
        ),
        Wrong.run,
        "vocabulary of 96",
    ),
    "a plan that is none": (
        lambda w: (w.folder / "p.json").write_text("{}"),
        lambda w: ("prune", w.model, w.folder / "p.json", "--out", w.out),
        "p.json",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_and_writes_nothing(case: str, work: Path, tmp_path: Path) -> None:
    wrong = Wrong(work, tmp_path)
    spoil, command, message = WRONG[case]
    spoil(wrong)
    arguments = command(wrong)
    before = contents(tmp_path)
    done = moekern(*arguments)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("moekern: ")
    assert message in lines[0]
    assert contents(tmp_path) == before
    assert done.stdout == ""

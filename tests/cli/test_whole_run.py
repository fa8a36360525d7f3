"""`run`: what it says of the text and of the result, several counts at once, and what is asked for beside a share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from moekern.checkpoint.folder import open_checkpoint
from moekern.model.compute import Compute
from tests.helpers.commands import contents, document, model_and_ids, moekern


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and token ids."""
    return model_and_ids(tmp_path_factory.mktemp("run"), 4000)


def run(work: Path, *more: object) -> tuple[object, ...]:
    data = ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 40, "--no-forward")
    return ("run", work / "model", *data, *more)


def test_a_run_says_how_good_the_result_is_and_how_it_is_served(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = moekern(*run(work, "--keep", 4, "--out", out))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith(f"{Compute().described}, in float32, up to ")
    assert "how well the text covers the experts" in done.stdout
    assert "verified: the bytes are right" in done.stderr
    # Of ten sequences of 40 tokens, each predicts one token less than it has.
    assert "390 tokens of the same text, held back from calibration" in done.stderr
    assert f"serve with vllm: vllm serve {out}" in done.stderr
    held = json.loads((tmp_path / "new" / "out.moekern" / "quality.json").read_text())
    assert held["made_from"]["tokens"] == {"a": 400}
    assert yaml.safe_load((out / "moekern_recipe.yaml").read_text())["sequence_length"] == 40
    card = ("card", out, "--evaluation", tmp_path / "new" / "out.moekern" / "quality.json")
    assert "does not tell which model" not in moekern(*card).stderr


def test_the_losses_are_of_what_calibration_has_not_seen_and_are_kept(work: Path, tmp_path: Path) -> None:
    found = document(*run(work, "--keep", 4, "--out", tmp_path / "out"))
    (name,) = found["quality"].keys() - {"original"}  # type: ignore[attr-defined]
    assert name == str(tmp_path / "out")
    assert found["coverage"]["a"]["tokens"] == 3600  # type: ignore[index]
    again = document(*run(work, "--keep", 4, "--out", tmp_path / "out"))
    assert again["quality"] == found["quality"]
    kept = tmp_path / "out.moekern" / "quality.json"
    kept.write_text("{")
    done = moekern(*run(work, "--keep", 4, "--out", tmp_path / "out"))
    assert done.returncode == 2
    assert f"moekern: {kept}: not valid JSON" in done.stderr
    shutil.rmtree(tmp_path / "out")
    assert moekern(*run(work, "--keep", 4, "--out", tmp_path / "out", "--restart")).returncode == 0


def test_without_quality_nothing_is_held_back(work: Path, tmp_path: Path) -> None:
    found = document(*run(work, "--keep", 4, "--no-quality", "--out", tmp_path / "out"))
    assert found["quality"] is None
    assert found["coverage"]["a"]["tokens"] == 4000  # type: ignore[index]


def test_too_little_text_is_a_warning(work: Path, tmp_path: Path) -> None:
    done = moekern(*run(work, "--keep", 4, "--tokens", 10, "--out", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    early, late = (
        done.stderr.index(f"warning: too little text: {words}") for words in ("10 tokens", "32 of 32 experts")
    )
    assert early < done.stderr.index("kernels: ") < late
    assert "quality: not measured (no domain has the 4 sequences" in done.stderr


def test_several_counts_come_of_one_calibration(work: Path, tmp_path: Path) -> None:
    done = moekern(*run(work, "--keep", "0.5", "--keep", 6, "--out", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("kernels: ") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out-0.5", "out-6", "out.moekern"}
    assert moekern(*run(work, "--keep", 4, "--out", tmp_path / "one")).returncode == 0
    one, half = contents(tmp_path / "one"), contents(tmp_path / "out-0.5")
    assert all(one[name] == half[name] for name in one if name.endswith(".safetensors"))


def test_what_plan_takes_run_takes(work: Path, tmp_path: Path) -> None:
    limit = open_checkpoint(work / "model").nbytes - 1
    more = ("--fit", f"{limit}B", "--reserve", 0, "--target", "sglang:ep=4", "--tier", "dimensions", "--domain", "a")
    command = run(work, *more, "--copy", "stream", "--no-quality", "--out", tmp_path / "out")
    assert "limit " in moekern(*command).stderr
    found = document(*command)  # goes on with what is there
    assert found["pruned"]["experts_after"] == 4  # type: ignore[index]
    assert found["pruned"]["copy"] == "stream"  # type: ignore[index]
    assert found["serve"].keys() == {"sglang:ep=4"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("more", "times"), [(("--keep", 6), 1), (("--keep", 5, "--keep", 6), 2), (("--fit", "1GiB", "--bits", 4), 0)]
)
def test_counts_that_an_engine_runs_slower_are_told_before_anything_is_measured(
    work: Path, tmp_path: Path, more: tuple[object, ...], times: int
) -> None:
    done = moekern(*run(work, *more, "--target", "vllm", "--no-quality", "--out", tmp_path / "o"))
    assert done.returncode == 0, done.stderr
    before, _, after = done.stderr.partition("kernels: ")
    words = "vllm: its fused top-k kernel is made for"
    assert (before.count(words), after.count(words)) == (times, 0)
    assert before.count("nearest count without this: 4 or 8") == times


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "--keep, --fit: give one of the two"),
        (("--keep", 4, "--fit", "1GiB"), "--keep, --fit: give one of the two"),
        (("--keep", 4, "--keep", 4), "the same is given twice"),
        (("--keep", "0.5", "--keep", "0.50000001"), "the same is given twice"),
        (("--keep", 4, "--bits", 4), "go with --fit"),
        (("--keep", 6, "--target", "sglang:ep=4"), "experts must be a multiple of ep=4"),
        (("--keep", 4, "--target", "sglangg"), "did you mean sglang?"),
        (("--keep", 4, "--tier", "dimension"), "did you mean dimensions?"),
        (("--keep", 4, "--criterion", "gated_nrom"), "did you mean gated_norm?"),
        (("--keep", 4, "--dtype", "bf15"), "did you mean bf16?"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    work: Path, tmp_path: Path, more: tuple[object, ...], says: str
) -> None:
    done = moekern(*run(work, *more, "--out", tmp_path / "out"))
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []

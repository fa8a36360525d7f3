"""A git-lfs pointer where a file should be is named as such, whatever the file is."""

from pathlib import Path

import pytest

from moekern.checkpoint.pointers import A_POINTER, is_pointer
from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from tests.helpers.commands import moekern
from tests.helpers.synthetic import qwen3, write

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))})


@pytest.mark.parametrize(
    "name",
    [
        "model-00002-of-00002.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer.model", "hf_quant_config.json", "README.md", "assets/figure.png",
    ],
)  # fmt: skip
def test_a_pointer_in_a_checkpoint(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "in", *qwen3())
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes(POINTER)
    with pytest.raises(InputError, match=f"{name}.*: {A_POINTER[:20]}"):
        prune(source, PLAN, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_run_knows_before_it_calibrates(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *qwen3())
    (source / "figure.png").write_bytes(POINTER)
    done = moekern("inspect", source)
    assert f"'figure.png': {A_POINTER}" in " ".join(done.stderr.split())
    (tmp_path / "text.npy").write_bytes(b"")  # is not looked at
    done = moekern("run", source, "--data", tmp_path / "text.npy", "--keep", "0.5", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert f"'figure.png': {A_POINTER}" in " ".join(done.stderr.split())


def test_a_pointer_in_the_place_of_a_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(POINTER)
    with pytest.raises(InputError, match=A_POINTER[:20]):
        Plan.load(tmp_path / "plan.json")


def test_a_pointer_that_no_index_names_is_left_out_as_such(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *qwen3())
    (source / "mtp.safetensors").write_bytes(POINTER)
    assert prune(source, PLAN, tmp_path / "out").left_out == {"mtp.safetensors": A_POINTER}


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.npy"])
def test_pointers_of_text_and_of_a_tokenizer(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "in", *qwen3())
    (tmp_path / name).write_bytes(POINTER)
    done = moekern("calibrate", source, "--data", tmp_path / name, "--out", tmp_path / "s")
    assert done.returncode == 2
    assert f"{name}: {A_POINTER}" in " ".join(done.stderr.split())
    (tmp_path / "plain.txt").write_text("text")
    (source / "tokenizer.json").write_bytes(POINTER)
    done = moekern("calibrate", source, "--data", tmp_path / "plain.txt", "--out", tmp_path / "s")
    assert done.returncode == 2
    assert f"tokenizer.json: {A_POINTER}" in " ".join(done.stderr.split())


def test_what_only_speaks_of_one_is_none(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_bytes(b"# On " + POINTER)
    (tmp_path / "long.md").write_bytes(POINTER + b"x" * 2000)
    assert not any(is_pointer(tmp_path / name) for name in ("notes.md", "long.md", "none", "."))

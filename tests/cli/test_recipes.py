"""`run --recipe` does again what `run` has done, to the byte, and takes nothing beside the recipe that it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moekern.checkpoint.folder import open_checkpoint
from moekern.cli.recipes import written_recipe
from moekern.data.batches import TokenData
from moekern.demo import MODEL, TEXT
from moekern.files import work_path
from moekern.model.compute import Compute
from moekern.recipe import FORMAT, Recipe
from tests.helpers.commands import Done, moekern
from tests.helpers.synthetic import qwen3, tree, write

RECIPE = "moekern_recipe.yaml"
LITTLE = ("--data", "a=book.txt", "--tokens", 1200, "--sequence-length", 64, "--seed", 3, "--no-forward")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with text in it."""
    monkeypatch.chdir(tmp_path)
    text = "".join(path.read_text()[:3000] for path in sorted((TEXT / "c").iterdir())[:3])
    Path("book.txt").write_text(text)
    return tmp_path


def again(*arguments: object) -> Done:
    return moekern("run", "--recipe", "r.yaml", "--no-forward", *arguments)


@pytest.mark.whole  # one count without a refit is the other test's
def test_the_same_bytes_again_of_two_counts_and_a_refit(made: Path) -> None:
    done = moekern(
        "run", MODEL, *LITTLE, "--keep", "0.5", "--keep", 6, "--refit", "--criterion", "reap", "--out", "one"
    )
    assert done.returncode == 0, done.stderr
    Path("r.yaml").write_bytes(Path("one-6", RECIPE).read_bytes())
    done = again(MODEL, "--out", "two")
    assert done.returncode == 0, done.stderr
    for count in ("0.5", "6"):
        assert tree(Path(f"one-{count}")) == tree(Path(f"two-{count}"))


def test_the_same_bytes_again_and_no_flags_beside_it(made: Path) -> None:
    done = moekern("run", MODEL, *LITTLE, "--keep", "0.5", "--criterion", "reap", "--no-quality", "--out", "one")
    assert done.returncode == 0, done.stderr
    Path("r.yaml").write_bytes(Path("one", RECIPE).read_bytes())
    recipe = yaml.safe_load(Path("r.yaml").read_text())
    assert (recipe["keep"], recipe["criterion"], recipe["quality"], recipe["tokens"]) == (
        ["0.5"],
        "reap",
        False,
        "1200",
    )
    for words, line in (
        (("--keep", 4), "moekern: --keep: the recipe says ['0.5'] (keep); change it in a copy"),
        (("--tokens", 1300), "--tokens: the recipe says"),
        (("--quality",), "--quality: the recipe says False"),
        (("--allow-nonuniform",), "--allow-nonuniform: the recipe says False"),
        (("--device", "nowhere"), "--device nowhere"),
    ):
        refused = again("--out", "no", *words)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert line in refused.stderr
    for change, line in (
        ({"fingerprint": "0" * 64}, "is another model than the recipe's"),
        ({"seed": 4}, "--data a: its tokens are not those that the recipe was written with"),
        ({"criterion": "evil.py:score"}, "criterion evil.py:score is code, which a recipe alone does not start"),
        ({"candidate": ["evil.py:score"]}, "give the same --candidate too"),
        ({"criterion": "reapp"}, "--criterion reapp: unknown"),
        ({"dtype": "fp17"}, "--dtype fp17"),
    ):
        Path("r.yaml").write_text(yaml.safe_dump(recipe | change))
        typed = ("--criterion", "reap") if "candidate" in change else ()
        refused = again("--out", "no", *typed)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert line in refused.stderr
    assert not Path("no").exists()
    Path("r.yaml").write_bytes(Path("one", RECIPE).read_bytes())
    done = again("--seed", 3, MODEL, "--out", "two")
    assert done.returncode == 0, done.stderr
    assert tree(Path("one")) == tree(Path("two"))
    plans = [work_path(Path(name)) / "plan.json" for name in ("one", "two")]
    assert plans[0].read_bytes() == plans[1].read_bytes()


def test_a_model_of_the_hub_is_named_by_id_and_commit(tmp_path: Path) -> None:
    commit = "c0ffee" * 6 + "c0ff"
    checkpoint = open_checkpoint(write(tmp_path / f"models--some--model/snapshots/{commit}", *qwen3()))
    data = TokenData((), {"sources": {"a": {"ids_sha256": "5" * 64}}})
    compute = Compute("cpu", "float32")
    recipe = Recipe(format=FORMAT, model="some/model", revision="main", dtype="auto", device="auto")
    found = yaml.safe_load(str(written_recipe(recipe, checkpoint, data, compute)))
    assert found == {
        "format": FORMAT, "model": "some/model", "revision": commit, "fingerprint": checkpoint.fingerprint,
        "ids_sha256": {"a": "5" * 64}, "dtype": "float32", "device": "cpu",
    }  # fmt: skip

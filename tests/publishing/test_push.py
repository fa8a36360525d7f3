"""What goes to the hub is a finished pruned checkpoint with a right card, to a private repository unless asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.publishing.card import About
from moekern.publishing.push import checked, upload
from moekern.publishing.rewritten import rewrite_card
from tests.helpers.commands import moekern
from tests.helpers.synthetic import qwen3, write

PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))})
RECIPE = "format: moekern.recipe/1\nmodel: /home/me/model\ndata: [a=~/book.txt, b=org/set, c=here.txt]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = write(tmp_path / "in", *qwen3(), shards=2)
    (source / "tokenizer.json").write_text("{}")
    prune(source, PLAN, tmp_path / "out", about=About(recipe=RECIPE))
    rewrite_card(tmp_path / "out", base="some/model")
    return tmp_path / "out"


class FakeApi:
    """The hub as far as push asks it: what was asked stands in `asked`."""

    def __init__(self, private: bool | None = True, error: Exception | None = None) -> None:
        self.private, self.error, self.asked = private, error, list[Any]()

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        self.asked.append(("create", name, private))
        assert exist_ok

    def model_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.private)

    def create_commit(self, name: str, operations: list[Any], commit_message: str) -> Any:
        if self.error is not None:
            raise self.error
        self.asked.append({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})
        return SimpleNamespace(commit_url=f"https://hub/{name}/commit/1")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    api = FakeApi()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    return api


def test_a_dry_run_lists_the_files_and_asks_nothing(folder: Path, fake: FakeApi) -> None:
    done = moekern("push", folder, "some/one", "--dry-run", "--json")
    found = json.loads(done.stdout)
    names = sorted(path.name for path in folder.iterdir())
    assert found["files"] == {name: (folder / name).stat().st_size for name in names}
    assert (found["bytes"], found["private"], found["commit"]) == (sum(found["files"].values()), True, None)
    assert fake.asked == []
    assert "names a place on this machine, '/home/me/model'" in done.stderr
    assert "'a=~/book.txt'" in done.stderr
    assert "here.txt" not in done.stderr


def test_every_file_is_uploaded_to_a_private_repository(folder: Path, fake: FakeApi) -> None:
    done = moekern("push", folder, "some/one")
    assert (done.returncode, "uploaded: https://hub/some/one/commit/1" in done.stderr) == (0, True)
    assert fake.asked == [("create", "some/one", True), {path.name: path.read_bytes() for path in folder.iterdir()}]


def test_a_public_repository_is_asked_for_by_flag(folder: Path, fake: FakeApi) -> None:
    fake.private = False
    with pytest.raises(InputError, match="some/one: is public on the hub; give --public"):
        upload(checked(folder, "some/one"), public=False)
    assert fake.asked == [("create", "some/one", True)]
    assert moekern("push", folder, "some/one", "--public").returncode == 0
    fake.private, told = True, list[str]()
    upload(checked(folder, "some/one"), public=True, tell=told.append)
    assert told == ["some/one: is private on the hub, and stays so; its settings there change that"]


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (HfHubHTTPError("no", response=answer(403)), "the hub does not let you write there: `hf auth login`"),
        (HfHubHTTPError("no", response=answer(503)), "the hub answers 503"),
        (OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("gone"), "not uploaded (gone); the same command tries again"),
    ],
)
def test_what_the_hub_says_is_one_line(folder: Path, fake: FakeApi, error: Exception, line: str) -> None:
    fake.error = error
    done = moekern("push", folder, "some/one")
    assert (done.returncode, done.stdout) == (2, "")
    assert line in done.stderr.splitlines()[-1]


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def in_card(old: str, new: str) -> Callable[[Path], object]:
    return edit("README.md", lambda text: text.replace(old, new, 1))


def in_manifest(old: str, new: str) -> Callable[[Path], object]:
    return edit("moekern_manifest.jsonl", lambda text: text.replace(old, new))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no plan": (lambda f: (f / "moekern_plan.json").unlink(), "moekern_plan.json: no such file; name the folder"),
    "no manifest": (lambda f: (f / "moekern_manifest.jsonl").unlink(), "moekern_manifest.jsonl: no such file"),
    "a shard is missing": (lambda f: next(f.glob("*.safetensors")).unlink(), ".safetensors"),
    "a line is missing": (
        edit("moekern_manifest.jsonl", lambda text: text.splitlines(keepends=True)[0]), "not one for each shard",
    ),
    "another size": (in_manifest('"size": ', '"size": 1'), "another size"),
    "another plan": (in_manifest(PLAN.digest, "0" * 64), "another plan"),
    "no card": (lambda f: (f / "README.md").unlink(), "README.md: no such file"),
    "no base": (in_card("base_model:", "base:"), "base_model is missing: `moekern card"),
    "an odd base": (in_card("some/model", "[a/b, 3]"), "is ['a/b', 3], and no id of the hub"),
    "a card without front matter": (edit("README.md", lambda text: text.split("---\n")[2]), "base_model is missing"),
    "front matter that is none": (in_card("tags:", "tags: ["), "front matter: "),
    "a card of another": (in_card(PLAN.digest, ""), "does not name the plan"),
    "a link": (lambda f: (f / "more.json").symlink_to("/etc/passwd"), "a link out of the checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_finished_or_not_right_is_refused(folder: Path, fake: FakeApi, what: str) -> None:
    act, line = BROKEN[what]
    act(folder)
    done = moekern("push", folder, "some/one")
    assert (done.returncode, done.stdout, fake.asked) == (2, "", [])
    assert line in done.stderr


def test_names_folders_and_originals_that_are_none(folder: Path, tmp_path: Path) -> None:
    for place, name, line in (
        (folder, "one", "one: expected OWNER/NAME"),
        (folder, "a/b/c", "expected OWNER/NAME"),
        (tmp_path / "none", "a/b", "no such folder"),
        (tmp_path / "in", "a/b", "name the folder of a checkpoint that moekern has pruned"),
    ):
        with pytest.raises(InputError, match=line):
            checked(place, name)
    prune(tmp_path / "in", PLAN, tmp_path / "bare", checksum="none")
    rewrite_card(tmp_path / "bare", base="a/b")
    assert any("have no checksum" in note for note in checked(tmp_path / "bare", "a/b").notes)

"""Names of models: folders, hub ids, and one line for each thing that a hub may answer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from moekern.checkpoint.hub import Repository, find_model
from moekern.errors import InputError
from tests.helpers import faulty
from tests.helpers.hub import COMMIT, Hub, client, serving

ID = "someone/tiny-moe"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faulty.checkpoint(tmp_path_factory.mktemp("hub") / "source", shards=2, layers=1, rows=64, embedding=64)


@pytest.fixture
def hub(source: Path, tmp_path: Path) -> Iterator[Hub]:
    with serving() as served, client(served, tmp_path / "home"):
        served.add(ID, source)
        yield served


def found(name: str = ID, revision: str | None = None) -> Path | Repository:
    return find_model(name, revision, lambda line: None)


def refused(name: str = ID, revision: str | None = None) -> str:
    with pytest.raises(InputError) as error:
        found(name, revision)
    return str(error.value)


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ID).mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert found() == Path(ID)
    assert "only a hub id has revisions" in refused(ID, "main")
    assert "is a file" in refused("file")
    assert refused("./someone/other") == "./someone/other: no such folder"


def test_a_hub_id_is_a_commit_with_its_files(hub: Hub, source: Path) -> None:
    repository = found()
    assert isinstance(repository, Repository)
    assert (repository.id, repository.commit) == (ID, COMMIT)
    assert repository.sizes["config.json"] == (source / "config.json").stat().st_size
    hub.down = 503
    assert found(ID, COMMIT) == repository  # of which no more need be asked


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, source: Path) -> None:
    other = "beef" * 10
    hub.add(ID, source, other, "refs/pr/1")
    for revision in ("refs/pr/1", other):
        repository = found(ID, revision)
        assert isinstance(repository, Repository)
        assert repository.commit == other
    assert refused(ID, "v9") == f"--revision v9: {ID} has no such branch, tag or commit on the hub"


def test_a_name_without_its_owner(hub: Hub, source: Path) -> None:
    hub.add("else/tiny-moe-base", source)
    assert refused("tiny-moe") == f"tiny-moe: no such folder; did you mean {ID}?"
    assert refused("small-moe") == "small-moe: no such folder; a model of the hub is named OWNER/NAME"
    assert refused("nobody/tiny-moe").endswith(f"; did you mean {ID}?")
    hub.down = 503
    assert refused("tiny-moe").endswith("OWNER/NAME")


@pytest.mark.parametrize(("status", "words"), [(401, "hf auth login"), (403, "answers 403"), (503, "answers 503")])
def test_a_hub_that_says_no(hub: Hub, status: int, words: str) -> None:
    hub.down = status
    line = refused()
    assert line.startswith(f"{ID}: ")
    assert words in line


def test_a_repository_that_is_not_there(hub: Hub) -> None:
    line = refused("someone/nothing")
    assert "no such repository" in line
    assert "hf auth login" in line


def test_a_hub_that_is_away(hub: Hub, tmp_path: Path) -> None:
    with client(Hub(url="http://127.0.0.1:9"), tmp_path / "other"):
        assert "check the network" in refused()
    with client(hub, tmp_path / "other") as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in refused()


def test_what_is_in_the_cache_serves_when_the_hub_is_away(hub: Hub, tmp_path: Path) -> None:
    repository, told = found(), []
    hub.down = 503
    assert find_model(ID, None, told.append) == repository
    assert COMMIT[:12] in told[0]
    assert "answers 503" in refused(ID, "other")
    hub.down = 0
    snapshot = Path(snapshot_download(ID))
    hub.down = 503
    assert found() == snapshot
    shard = next(snapshot.glob("*.safetensors"))
    shard.unlink()
    assert found() == repository
    shutil.rmtree(tmp_path / "home" / "moekern")
    assert found() == snapshot  # whose folder then says what it lacks

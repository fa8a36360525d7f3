"""Headers by range requests, and downloads: how many bytes come, and what is refused before any do."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from moekern.checkpoint import remote
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.checkpoint.hub import Repository, find_model
from moekern.errors import InputError
from tests.helpers import faulty
from tests.helpers.bad_files import entry, raw, single
from tests.helpers.hub import COMMIT, Hub, client, serving

ID = "someone/tiny-moe"
SHARDS = 3
OTHERS = {
    "original/model.safetensors", "metal/model.bin", "consolidated.safetensors", "consolidated.safetensors.index.json",
    "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "model.gguf", "onnx/model.onnx",
    "original/dtypes.json", "fp8/model.safetensors", "fp8/model.safetensors.index.json", "a/b/x.gguf", "params.json",
    "adapter_model.safetensors", "adapter_config.json", "lora/adapter_config.json", "onnx/config.json",
}  # fmt: skip

MORE = {"encoding/encode.py", "inference/configs/a.json", "tekken.json", "vocab.bpe", "modeling_x.py", "LICENSE"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "source"
    faulty.checkpoint(folder, shards=SHARDS, layers=2, rows=600, embedding=60000)
    for name in (*OTHERS, *MORE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"a second copy" * 100)
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path) -> Iterator[Hub]:
    with serving() as served, client(served, tmp_path / "home"):
        served.add(ID, source)
        yield served


@contextmanager
def quiet(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def repository() -> Repository:
    found = find_model(ID, None, lambda line: None)
    assert isinstance(found, Repository)
    return found


def headers() -> Checkpoint:
    return remote.headers_of(repository(), quiet)


def downloaded(tell: Callable[[str], None] = lambda line: None) -> Path:
    return remote.download(repository(), headers(), None, tell, quiet)


def test_headers_are_those_of_the_folder_and_no_weight_is_sent(hub: Hub, source: Path) -> None:
    found, whole = headers(), open_checkpoint(source)
    lengths = sum(shard.data_start for shard in whole.shards)
    assert hub.sent(".safetensors") == lengths
    assert (found.config, found.index, found.tensors) == (whole.config, whole.index, whole.tensors)
    assert found.name == f"{ID}@{COMMIT}"
    assert found.fingerprint == whole.fingerprint
    assert lengths < hub.sent(".safetensors") <= lengths + 64 * 4096 < whole.nbytes / 2
    with pytest.raises(InputError, match="only headers were read"):
        found.read(next(iter(found.tensors)))


def test_the_second_command_asks_for_no_file(hub: Hub) -> None:
    first = headers().fingerprint
    hub.forget()
    assert headers().fingerprint == first
    assert hub.sent() == 0
    hub.down = 503
    assert headers().fingerprint == first


def test_parts_that_begin_at_once_read_it_together(hub: Hub, source: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = [each.result() for each in [pool.submit(lambda: headers().fingerprint) for _ in range(6)]]
    assert set(found) == {open_checkpoint(source).fingerprint}


def test_what_is_kept_of_a_shard_is_no_shard(hub: Hub) -> None:
    kept = headers().folder
    with pytest.raises(InputError, match="truncated"):
        open_checkpoint(kept)


@pytest.mark.parametrize("what", ["a link to nothing", "a pipe", "half a header", "other samples", "half a list"])
def test_what_was_spoiled_in_the_cache_is_read_again_or_named(hub: Hub, tmp_path: Path, what: str) -> None:
    right, folder, elsewhere = headers().fingerprint, repository().folder, tmp_path / "elsewhere"
    shard = sorted(folder.glob("*.safetensors"))[-1]
    if what == "other samples":
        samples = repository().beside(".samples")
        samples.write_bytes(bytes(samples.stat().st_size))
        assert headers().fingerprint == right
        return
    if what == "half a list":
        listing = repository().beside(".json")
        os.truncate(listing, listing.stat().st_size // 2)
        hub.down = 503
        with pytest.raises(InputError, match=re.escape(f"{listing}: not a list of files with their sizes; remove it")):
            repository()
        return
    if what == "half a header":
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        shard.unlink()
    if what == "a link to nothing":
        shard.symlink_to(elsewhere)
    elif what == "a pipe":
        os.mkfifo(shard)
    says = f"remove {folder} to ask the hub again" if what == "half a header" else f"{shard}: a link, pipe or other"
    with pytest.raises(InputError, match=re.escape(says)):
        headers()
    assert not elsewhere.exists()


def test_headers_that_were_broken_off_go_on(hub: Hub) -> None:
    name = f"model-00002-of-{SHARDS:05d}.safetensors"
    hub.cut[name] = 3  # once: the same is asked for again
    assert headers().fingerprint
    assert sum(each.path.endswith(name) and each.sent == 3 for each in hub.answers) == 1


def test_a_server_that_sends_whole_files(hub: Hub, source: Path) -> None:
    hub.ranges = False
    assert headers().fingerprint == open_checkpoint(source).fingerprint


def test_a_hostile_header_is_refused_as_in_a_folder(hub: Hub, tmp_path: Path) -> None:
    folder = single(tmp_path / "bad", raw({"x": entry(0, 99, "F32", [4])}, b"\0" * 16))
    hub.add(ID, folder, "bad0" * 10)
    with pytest.raises(InputError, match="takes 16 bytes, data_offsets give 99"):
        headers()
    (folder / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{")
    hub.add(ID, folder, "bad1" * 10)
    with pytest.raises(InputError, match="more than the limit"):
        headers()


def test_a_file_that_leads_elsewhere(hub: Hub) -> None:
    good = repository()
    for name in ("../../x.json", "/etc/x.json", "a//b", "x\n.json"):
        with pytest.raises(InputError, match="a name that leads elsewhere"):
            remote.headers_of(Repository(ID, COMMIT, {**good.sizes, name: 1}), quiet)


@pytest.mark.parametrize("name", ["../../outside.safetensors", "sub/model.safetensors"])
def test_an_index_names_files_of_the_repository_alone(hub: Hub, source: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(source, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add(ID, folder, "bad2" * 10)
    with pytest.raises(InputError, match="not a file of this folder"):
        headers()


def test_a_repository_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "other" / "pytorch_model.bin").touch()
    hub.add(ID, tmp_path / "other", "bad3" * 10)
    with pytest.raises(InputError, match="is a pickle, which is never read"):
        headers()


def test_a_repository_without_a_config(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.gguf").touch()
    hub.add(ID, tmp_path / "other", "bad4" * 10)
    with pytest.raises(InputError, match="holds no config.json"):
        headers()


def test_what_was_downloaded_before_is_not_asked_for(hub: Hub, source: Path, tmp_path: Path) -> None:
    folder = downloaded()
    (folder / "tokenizer.json").resolve().unlink()
    (folder / "tokenizer.json").unlink()
    shutil.rmtree(tmp_path / "home" / "moekern")  # as if another program had
    hub.forget()
    assert headers().fingerprint == open_checkpoint(source).fingerprint
    assert hub.sent() == 0
    assert downloaded() == folder
    assert hub.sent() == hub.sent("tokenizer.json") > 0


def test_a_gated_repository_says_what_to_do(hub: Hub) -> None:
    hub.gated.add(ID)
    with pytest.raises(InputError, match=f"{ID}: is gated: accept its terms .*hf auth login"):
        headers()


def test_a_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(ID)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert headers().fingerprint
    assert downloaded()
    assert hub.tokens_elsewhere == 0


def test_a_download_is_the_model_alone(hub: Hub, source: Path) -> None:
    told: list[str] = []
    folder = downloaded(told.append)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()} - OTHERS
    assert {"additional_chat_templates/tool.jinja", *MORE} <= names
    assert "to download in" in told[0]
    assert open_checkpoint(folder).fingerprint == open_checkpoint(source).fingerprint
    hub.down = 503
    assert find_model(ID, None, told.append) == folder  # its revision is known to the cache


def test_a_download_goes_on_where_it_was(hub: Hub, source: Path) -> None:
    folder = downloaded()
    one = f"model-00001-of-{SHARDS:05d}.safetensors"
    (folder / one).resolve().unlink()
    (folder / one).unlink()
    hub.forget()
    assert downloaded() == folder
    assert hub.sent() == hub.sent(one) == (source / one).stat().st_size


def test_a_connection_that_breaks_is_taken_up_again(hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    checkpoint, one = headers(), f"model-00001-of-{SHARDS:05d}.safetensors"
    hub.forget()
    hub.cut[one] = 10000
    folder = remote.download(repository(), checkpoint, None, lambda line: None, quiet)
    assert (folder / one).read_bytes() == (source / one).read_bytes()
    assert hub.sent(one) == (source / one).stat().st_size  # the rest, not the whole once more


def test_a_download_that_does_not_fit_is_refused_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = headers()
    hub.forget()
    usage = shutil._ntuple_diskusage(10 << 30, 9 << 30, (1 << 30) + 1000)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"to download in .* free in .*set HF_HOME"):
        remote.download(repository(), checkpoint, None, lambda line: None, quiet)
    assert hub.sent(".safetensors") == 0


def test_progress_counts_the_bytes(hub: Hub) -> None:
    seen: list[tuple[str, int, int]] = []

    @contextmanager
    def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: seen.append((unit, done, total))

    checkpoint = remote.headers_of(repository(), progress)
    assert seen == [("files", n, SHARDS) for n in range(1, SHARDS + 1)]
    seen.clear()
    remote.headers_of(repository(), progress)
    assert seen == []  # all of them are kept
    folder = remote.download(repository(), checkpoint, None, lambda line: None, progress)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "config.json")
    assert seen[-1] == ("bytes", total, total)
    assert str(folder).startswith(constants.HF_HUB_CACHE)

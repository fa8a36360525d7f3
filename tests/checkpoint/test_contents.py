"""What of a model folder belongs to the model, what is left out, and what is refused."""

import os
from pathlib import Path

import pytest

from moekern.checkpoint.contents import AN_ADAPTER, ANOTHER_FORM, contents, lines_left_out
from moekern.errors import InputError

SHARD = "model.safetensors"


def filled(folder: Path, *names: str) -> Path:
    for name in (SHARD, "config.json", *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_every_file_is_copied_or_named(tmp_path: Path) -> None:
    side = [
        "tokenizer.json", "README.md", "LICENSE", "modeling_x.py", "encoding/encode.py", "encoding/tests/case.json",
        "additional_chat_templates/tool.jinja", "inference/configs/small.json", "processor/preprocessor_config.json",
    ]  # fmt: skip
    left = {
        "original/": "a second copy of the weights", "metal/": "a second copy of the weights", ".cache/": None,
        "pytorch_model.bin": ANOTHER_FORM, "pytorch_model.bin.index.json": ANOTHER_FORM, "a.GGUF": ANOTHER_FORM,
        "params.json": ANOTHER_FORM, "adapter_config.json": AN_ADAPTER, "adapter_model.safetensors": AN_ADAPTER,
        "encoding/vectors.npz": ANOTHER_FORM, "draft/": "a model of its own", "lora/": AN_ADAPTER,
        "encoding/__pycache__/": None,
    }  # fmt: skip
    inside = [
        "original/params.json", "original/x.safetensors", "metal/model.bin", ".cache/x", "draft/config.json",
        "draft/model.safetensors", "lora/adapter_config.json", "encoding/__pycache__/a.pyc",
    ]  # fmt: skip
    folder = filled(tmp_path, *side, *(name for name in left if not name.endswith("/")), *inside)
    found = contents(folder, {SHARD}, {})
    assert found.side == tuple(sorted(side))
    assert found.left_out.keys() == left.keys()
    assert all(reason is None or found.left_out[name] == reason for name, reason in left.items())
    assert not found.refused


def test_a_file_that_is_neither_file_nor_link(tmp_path: Path) -> None:
    os.mkfifo(filled(tmp_path) / "pipe")
    assert contents(tmp_path, {SHARD}, {}).left_out == {"pipe": "not a regular file"}


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, "encoding/encode.py")
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may read anything
        if os.fspath(path).endswith("encoding"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="encoding.*Permission denied"):
        contents(tmp_path, {SHARD}, {})


def test_links(tmp_path: Path) -> None:
    folder = filled(tmp_path / "model", "tokenizer.json", "sub/a.txt")
    (tmp_path / "secret").write_text("s")
    (folder / "inside.json").symlink_to("tokenizer.json")
    (folder / "sub" / "out.json").symlink_to(tmp_path / "secret")
    (folder / "nothing.json").symlink_to("gone")
    (folder / "elsewhere").symlink_to(tmp_path)
    found = contents(folder, {SHARD}, {})
    assert found.side == ("inside.json", "sub/a.txt", "tokenizer.json")
    assert found.left_out == {"elsewhere/": "a link to a folder"}
    assert found.refused["nothing.json"].startswith("a link to nothing")
    assert str(tmp_path / "secret") in found.refused["sub/out.json"]


@pytest.mark.parametrize("blobs", ["models--a--b/blobs", "blobs/ab"], ids=["of the repository", "shared"])
def test_links_into_a_hub_cache(tmp_path: Path, blobs: str) -> None:
    snapshot = filled(tmp_path / "models--a--b" / "snapshots" / "rev")
    (tmp_path / blobs).mkdir(parents=True)
    (tmp_path / blobs / "123").write_text("x")
    (snapshot / "encoding").mkdir()
    (snapshot / "encoding" / "encode.py").symlink_to(os.path.relpath(tmp_path / blobs / "123", snapshot / "encoding"))
    (snapshot / "out.json").symlink_to(filled(tmp_path / "other", "a.json") / "a.json")
    found = contents(snapshot, {SHARD}, {})
    assert found.side == ("encoding/encode.py",)
    assert list(found.refused) == ["out.json"]


def test_a_name_that_cannot_be_printed(tmp_path: Path) -> None:
    (filled(tmp_path) / "a\nb.txt").write_text("x")
    (tmp_path / "c\x1b.bin").write_text("x")
    found = contents(tmp_path, {SHARD}, {})
    assert list(found.refused) == ["a\nb.txt"]
    assert lines_left_out(found.left_out) == f"'c\\x1b.bin' ({ANOTHER_FORM})"


def test_the_line_groups_by_reason_and_stays_short() -> None:
    left = {f"{n:02d}.bin": ANOTHER_FORM for n in range(20)} | {"original/": "a second copy of the weights"}
    line = lines_left_out(left)
    assert line.startswith("00.bin, 01.bin, ")
    assert line.endswith(f"and 13 more ({ANOTHER_FORM}); original/ (a second copy of the weights)")

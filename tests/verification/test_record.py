"""What a pruned checkpoint says of itself is held against source, plan and files."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.verification.tensors import verify
from tests.helpers.synthetic import deepseek_v3, write

PLAN = Plan({"1": LayerPlan((0, 3, 5, 6)), "2": LayerPlan((1, 2, 4, 7))}, {"criterion": "test"})
INDEX, RECORD, MANIFEST = "model.safetensors.index.json", "moekern_plan.json", "moekern_manifest.jsonl"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write(tmp_path / "in", *deepseek_v3())
    (folder / "README.md").write_text("text")
    return folder


def change(path: Path, *keys: Any, to: Any) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.name == MANIFEST else []
    content: Any = lines or json.loads(path.read_text())
    holder = content
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = to
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) or json.dumps(content))


@pytest.mark.parametrize(
    ("file", "keys", "to"),
    [
        (RECORD, ["format"], "moekern.pruned/0"),
        (RECORD, ["fingerprint"], "0" * 64),
        (RECORD, ["mtp"], "other"),
        (RECORD, ["mtp_keep", "3"], [0, 1, 2, 3]),
        (RECORD, ["plan", "layers", "1", "keep"], [0, 1, 2, 3]),
        (RECORD, ["plan", "provenance"], {}),
        (RECORD, ["plan_sha256"], "0" * 64),
        (RECORD, ["source"], {}),
        (MANIFEST, [0, "size"], 1),
        (MANIFEST, [0, "plan"], "0" * 64),
        (MANIFEST, [0, "shard"], "other.safetensors"),
        (MANIFEST, [0, "tensors", "other"], "0" * 32),
        (MANIFEST, [0, "computed"], [1, "other"]),
        (INDEX, ["metadata", "total_parameters"], 1),
        (INDEX, ["metadata", "more"], 1),
        (INDEX, ["metadata"], "text"),
        (INDEX, ["more"], 1),
    ],
)
def test_what_is_not_so_is_named(source: Path, pruned: Path, file: str, keys: list[Any], to: Any) -> None:
    assert verify(source, PLAN, pruned).problems == ()
    change(pruned / file, *keys, to=to)
    assert any(file in problem for problem in verify(source, PLAN, pruned).problems)


@pytest.mark.parametrize("file", [RECORD, MANIFEST, "README.md", "README.original.md", INDEX, "config.json"])
@pytest.mark.parametrize("damage", ["gone", "folder", "pipe", "nested"])
def test_files_that_cannot_be_read(source: Path, pruned: Path, file: str, damage: str) -> None:
    (pruned / file).unlink()
    acts: dict[str, Callable[[Path], object]] = {
        "folder": Path.mkdir, "pipe": os.mkfifo, "nested": lambda path: path.write_text("[" * 100_000),
    }  # fmt: skip
    acts.get(damage, lambda path: None)(pruned / file)
    # Without its index a folder is one of a single file.
    name = file.removesuffix(".index.json") if damage == "gone" else file
    assert any(name in problem for problem in verify(source, PLAN, pruned).problems)


def test_a_card_of_another_plan_and_a_link_to_a_folder(source: Path, pruned: Path) -> None:
    (pruned / "README.md").write_bytes((source / "README.md").read_bytes())
    (pruned / "more").symlink_to(source)
    assert verify(source, PLAN, pruned).problems == (
        f"README.md: does not name the plan (sha256 {PLAN.digest})", "more: should not be there",
    )  # fmt: skip


def test_what_another_tool_made_has_no_record(source: Path, pruned: Path) -> None:
    for name in (RECORD, MANIFEST):
        (pruned / name).unlink()
    (pruned / "README.original.md").replace(pruned / "README.md")
    assert verify(source, PLAN, pruned).problems == ()


def test_other_keys_of_the_index_stay(source: Path, tmp_path: Path) -> None:
    change(source / INDEX, "layout", to={"a": 1})
    prune(source, PLAN, tmp_path / "out")
    assert json.loads((tmp_path / "out" / INDEX).read_text())["layout"] == {"a": 1}
    assert verify(source, PLAN, tmp_path / "out").problems == ()

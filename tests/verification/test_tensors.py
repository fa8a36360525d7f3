"""Damage of every kind is found, and named."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.verification.tensors import VerifyReport, remapped, verify
from tests.helpers.synthetic import EXPERTS, Tensors, data, gpt_oss_mxfp4, qwen3, read_shard, shard_bytes, write

PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))})
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write(tmp_path / "in", *qwen3("fp8_block"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("# A model\n")
    return folder


def rewrite(folder: Path, name: str, change: Callable[[Tensors], None]) -> None:
    """Change the shard that holds the tensor."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors, header = read_shard(path)
    change(tensors)
    write_shard(path, tensors, header.get("__metadata__"))


def write_shard(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Of the size that the file had."""
    raw = shard_bytes(tensors, metadata)
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8:start]), separators=(",", ":")).encode()
    header = header.ljust(path.stat().st_size - 8 - len(raw[start:]))
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[start:])


def flip(name: str, at: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        dtype, shape, raw = tensors[name]
        tensors[name] = dtype, shape, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]

    return change


def test_a_sound_folder_has_no_problem(source, pruned):
    calls: list[tuple[int, int]] = []
    report = verify(source, PLAN, pruned, progress=lambda done, total: calls.append((done, total)))
    count = 1 + 2 * (2 + 4 * 3 * 2)
    assert report == VerifyReport((), count, report.bytes_compared)
    assert report.bytes_compared == json.loads((pruned / INDEX).read_text())["metadata"]["total_size"]
    assert calls[-1] == (report.bytes_compared, report.bytes_compared)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("model.layers.0.mlp.experts.3.down_proj.weight", 23),
        ("model.layers.1.mlp.experts.0.up_proj.weight_scale_inv", 0),
        ("model.layers.1.mlp.gate.weight", 8),
        ("model.embed_tokens.weight", 79),
        ("model.layers.1.input_layernorm.weight", 7),
    ],
)
def test_one_flipped_bit(source, pruned, name, at):
    rewrite(pruned, name, flip(name, at))
    (problem,) = verify(source, PLAN, pruned).problems
    assert problem.startswith(f"{name}: differs from the source's ")


def test_a_flipped_bit_in_a_stack(tmp_path):
    folder = write(tmp_path / "in", *gpt_oss_mxfp4())
    prune(folder, PLAN, tmp_path / "out")
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    rewrite(tmp_path / "out", name, flip(name, 2 * 96 + 5))
    assert verify(folder, PLAN, tmp_path / "out").problems == (f"{name}: differs from the source's {name}, expert 5",)


@pytest.mark.parametrize("kind", ["f4", "f6"])
def test_a_flipped_bit_at_the_end_of_packed_numbers(tmp_path, kind):
    folder = write(tmp_path / "in", *qwen3(kind))
    prune(folder, PLAN, tmp_path / "out")
    name = "model.layers.1.mlp.experts.1.down_proj.weight"
    rewrite(tmp_path / "out", name, flip(name, {"f4": 11, "f6": 17}[kind]))
    (problem,) = verify(folder, PLAN, tmp_path / "out").problems
    assert problem.startswith(f"{name}: differs from the source's ")


def test_swapped_router_rows(source, pruned):
    name = "model.layers.0.mlp.gate.weight"

    def swap(tensors: Tensors) -> None:
        dtype, shape, raw = tensors[name]
        tensors[name] = dtype, shape, raw[8:16] + raw[:8] + raw[16:]

    rewrite(pruned, name, swap)
    assert verify(source, PLAN, pruned).problems == (f"{name}: differs from the source's {name}, expert 0",)


def test_swapped_experts(source, pruned):
    a, b = (f"model.layers.0.mlp.experts.{e}.gate_proj.weight" for e in (0, 1))

    def swap(tensors: Tensors) -> None:
        tensors[a], tensors[b] = tensors[b], tensors[a]

    rewrite(pruned, a, swap)
    assert sorted(problem.split(":")[0] for problem in verify(source, PLAN, pruned).problems) == [a, b]


def test_the_plan_of_another_run(source, pruned):
    other = Plan({"0": LayerPlan((0, 2, 3, 6)), "1": LayerPlan((1, 4, 5, 6))})
    problems = verify(source, other, pruned).problems
    assert problems[0] == "moekern_plan.json: made from another plan"
    assert any("layers.0.mlp.experts.3" in problem for problem in problems)


def test_an_extra_tensor(source, pruned):
    name = "model.embed_tokens.weight"
    extra = data(np.random.default_rng(0), "BF16", [2])
    rewrite(pruned, name, lambda tensors: tensors.update({"model.extra": extra}))
    problems = verify(source, PLAN, pruned).problems
    assert "model.extra: should not be there" in problems
    assert any(problem.startswith(f"{INDEX}: model.extra in None") for problem in problems)


def test_a_missing_tensor(source, pruned):
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    rewrite(pruned, name, lambda tensors: tensors.pop(name) and None)
    assert f"{name}: missing" in verify(source, PLAN, pruned).problems


def test_a_shape_and_a_dtype(source, pruned):
    name = "model.embed_tokens.weight"
    rewrite(pruned, name, lambda tensors: tensors.update({name: ("BF16", [4, 10], tensors[name][2])}))
    assert verify(source, PLAN, pruned).problems == (f"{name}: shape [4, 10], expected [10, 4]",)
    rewrite(pruned, name, lambda tensors: tensors.update({name: ("F16", [10, 4], tensors[name][2])}))
    assert verify(source, PLAN, pruned).problems == (f"{name}: dtype F16, expected BF16",)


def test_header_metadata(source, pruned):
    for path in pruned.glob("*.safetensors"):
        write_shard(path, read_shard(path)[0])
    first, second = verify(source, PLAN, pruned).problems
    assert first == "model-00001-of-00002.safetensors: header metadata differ from the source's"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 8}, "config.json: num_experts is 8, expected 4"),
        ({"num_experts_per_tok": 1}, "config.json: num_experts_per_tok is 1, expected 2"),
        ({"hidden_size": 4.0}, "config.json: hidden_size is 4.0, expected 4"),
        ({"new": 1}, "config.json: keys differ from the source's: new"),
    ],
    ids=["count", "top_k", "type", "key"],
)
def test_config(source, pruned, change, message):
    path = pruned / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert verify(source, PLAN, pruned).problems == (message,)


def test_config_that_is_no_json(source, pruned):
    (pruned / "config.json").write_text("{")
    (problem,) = verify(source, PLAN, pruned).problems
    assert problem.startswith("config.json: ")


def test_index_size_and_placement(source, pruned):
    path = pruned / INDEX
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    (problem,) = verify(source, PLAN, pruned).problems
    assert problem.startswith(f"{INDEX}: total_size ")
    index["metadata"]["total_size"] -= 1
    index["weight_map"]["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    (problem,) = verify(source, PLAN, pruned).problems
    assert problem.startswith(f"{INDEX}: model.embed_tokens.weight in model-00002-of-00002.safetensors, but")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": "../in/model-00001-of-00002.safetensors"}}'])
def test_an_index_that_makes_no_sense(source, pruned, text):
    (pruned / INDEX).write_text(text)
    (problem,) = verify(source, PLAN, pruned).problems
    assert problem.startswith(f"{pruned}: not readable: ")


def test_side_files(source, pruned):
    (pruned / "tokenizer.json").write_text("{ }")
    assert verify(source, PLAN, pruned).problems == ("tokenizer.json: differs from the source's",)
    (pruned / "tokenizer.json").unlink()
    assert verify(source, PLAN, pruned).problems == ("tokenizer.json: missing",)


def test_an_unexpected_file(source, pruned):
    (pruned / "notes.txt").write_text("")
    assert verify(source, PLAN, pruned).problems == ("notes.txt: should not be there",)


def test_a_truncated_shard_and_a_missing_one(source, pruned):
    path = pruned / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (problem,) = verify(source, PLAN, pruned).problems
    assert str(pruned) in problem
    path.unlink()
    (problem,) = verify(source, PLAN, pruned).problems
    assert "model-00002-of-00002.safetensors" in problem


def replace(kind: str, path: Path) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_bytes(b"[" * 100_000 + b"]" * 100_000)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "huge", "deep"])
@pytest.mark.parametrize(
    "name",
    ["config.json", INDEX, "moekern_plan.json", "tokenizer.json", "README.md", "model-00001-of-00002.safetensors"],
)
def test_a_file_that_is_no_such_file_is_a_problem_and_not_read(source, pruned, name, kind):
    replace(kind, pruned / name)
    (problem,) = verify(source, PLAN, pruned).problems
    assert name in problem


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_a_manifest_that_is_no_file(source, pruned, kind):
    replace(kind, pruned / "moekern_manifest.jsonl")
    (problem,) = verify(source, PLAN, pruned).problems
    assert problem.startswith("moekern_manifest.jsonl: ")


def test_a_link_to_a_folder_should_not_be_there(source, pruned):
    (pruned / "more").symlink_to("/")
    assert verify(source, PLAN, pruned).problems == ("more: should not be there",)


@pytest.mark.parametrize("content", [[], {}, {"plan_sha256": PLAN.digest}, {"plan_sha256": PLAN.digest, "mtp": "all"}])
def test_a_record_that_says_nothing_is_a_problem(source, pruned, content):
    (pruned / "moekern_plan.json").write_text(json.dumps(content))
    problems = verify(source, PLAN, pruned).problems
    assert problems
    assert all(problem.startswith("moekern_plan.json: ") for problem in problems)


def test_names_of_the_result_are_printable_and_cut(source, pruned):
    path = pruned / "config.json"
    odd = {f"\x1b[31m{n}" + "x" * 10_000: n for n in range(20)}
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    (problem,) = verify(source, PLAN, pruned).problems
    assert problem.isprintable()
    assert len(problem) < 2000


def test_an_option_that_there_is_not(source, pruned):
    with pytest.raises(InputError, match="--mtp some: expected one of prune, drop, keep"):
        verify(source, PLAN, pruned, mtp="some")  # type: ignore[arg-type]


def test_no_folder(source, tmp_path):
    assert verify(source, PLAN, tmp_path / "none").problems == (f"{tmp_path / 'none'}: no such folder",)


def test_a_bad_source_is_the_callers_fault(source, pruned):
    with pytest.raises(InputError, match="another model"):
        verify(source, Plan(PLAN.layers, {"fingerprint": "0" * 64}), pruned)


def test_the_table_rule_by_hand():
    table = torch.tensor([[0, 1, 2], [5, 6, 7], [7, 3, 5]], dtype=torch.int32)
    # kept 0 2 3 7 become 0 1 2 3; 1 -> rank 0, taken, then 1, taken by the next slot's 2, then 2
    want = torch.tensor([[0, 2, 1], [2, 0, 3], [3, 2, 0]], dtype=torch.int32)
    got = remapped(table, (0, 2, 3, 7), EXPERTS)
    assert got.dtype == torch.int32
    # 5 -> 5*4//8 = 2; 6 -> 3, taken by 7, then 0; row 2: 5 -> 2, taken by 3, then 3, taken by 7, then 0
    assert got.tolist() == want.tolist()

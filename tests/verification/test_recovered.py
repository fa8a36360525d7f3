"""Trained tensors are verified against the record of their training, all other bytes as ever; faults are one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moekern.checkpoint.recovery import RECOVERY
from moekern.cli.app import app
from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import MANIFEST, PLAN_FILE, prune
from moekern.pruning.replaced import write_replaced
from moekern.verification.logits import compare_forward
from moekern.verification.tensors import verify
from tests.helpers.recovered import RECORD, train
from tests.helpers.refitted import refit
from tests.helpers.synthetic import qwen3, read, read_shard, shard_bytes, tree, write

PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))}, {"criterion": "test"})
ROUTER, NORM = "model.layers.0.mlp.gate.weight", "model.layers.0.input_layernorm.weight"
EXPERT = "model.layers.0.mlp.experts.1.down_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write(tmp_path / "in", *qwen3(), shards=3)
    (folder / "README.md").write_text("# A model\n")
    return folder


@pytest.fixture
def recovered(source: Path, tmp_path: Path) -> Path:
    """Pruned by PLAN; routers and experts 1 trained."""
    prune(source, PLAN, tmp_path / "pruned")
    return train_to(tmp_path / "pruned", tmp_path / "out", ".gate.", "experts.1.down_proj")


def train_to(pruned: Path, out: Path, *parts: str, seed: int = 3) -> Path:
    new = out.with_name(f"{out.name}-new")
    train(pruned, new, *parts, seed=seed)
    write_replaced(pruned, out, new, RECORD)
    return out


def overwrite(folder: Path, name: str, data: bytes) -> None:
    """The first bytes of a tensor."""
    for path in folder.glob("*.safetensors"):
        header = read_shard(path)[1]
        if name in header:
            raw = bytearray(path.read_bytes())
            start = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0]
            raw[start : start + len(data)] = data
            path.write_bytes(raw)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """A JSON file, or the lines of one."""
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        change(lines)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("kind", "shards"), [("bf16", 3), ("fp8_block", 1), ("gptq", 2)])
def test_a_sound_folder(kind: str, shards: int, tmp_path: Path) -> None:
    source = write(tmp_path / "in", *qwen3(kind), shards=shards)
    prune(source, PLAN, tmp_path / "pruned")
    report = verify(source, PLAN, train_to(tmp_path / "pruned", tmp_path / "out", ".gate.", "experts.1.down_proj"))
    before = verify(source, PLAN, tmp_path / "pruned")
    assert (report.problems, report.computed) == ((), 0)
    assert report.trained == 2 + 2 * {"bf16": 1, "fp8_block": 2, "gptq": 4}[kind]
    assert report.tensors_compared + report.trained == before.tensors_compared


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        (ROUTER, b"\1\2", f"{ROUTER}: differs from what was trained, whose checksum is in {RECOVERY}"),
        (EXPERT, b"\xc0\xff", f"{EXPERT}: holds NaN or infinities, which no training leaves"),
        (NORM, b"\1\2", f"{NORM}: differs from the source's {NORM}"),
    ],
)
def test_bytes_that_were_changed_afterwards(source: Path, recovered: Path, name: str, data: bytes, line: str) -> None:
    overwrite(recovered, name, data)
    assert verify(source, PLAN, recovered).problems == (line,)


TOP_K = "num_experts_per_tok"


@pytest.fixture
def fewer(source: Path, tmp_path: Path) -> Path:
    """Pruned by PLAN; routers trained for one expert a token."""
    prune(source, PLAN, tmp_path / "pruned")
    train(tmp_path / "pruned", tmp_path / "new", ".gate.")
    write_replaced(tmp_path / "pruned", tmp_path / "fewer", tmp_path / "new", RECORD, settings={(TOP_K,): 1})
    return tmp_path / "fewer"


def test_fewer_experts_a_token(source: Path, fewer: Path, tmp_path: Path) -> None:
    assert verify(source, PLAN, fewer).problems == ()
    twice = train_to(fewer, tmp_path / "twice", "layernorm")
    assert verify(source, PLAN, twice).problems == ()


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("config.json", {TOP_K: 2}, f"config.json: {TOP_K} is 2, expected 1"),
        ("config.json", {"hidden_size": 5}, "config.json: hidden_size is 5, expected "),
        (RECOVERY, {"settings": {}}, f"config.json: {TOP_K} is 1, expected 2"),
        (RECOVERY, {"settings": {TOP_K: 1, "hidden_size": 5}}, f"{RECOVERY}: settings: 'hidden_size' is nothing that"),
        (RECOVERY, {"settings": {TOP_K: 3}}, f"{RECOVERY}: settings: {TOP_K} is 3, expected no more than 2"),
        (RECOVERY, {"settings": {TOP_K: True}}, f"{RECOVERY}: settings: expected an object of numbers above 0, got"),
        (RECOVERY, {"settings": [TOP_K]}, f"{RECOVERY}: settings: expected an object of numbers above 0, got"),
    ],
)
def test_settings_that_are_not_so(source: Path, fewer: Path, file: str, change: dict[str, Any], line: str) -> None:
    edit(fewer / file, lambda found: found.update(change))
    assert verify(source, PLAN, fewer).problems[0].startswith(line)


def test_numbers_that_are_not_finite_though_the_record_has_their_checksum(source: Path, tmp_path: Path) -> None:
    prune(source, PLAN, tmp_path / "pruned")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/0.safetensors").write_bytes(shard_bytes({NORM: ("BF16", [4], b"\x80\x7f" * 4)}))
    write_replaced(tmp_path / "pruned", tmp_path / "out", tmp_path / "new", {})
    line = f"{NORM}: holds NaN or infinities, which no training leaves"
    assert verify(source, PLAN, tmp_path / "out").problems == (line,)


def test_another_dtype_and_shape_than_the_plan_makes(source: Path, recovered: Path) -> None:
    path = next(path for path in recovered.glob("*.safetensors") if ROUTER in read_shard(path)[0])
    tensors, header = read_shard(path)
    for dtype, shape, raw, line in (
        ("F16", [4, 4], tensors[ROUTER][2], "dtype F16, expected BF16"),
        ("BF16", [2, 8], tensors[ROUTER][2], r"shape [2, 8], expected [4, 4]"),
    ):
        path.write_bytes(shard_bytes({**tensors, ROUTER: (dtype, shape, raw)}, header["__metadata__"]))
        assert f"{ROUTER}: {line}" in verify(source, PLAN, recovered).problems


def names_less(content: dict[str, Any]) -> None:
    del content["tensors"][ROUTER]


def lines_less(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        line.pop("recover", None)


FIRST = "'model.layers.0.mlp.experts.1.down_proj.weight' and 3 more"


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        (RECOVERY, names_less, f"{MANIFEST}: names '{ROUTER}' as trained, which {RECOVERY} does not"),
        (RECOVERY, lambda found: found["tensors"].update({NORM: "0" * 32}),
         f"{RECOVERY}: names '{NORM}' as trained, which {MANIFEST} does not"),
        (MANIFEST, lines_less, f"{RECOVERY}: names {FIRST} as trained, which {MANIFEST} does not"),
        (MANIFEST, lambda lines: lines[0].update(recover={"tensors": [[]]}), "recover: expected names of tensors"),
        (MANIFEST, lambda lines: lines[0].update(recover=[ROUTER]), "recover: expected names of tensors"),
        (RECOVERY, lambda found: found.update(format="x"), 'expected "format": "moekern.recovered/1", got'),
        (RECOVERY, lambda found: found.pop("source_fingerprint"), "source_fingerprint: expected a sha256, got None"),
        (RECOVERY, lambda found: found.update(tensors=[ROUTER]), "tensors: expected an object of names and checksums"),
        (RECOVERY, lambda found: found.update(tensors={}), "tensors: expected an object of names and checksums"),
        (RECOVERY, lambda found: found["tensors"].update({ROUTER: ["0" * 32]}), "expected 32 hexadecimal digits"),
        (RECOVERY, lambda found: found["tensors"].update({ROUTER: "é" * 32}), "expected 32 hexadecimal digits"),
    ],
)  # fmt: skip
def test_records_that_are_not_so(
    source: Path, recovered: Path, file: str, change: Callable[[Any], object], line: str
) -> None:
    edit(recovered / file, change)
    problems = verify(source, PLAN, recovered).problems
    assert line in problems[0]
    assert file == MANIFEST or problems[0].startswith((RECOVERY, MANIFEST))
    assert len(problems) <= 2


@pytest.mark.parametrize("damage", ["gone", "folder", "pipe", "nested", "huge", "a list", "not JSON", "a link to it"])
def test_a_hostile_record(source: Path, recovered: Path, damage: str) -> None:
    path = recovered / RECOVERY
    path.unlink()
    acts: dict[str, Callable[[], object]] = {
        "gone": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "nested": lambda: path.write_text("[" * 100_000),
        "huge": lambda: (path.touch(), os.truncate(path, 1 << 40)),
        "a list": lambda: path.write_text("[]"),
        "not JSON": lambda: path.write_bytes(b"\xff\n\x1b[2J"),
        "a link to it": lambda: path.symlink_to(path),
    }
    acts[damage]()
    (problem,) = verify(source, PLAN, recovered).problems
    assert RECOVERY in problem
    assert problem.isprintable()


def test_a_name_that_the_plan_has_no_place_for(source: Path, recovered: Path) -> None:
    edit(recovered / RECOVERY, lambda found: found["tensors"].update(other="0" * 32))
    edit(recovered / MANIFEST, lambda lines: lines[0]["recover"]["tensors"].append("other"))
    line = f"{RECOVERY}: names 'other' which the plan leaves no place for"
    assert verify(source, PLAN, recovered).problems == (line,)


def test_refitted_and_then_trained(source: Path, tmp_path: Path) -> None:
    """A layer all of whose refitted tensors were trained, one where some were; a refit's dtype is kept."""
    plan = refit(source, PLAN, tmp_path / "refit", dtype="F32")
    prune(source, plan, tmp_path / "pruned", refitted=tmp_path / "refit")
    parts = ("layers.0.mlp.experts.0.down", "layers.0.mlp.experts.1.down", "layers.0.mlp.experts.2.down",
             "layers.0.mlp.experts.3.down", "layers.1.mlp.experts.2.down", ".gate.")  # fmt: skip
    out = train_to(tmp_path / "pruned", tmp_path / "out", *parts)
    report = verify(source, plan, out)
    assert (report.problems, report.computed, report.trained, report.unchecked) == ((), 3, 7, 0)
    overwrite(out, "model.layers.1.mlp.experts.3.down_proj.weight", b"\1")
    (problem,) = verify(source, plan, out).problems
    assert problem.endswith(f"differs from what was computed, whose checksum is in {MANIFEST}")
    made = {name: raw for name, (_, _, raw) in read(tmp_path / "pruned").items() if "down_proj" in name}

    def again(key: str) -> dict[str, bytes]:
        return {name: raw for name, raw in made.items() if f"layers.{key}." in name}

    found = verify(source, plan, out, recompute=again)
    assert (found.problems, found.recomputed) == ((problem,), 2)


def test_trained_twice_and_by_itself(source: Path, recovered: Path, tmp_path: Path) -> None:
    twice = train_to(recovered, tmp_path / "twice", "layernorm", "layers.0.mlp.gate", seed=8)
    report = verify(source, PLAN, twice)
    assert (report.problems, report.trained) == ((), 6)
    overwrite(twice, EXPERT, b"\1\2")
    assert len(verify(source, PLAN, twice).problems) == 1


def test_what_another_tool_pruned(source: Path, tmp_path: Path) -> None:
    prune(source, PLAN, tmp_path / "pruned")
    for name in (PLAN_FILE, MANIFEST):
        (tmp_path / "pruned" / name).unlink()
    (tmp_path / "pruned/README.original.md").replace(tmp_path / "pruned/README.md")
    out = train_to(tmp_path / "pruned", tmp_path / "out", ".gate.")
    report = verify(source, PLAN, out)
    assert (report.problems, report.trained) == ((), 2)
    edit(out / MANIFEST, lambda lines: lines[0].update(size=1))
    assert verify(source, PLAN, out).problems == (f"{MANIFEST}: model-00001-of-00003.safetensors has another size",)


def test_pruned_again(source: Path, recovered: Path, tmp_path: Path) -> None:
    """The record is no side file that would still hold; it stands under the source of the new plan."""
    plan = Plan({"0": LayerPlan((0, 2, 3)), "1": LayerPlan((1, 2, 3))})
    prune(recovered, plan, tmp_path / "again")
    assert not (tmp_path / "again" / RECOVERY).exists()
    told = json.loads((tmp_path / "again" / PLAN_FILE).read_text())["source"]
    assert told.pop("recovery") == json.loads((recovered / RECOVERY).read_text())
    assert told == json.loads((recovered / PLAN_FILE).read_text())
    assert verify(recovered, plan, tmp_path / "again").problems == ()
    edit(tmp_path / "again" / PLAN_FILE, lambda found: found["source"].pop("recovery"))
    assert verify(recovered, plan, tmp_path / "again").problems == (
        f"{PLAN_FILE}: source is not that of this source and plan",
    )
    (recovered / RECOVERY).write_text("[]")
    with pytest.raises(InputError, match=f"{RECOVERY}: expected a JSON object"):
        prune(recovered, plan, tmp_path / "more")


def test_the_commands(source: Path, recovered: Path, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    arguments = ["verify", str(source), str(tmp_path / "plan.json"), str(recovered), "--forward"]
    done = CliRunner().invoke(app, arguments)
    told = " ".join(done.output.split())
    assert done.exit_code == 0
    assert "recovered: 4 tensors were trained after pruning, and have no original: " in told
    assert "logits: not compared: " in told
    assert "4 tensors were trained after pruning, so its logits are not those of the masked original" in told
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert (found["good"], found["trained"], found["forward"]) == (True, 4, None)
    assert "4 tensors were trained" in found["forward_skipped"]
    with pytest.raises(InputError, match="4 tensors were trained after pruning"):
        compare_forward(source, PLAN, recovered)
    before = tree(recovered)
    note = f"recovered: 4 of its tensors were trained after pruning, as {RECOVERY} says"
    assert note in json.loads(CliRunner().invoke(app, ["inspect", str(recovered), "--json"]).stdout)["notes"]
    assert tree(recovered) == before
    overwrite(recovered, ROUTER, b"\1\2")
    done = CliRunner().invoke(app, arguments[:-1])
    assert done.exit_code == 1
    assert "NOT verified" in done.output


def test_another_plan_than_that_of_the_pruning(source: Path, recovered: Path) -> None:
    other = replace(PLAN, layers={**PLAN.layers, "0": LayerPlan((0, 1, 2, 3))})
    problems = verify(source, other, recovered).problems
    assert f"{PLAN_FILE}: made from another plan" in problems

"""What a refit has computed is verified as far as it can be, and nothing passes under its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moekern.cli.app import app
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from moekern.verification.tensors import VerifyReport, verify
from tests.helpers.refitted import computed, refit
from tests.helpers.synthetic import COMPANIONS, gpt_oss_mxfp4, qwen3, read_shard, write

PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6)), "2": LayerPlan((0, 1, 2, 3))})
NAME = "model.layers.0.mlp.experts.1.down_proj.weight"
MANIFEST = "moekern_manifest.jsonl"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in", *qwen3(layers=3), shards=3)


@pytest.fixture
def plan(source: Path, tmp_path: Path) -> Plan:
    return refit(source, PLAN, tmp_path / "refit")


@pytest.fixture
def folder(source: Path, plan: Plan, tmp_path: Path) -> Path:
    prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit")
    return tmp_path / "out"


def change(folder: Path, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    """Of the manifest's lines."""
    lines = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    edit(lines)
    (folder / MANIFEST).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def overwrite(folder: Path, name: str, data: bytes) -> None:
    """The first bytes of a tensor."""
    for path in folder.glob("*.safetensors"):
        tensors, header = read_shard(path)
        if name in tensors:
            start = 8 + int.from_bytes(path.read_bytes()[:8], "little") + header[name]["data_offsets"][0]
            with path.open("r+b") as file:
                file.seek(start)
                file.write(data)


def test_a_sound_folder(source: Path, plan: Plan, folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(source, plan, folder, progress=lambda done, total: calls.append((done, total)))
    count = 1 + 3 * (2 + 4 * 2)
    assert report == VerifyReport((), count, report.bytes_compared, computed=12)
    assert report.bytes_compared == calls[-1][1] - 12 * 48
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("kind", ["fp8_block", "gptq", "compressed_tensors", "f4"])
def test_quantised_ones(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", *qwen3(kind, layers=3))
    plan = refit(source, PLAN, tmp_path / "refit")
    prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit")
    report = verify(source, plan, tmp_path / "out")
    assert (report.problems, report.computed) == ((), 12 * len(COMPANIONS[kind]))
    suffix, (dtype, _) = next(iter(COMPANIONS[kind].items()))
    name = f"model.layers.2.mlp.experts.3.down_proj.{suffix}"
    overwrite(tmp_path / "out", name, b"\xff\xff")
    what = "holds NaN" if dtype.startswith("F8") else "differs from what was computed"
    assert [problem[: len(name) + 2 + len(what)] for problem in verify(source, plan, tmp_path / "out").problems] == [
        f"{name}: {what}"
    ]


def test_stacks_and_what_is_flipped_in_them(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *gpt_oss_mxfp4(layers=3))
    plan = refit(source, PLAN, tmp_path / "refit", parts=("down_proj_blocks",))
    prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit")
    assert verify(source, plan, tmp_path / "out").problems == ()
    overwrite(tmp_path / "out", "model.layers.1.mlp.experts.down_proj_blocks", b"\1\2\3")
    (problem,) = verify(source, plan, tmp_path / "out").problems
    assert problem == f"model.layers.1.mlp.experts.down_proj_blocks: differs from what was computed, " \
        f"whose checksum is in {MANIFEST}"  # fmt: skip


def test_bytes_that_are_not_those_that_were_computed(source: Path, plan: Plan, folder: Path) -> None:
    overwrite(folder, NAME, b"\1\2")
    assert [p.split(":")[0] for p in verify(source, plan, folder).problems] == [NAME]
    overwrite(folder, "model.layers.0.mlp.experts.1.up_proj.weight", b"\1\2")
    assert len(verify(source, plan, folder).problems) == 2


@pytest.mark.parametrize("value", [b"\x80\x7f", b"\xc0\xff", b"\x80\xff"], ids=["inf", "nan", "-inf"])
def test_numbers_that_are_not_finite(source: Path, plan: Plan, folder: Path, value: bytes) -> None:
    overwrite(folder, NAME, value)
    assert verify(source, plan, folder).problems == (f"{NAME}: holds NaN or infinities, which no refit leaves",)


def test_a_dtype_of_plain_numbers(source: Path, tmp_path: Path) -> None:
    plan = refit(source, PLAN, tmp_path / "refit", dtype="F32")
    prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit")
    assert verify(source, plan, tmp_path / "out").problems == ()


def without_refit(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        line.pop("refit", None)


def claim(name: str) -> Callable[[list[dict[str, Any]]], object]:
    return lambda lines: lines[0]["refit"]["tensors"].append(name)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (claim("model.layers.0.mlp.gate.weight"), "gate.weight was refitted, and is of no expert of a layer that was"),
        (claim("model.embed_tokens.weight"), "embed_tokens.weight was refitted, and is of no expert"),
        (claim("other"), "other was refitted, and is of no expert"),
        (lambda lines: lines[0]["refit"].update(recipe="9" * 64), "refitted by another recipe than the plan's"),
        (lambda lines: lines[0].update(refit=[]), "refit: expected a recipe and names of tensors"),
        (lambda lines: lines[0]["refit"].update(tensors={"a": 1}), "refit: expected a recipe and names of tensors"),
        (without_refit, f"{NAME}: differs from the source's"),
        (without_refit, "names no refitted tensor of layer 2, which the plan says was refitted"),
        (lambda lines: lines[0]["tensors"].update({NAME: "0" * 32}), f"{NAME}: differs from what was computed"),
        (lambda lines: lines[0]["tensors"].update({NAME: 7}), f"{NAME}: differs from what was computed"),
        (lambda lines: lines.clear(), f"{NAME}: differs from the source's"),
    ],
)
def test_claims_that_do_not_hold(
    source: Path, plan: Plan, folder: Path, edit: Callable[[list[dict[str, Any]]], object], line: str
) -> None:
    change(folder, edit)
    assert any(line in problem for problem in verify(source, plan, folder).problems)


def test_a_plan_without_a_refit(source: Path, plan: Plan, folder: Path, tmp_path: Path) -> None:
    problems = verify(source, PLAN, folder).problems
    assert any("has refitted tensors, and the plan says nothing of a refit" in problem for problem in problems)
    assert any(problem.startswith(f"{NAME}: differs from the source's") for problem in problems)
    prune(source, PLAN, tmp_path / "plain")
    assert any("names no refitted tensor of layer 0" in p for p in verify(source, plan, tmp_path / "plain").problems)
    one = replace(plan, provenance={"refit": {**plan.provenance["refit"], "layers": {"0": {}}}})
    assert any(
        "layers.1.mlp.experts.0.down_proj.weight was refitted" in p for p in verify(source, one, folder).problems
    )


def test_what_has_no_checksum_is_told(source: Path, plan: Plan, folder: Path, tmp_path: Path) -> None:
    prune(source, plan, tmp_path / "none", refitted=tmp_path / "refit", checksum="none")
    report = verify(source, plan, tmp_path / "none")
    assert (report.problems, report.computed, report.unchecked) == ((), 12, 12)
    prune(source, plan, tmp_path / "blake3", refitted=tmp_path / "refit", checksum="blake3")
    assert verify(source, plan, tmp_path / "blake3").unchecked == 0


@pytest.mark.parametrize("full", [False, True])
def test_layers_that_are_computed_again(source: Path, plan: Plan, folder: Path, tmp_path: Path, full: bool) -> None:
    made, asked = computed(tmp_path / "refit"), list[str]()

    def recompute(key: str) -> dict[str, Any]:
        asked.append(key)
        return {n: np.frombuffer(raw, np.uint8) for n, (_, _, raw) in made.items() if f"layers.{key}." in n}

    report = verify(source, plan, folder, recompute=recompute, full=full)
    assert (report.problems, report.recomputed) == ((), 4 * len(asked))
    assert asked == (["0", "1", "2"] if full else ["0", asked[1]])

    def other(key: str) -> dict[str, Any]:
        found = {name: bytes(raw) for name, raw in recompute(key).items()}
        return {**{name: raw[:-1] + b"x" for name, raw in found.items() if name != NAME}, "more": b""}

    problems = verify(source, plan, folder, recompute=other, full=full).problems
    assert f"{NAME}: is not among what is computed again for layer 0" in problems
    assert f"more: is computed again for layer 0, and {MANIFEST} does not name it" in problems
    assert "model.layers.0.mlp.experts.0.down_proj.weight: differs from what is computed again" in problems


def test_the_command_tells_what_was_not_computed_again(source: Path, plan: Plan, folder: Path, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    done = CliRunner().invoke(app, ["verify", str(source), str(tmp_path / "plan.json"), str(folder)])
    assert done.exit_code == 0
    assert "refitted or merged: 12 tensors are computed, and have no original" in done.output.replace("\n", " ")
    assert "NONE of them was computed again" in done.output.replace("\n", " ")

"""Tensors that a refit computed take the places of the source's; what is odd about them is refused in a line."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from moekern.errors import InputError
from moekern.files import work_path
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import MANIFEST, prune
from moekern.pruning.refitted import open_refitted, write_layer
from moekern.team import Part
from tests.helpers.digest import xxh3
from tests.helpers.faulty import Bench, Snapshot, benches_in_memory, finished, nothing_or_all
from tests.helpers.refitted import RECIPE, computed, refit, spoil
from tests.helpers.synthetic import Tensors, data, gpt_oss_mxfp4, qwen3, read, read_shard, shard_bytes, tree, write

PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))}, {"criterion": "test"})
NAME = "model.layers.0.mlp.experts.1.down_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in", *qwen3(), shards=3)


@pytest.fixture
def plan(source: Path, tmp_path: Path) -> Plan:
    """Refitted; the tensors are in `refit`."""
    return refit(source, PLAN, tmp_path / "refit")


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


@pytest.mark.parametrize("checksum", ["xxh3", "blake3", "none"])
@pytest.mark.parametrize("copy", ["auto", "stream", "kernel"])
def test_they_take_the_places_of_the_sources(
    source: Path, plan: Plan, tmp_path: Path, copy: Any, checksum: Any
) -> None:
    report = prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit", copy=copy, checksum=checksum)
    new, after = computed(tmp_path / "refit"), read(tmp_path / "out")
    assert report.refitted == len(new) == 8
    assert after == read(tmp_path / "refit-plain") | new
    assert {name for line in manifest(tmp_path / "out") for name in line["computed"]} == {*new}
    for line in manifest(tmp_path / "out"):
        names = [name for name in line["tensors"] if name in new]
        assert line.get("refit") == ({"recipe": RECIPE, "tensors": names} if names else None)
        if checksum == "xxh3":  # however they come there
            assert all(line["tensors"][name] == xxh3(new[name][2]).hex() for name in names)


def test_shards_made_anew_hold_them_too(source: Path, plan: Plan, tmp_path: Path) -> None:
    prune(source, plan, tmp_path / "out", refitted=open_refitted(tmp_path / "refit"), max_shard_size=200)
    assert read(tmp_path / "out") == read(tmp_path / "refit-plain") | computed(tmp_path / "refit")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert read_shard(path)[1]["__metadata__"] == {"format": "pt"}


def test_another_dtype_of_plain_numbers(source: Path, tmp_path: Path) -> None:
    plan = refit(source, PLAN, tmp_path / "refit", dtype="F32")
    prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit")
    assert read(tmp_path / "out")[NAME] == computed(tmp_path / "refit")[NAME]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in read(tmp_path / "out").values())
    for path in (tmp_path / "out").glob("*.safetensors"):
        for _, info in sorted(read_shard(path)[1].items())[1:]:
            assert info["data_offsets"][0] % {"F32": 4, "BF16": 2}[info["dtype"]] == 0


def test_stacks(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *gpt_oss_mxfp4())
    plan = refit(source, PLAN, tmp_path / "refit")
    prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit")
    new = computed(tmp_path / "refit")
    assert {name.rpartition("_")[2] for name in new} == {"blocks", "scales", "bias"}
    assert read(tmp_path / "out") == read(tmp_path / "refit-plain") | new


def test_parts_and_a_finished_target(source: Path, plan: Plan, tmp_path: Path) -> None:
    prune(source, plan, tmp_path / "whole", refitted=tmp_path / "refit")
    for number in (1, 2):
        report = prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit", part=Part(number, 2))
    assert report.finished
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit", again=True).already


def test_a_layer_that_is_refitted_again_is_written_again(source: Path, plan: Plan, tmp_path: Path) -> None:
    """What a stopped run has proved is not taken over where a refitted file has changed."""

    def stop(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit", progress=stop)
    assert (work_path(tmp_path / "out") / "manifest.jsonl").read_text()
    for path in (tmp_path / "refit").iterdir():
        new = {name: data(np.random.default_rng(9), *tensor[:2]) for name, tensor in read_shard(path)[0].items()}
        model = open_refitted(tmp_path / "refit").model
        write_layer(tmp_path / "refit", path.stem, new, recipe=RECIPE, kept=plan.layers[path.stem], model=model)
    prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit")
    assert read(tmp_path / "out") == read(tmp_path / "refit-plain") | computed(tmp_path / "refit")


def test_what_is_written_is_aligned_and_always_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": data(rng, dtype, [3, 5]) for i, dtype in enumerate(("U8", "F32", "BF16", "F8_E4M3"))}
    tensors["none"] = "F32", [0, 4], b""
    for order in (list(tensors), list(tensors)[::-1]):
        given = {name: tensors[name] for name in order}
        path = write_layer(tmp_path / "x", "mtp.0", given, recipe=RECIPE, kept=PLAN.layers["0"], model="0" * 64)
        raw = path.read_bytes()
        assert read_shard(path)[0] == tensors
        assert raw == (tmp_path / "x/mtp.0.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    with safe_open(path, framework="np") as file:
        assert file.get_tensor("t1").tobytes() == tensors["t1"][2]
    found = open_refitted(tmp_path / "x").tensors["t3"]
    assert (found.layer, found.path, found.checksum) == ("mtp.0", path, xxh3(tensors["t3"][2]))
    with pytest.raises(ValueError, match="14 bytes are not U8"):
        write_layer(
            tmp_path, "0", {"a": ("U8", [3, 5], bytes(14))}, recipe=RECIPE, kept=PLAN.layers["0"], model="0" * 64
        )


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """The disk takes no more in the middle of the file: an earlier one stays, and nothing is beside it."""
    arguments = {"recipe": RECIPE, "kept": PLAN.layers["0"], "model": "0" * 64}
    path = write_layer(tmp_path / "x", "0", {"a": ("U8", [4], b"abcd")}, **arguments)
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        for key in ("0", "1"):
            with pytest.raises(InputError, match=rf"{key}\.safetensors: not finished"):
                write_layer(tmp_path / "x", key, {"a": ("U8", [4 << 20], bytes(4 << 20))}, **arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path / "x") == {"0.safetensors": before}


def test_what_a_killed_refit_leaves_is_passed_over(source: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "refit/.0.safetensors.moekern.tmp").write_bytes(b"half")
    prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit")


def said(**values: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, metadata: metadata.update(values)


def renamed(old: str, new: str) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, metadata: dict[str, Any]) -> None:
        tensors[new] = tensors.pop(old)
        metadata["checksums"][new] = metadata["checksums"].pop(old)

    return change


def retyped(dtype: str, *shape: int) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, metadata: tensors.update({NAME: (dtype, list(shape), tensors[NAME][2])})


HOSTILE: list[tuple[Callable[[Tensors, dict[str, Any]], None], str]] = [
    (said(format="moekern.refit/2"), 'expected "format": "moekern.refit/1"'),
    (said(layer="1"), "layer '1' is not the one that the file's name says"),
    (said(layer=["0"]), "layer .* is not the one that the file's name says"),
    (said(recipe="x"), "recipe: expected a sha256, got 'x'"),
    (said(model=None), "model: expected a sha256"),
    (said(recipe="6" * 64), "1.safetensors: of another refit than 0.safetensors"),
    (said(checksums=[]), "checksums: expected one for each tensor"),
    (said(checksums={NAME: "00"}), "checksums: expected one for each tensor"),
    (lambda tensors, metadata: metadata["checksums"].update({NAME: "é" * 32}), "expected 32 hexadecimal digits"),
    (renamed(NAME, "model.layers.0.mlp.experts.4.down_proj.weight"), "the pruned model has no tensor of this name"),
    (renamed(NAME, "model.layers.0.mlp.gate.weight"), "is no tensor of an expert of layer 0"),
    (renamed(NAME, "model.embed_tokens.weight"), "is no tensor of an expert of layer 0"),
    (renamed(NAME, "model.layers.1.mlp.experts.1.up_proj.weight"), "is no tensor of an expert of layer 0"),
    (renamed(NAME, "model.layers.1.mlp.experts.0.down_proj.weight"), "is also in 0.safetensors"),
    (retyped("BF16", 4, 6), r"has shape \[4, 6\]; in the pruned model it has \[6, 4\]"),
    (retyped("U16", 6, 4), "is U16; in the pruned model it is BF16"),
]


@pytest.mark.parametrize(("change", "line"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_folder_is_refused(
    source: Path, plan: Plan, tmp_path: Path, change: Callable[[Tensors, dict[str, Any]], None], line: str
) -> None:
    spoil(tmp_path / "refit/0.safetensors", change)
    refuse(source, plan, tmp_path, line)


def refuse(source: Path, plan: Plan, tmp_path: Path, line: str, refitted: Path | None = None) -> None:
    with pytest.raises(InputError, match=line) as error:
        prune(source, plan, tmp_path / "out", refitted=refitted or tmp_path / "refit")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not work_path(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda folder: (folder / "1.safetensors").unlink(), "1.safetensors is not there"),
        (lambda folder: (folder / "1.safetensors").rename(folder / "2.safetensors"), "is not the one that the file's"),
        (lambda folder: shutil.copy(folder / "../in/model-00001-of-00003.safetensors", folder / "2.safetensors"),
         "its metadata have no 'moekern'"),
        (lambda folder: os.truncate(folder / "1.safetensors", 700), "truncated"),
        (lambda folder: (folder / "1.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "lfs"),
        (lambda folder: ((folder / "1.safetensors").unlink(), os.mkfifo(folder / "1.safetensors")), "a link, pipe"),
        (lambda folder: ((folder / "0.safetensors").rename(folder / "x"), (folder / "0.safetensors").symlink_to("x")),
         "a link, pipe"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "no refitted layer is in it"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
    ],
)  # fmt: skip
def test_a_folder_of_odd_files_is_refused(
    source: Path, plan: Plan, tmp_path: Path, act: Callable[[Path], object], line: str
) -> None:
    act(tmp_path / "refit")
    refuse(source, plan, tmp_path, line)


def test_metadata_that_are_no_json(source: Path, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "refit/0.safetensors"
    for text in ("[", "{}", '{"format": NaN}', '{"a": 1, "a": 2}', "[" * 10_000):
        path.write_bytes(shard_bytes(read_shard(path)[0], {"moekern": text}))
        refuse(source, plan, tmp_path, r"0\.safetensors: ")


def test_plan_and_refit_must_name_each_other(source: Path, plan: Plan, tmp_path: Path) -> None:
    other = replace(PLAN, layers={**PLAN.layers, "0": LayerPlan((0, 1, 2, 3))})
    made_for_other = replace(other, provenance=plan.provenance)
    refit_said = plan.provenance["refit"]
    cases = [
        (PLAN, "the plan says nothing of a refit"),
        (made_for_other, "0.safetensors was computed for other experts or channels"),
        (replace(plan, provenance={**PLAN.provenance, "refit": {**refit_said, "recipe": "7" * 64}}), "another recipe"),
        (replace(plan, provenance={**PLAN.provenance, "refit": {**refit_said, "layers": {"0": 1}}}),
         "1.safetensors is there, and the plan does not name it"),
        (replace(plan, provenance={**PLAN.provenance, "refit": {**refit_said, "layers": {"7": 1}}}), "no layer '7'"),
        (replace(plan, provenance={**PLAN.provenance, "refit": True}), "refit.recipe: expected a sha256"),
        (replace(plan, provenance={**PLAN.provenance, "refit": {"recipe": RECIPE}}), "layers: expected an object"),
    ]  # fmt: skip
    for given, line in cases:
        refuse(source, given, tmp_path, line)
    with pytest.raises(InputError, match="name it with --refitted, or use the plan that the refit was given"):
        prune(source, plan, tmp_path / "out")
    assert Plan.from_json(plan.to_json()) == plan
    twin = write(tmp_path / "twin", *qwen3(seed=1))
    refuse(twin, plan, tmp_path, "was computed for another model")


def test_bytes_that_rotted_on_the_disk(source: Path, plan: Plan, tmp_path: Path) -> None:
    """What passes through memory is held against the checksum that the refit gave."""
    path = tmp_path / "refit/1.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{path}: tensor .*experts.3.down_proj.*not those that were computed"):
        prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit", copy="stream")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_changes_meanwhile(source: Path, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "refit/1.safetensors"
    touch = lambda done, total: os.utime(path, ns=(done, done))  # noqa: E731
    with pytest.raises(InputError, match=f"in {source}, .*{path} changed while it was copied"):
        prune(source, plan, tmp_path / "out", refitted=tmp_path / "refit", progress=touch)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, tuple[str, ...]]]:
    with benches_in_memory(tmp_path_factory, shards=3) as made:
        folder = made.folder / "refit" / "x"
        folder.parent.mkdir()
        plan = refit(made.source, Plan.load(made.plan), folder)
        path = made.plan.with_name("refitted.json")
        plan.save(path)
        yield replace(made, plan=path), ("--refitted", str(folder))


@pytest.mark.parametrize("copy", ["stream", "kernel"])
def test_killed_before_changes(bench: tuple[Bench, tuple[str, ...]], copy: str) -> None:
    made, options = bench[0], (*bench[1], "--copy", copy)
    want: Snapshot = made.want(*options)
    changes = made.changes(*options)
    for k in range(1, len(changes) + 1, 3):
        out = made.fresh()
        assert made.prune(out, *options, rules=f"change:{k}:KILL").code < 0
        if nothing_or_all(out, want):
            assert "exists already" in made.prune(out, *options).line
        else:
            ended = made.prune(out, *options)
            assert ended.code == 0, ended.said
        assert finished(out) == want

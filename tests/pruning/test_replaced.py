"""Trained tensors take the places of a checkpoint's, every other byte stays; what is odd about them is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moekern.checkpoint.contents import MODEL_CARD
from moekern.checkpoint.folder import open_checkpoint
from moekern.checkpoint.recovery import RECOVERY
from moekern.errors import InputError
from moekern.files import work_path
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import MANIFEST, prune
from moekern.pruning.replaced import write_replaced
from moekern.publishing.rewritten import rewrite_card
from tests.helpers import ROOT
from tests.helpers.digest import xxh3
from tests.helpers.mounts import MIB, mounted
from tests.helpers.recovered import RECORD, train
from tests.helpers.refitted import RECIPE, computed, refit
from tests.helpers.synthetic import Tensors, qwen3, read, read_shard, shard_bytes, tree, write, write_parts

PLAN = Plan({"0": LayerPlan((0, 2, 3, 7)), "1": LayerPlan((1, 4, 5, 6))}, {"criterion": "test"})
ROUTER, NORM = "model.layers.{}.mlp.gate.weight", "model.layers.0.input_layernorm.weight"


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    source = write(tmp_path / "in", *qwen3(), shards=3)
    (source / "tokenizer.json").write_bytes(b"{}")
    (source / "README.md").write_bytes(b"# A model\n")
    prune(source, PLAN, tmp_path / "pruned")
    return tmp_path / "pruned"


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


def check_bytes(source: Path, out: Path, new: Tensors) -> None:
    """Every file is the source's, but for the ranges of `new`, the files that are written anew, and the card, which
    tells of the training."""
    want = tree(source)
    for path in source.glob("*.safetensors"):
        raw = bytearray(want[path.name])
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in read_shard(path)[1].items():
            if name in new:
                first, last = entry["data_offsets"]
                raw[start + first : start + last] = new[name][2]
        want[path.name] = bytes(raw)
    found = tree(out)
    assert found.keys() == want.keys() | {MANIFEST, RECOVERY}
    assert {name for name in want if found[name] != want[name]} <= {MANIFEST, RECOVERY, MODEL_CARD}
    if MODEL_CARD in want:
        assert b"## Training after pruning" in found[MODEL_CARD]
        end = b"<!-- moekern: training -->"
        assert found[MODEL_CARD].partition(end)[0] == want[MODEL_CARD].partition(end)[0]


def test_a_card_tells_that_its_figures_are_older_than_the_training(pruned: Path, tmp_path: Path) -> None:
    loss = {"nll": 2.5, "kl": 0.25, "top1": 0.5, "tokens": 9, "sequences": 1}
    row = {"a": loss | {f"{key}_error": None for key in ("nll", "kl", "top1")}}
    rewrite_card(pruned, evaluation={"losses": {"original": row, "half": row}})
    train(pruned, tmp_path / "new", "layernorm")
    write_replaced(pruned, tmp_path / "out", tmp_path / "new", RECORD)
    older = "<!-- moekern: evaluation -->\nOf the model before the training that is told below:\n\n| measure |"
    assert older in (tmp_path / "out" / MODEL_CARD).read_text()
    assert "makes the model before that training" in (tmp_path / "out" / MODEL_CARD).read_text()


@pytest.mark.parametrize(
    ("copy", "checksum"), [("auto", "xxh3"), ("stream", "none"), ("kernel", "xxh3"), ("kernel", "blake3")]
)
def test_all_other_bytes_stay(pruned: Path, tmp_path: Path, copy: Any, checksum: Any) -> None:
    new = train(pruned, tmp_path / "new", ".gate.", "layernorm", "experts.1.up_proj", files=2)
    before = tree(pruned), tree(tmp_path / "new")
    report = write_replaced(pruned, tmp_path / "out", tmp_path / "new", RECORD, copy=copy, checksum=checksum)
    assert (report.replaced, report.trained, report.tensors, report.shards) == (6, 6, len(read(pruned)), 3)
    check_bytes(pruned, tmp_path / "out", new)
    assert (tree(pruned), tree(tmp_path / "new")) == before
    for line in manifest(tmp_path / "out"):
        names = [name for name in line["tensors"] if name in new]
        assert line["computed"] == names
        assert line.get("recover") == ({"tensors": names} if names else None)
        assert line["plan"] == PLAN.digest
        if checksum == "xxh3":
            assert all(line["tensors"][name] == xxh3(new[name][2]).hex() for name in names)
    assert json.loads((tmp_path / "out" / RECOVERY).read_text()) == {
        "format": "moekern.recovered/1",
        "source_fingerprint": open_checkpoint(pruned).fingerprint,
        "tensors": {name: xxh3(raw).hex() for name, (_, _, raw) in new.items()},
        **RECORD,
    }


TOP_K = "num_experts_per_tok"


def test_a_card_without_a_place_for_the_training_is_copied(pruned: Path, tmp_path: Path) -> None:
    (pruned / MODEL_CARD).write_bytes(b"written by hand \xff")
    train(pruned, tmp_path / "new", ".gate.")
    report = write_replaced(pruned, tmp_path / "out", tmp_path / "new", RECORD)
    assert (tmp_path / "out" / MODEL_CARD).read_bytes() == b"written by hand \xff"
    assert "README.md: copied as it is; it does not tell of the training" in report.notes


def test_settings_become_others_and_nothing_else_of_config(pruned: Path, tmp_path: Path) -> None:
    """In the form that the file has: indented by tabs, a list of equal numbers, escapes."""
    config = json.loads((pruned / "config.json").read_text())
    config |= {TOP_K: 2, "text_config": {"moe_topk": [2, 2], "note": "\u00e9"}, "rope_theta": 1e6}
    (pruned / "config.json").write_text(json.dumps(config, indent="\t") + "\n\n")
    train(pruned, tmp_path / "new", ".gate.")
    settings = {(TOP_K,): 1, ("text_config", "moe_topk"): 1}
    write_replaced(pruned, tmp_path / "out", tmp_path / "new", RECORD, settings=settings)
    before, after = tree(pruned), tree(tmp_path / "out")
    want = config | {TOP_K: 1, "text_config": {"moe_topk": [1, 1], "note": "\u00e9"}}
    assert after["config.json"].decode() == json.dumps(want, indent="\t") + "\n\n"
    told = json.loads(after[RECOVERY])["settings"]
    assert told == {TOP_K: 1, "text_config.moe_topk": 1}
    assert b"text\\_config.moe\\_topk | `1` |" in after[MODEL_CARD]
    assert {name for name in before if before[name] != after[name] and "safetensors" not in name} <= {
        "config.json", MANIFEST, MODEL_CARD,
    }  # fmt: skip
    train(tmp_path / "out", tmp_path / "newer", ".gate.", seed=4)
    write_replaced(tmp_path / "out", tmp_path / "twice", tmp_path / "newer", RECORD)
    assert json.loads((tmp_path / "twice" / RECOVERY).read_text())["settings"] == told
    assert (tmp_path / "twice/config.json").read_bytes() == after["config.json"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("moe_topk",), "config.json: moe_topk: no number is there that could become another"),
        (("architectures",), "config.json: architectures: no number is there"),
        (("model_type", "k"), "config.json: model_type.k: no number is there"),
    ],
)
def test_settings_that_are_not_there_are_refused(
    pruned: Path, tmp_path: Path, path: tuple[str, ...], line: str
) -> None:
    config = json.loads((pruned / "config.json").read_text())
    (pruned / "config.json").write_text(json.dumps(config | {"architectures": ["A"]}))
    train(pruned, tmp_path / "new", ".gate.")
    with pytest.raises(InputError, match=line):
        write_replaced(pruned, tmp_path / "out", tmp_path / "new", RECORD, settings={path: 1})
    assert not work_path(tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["fp8_block", "gptq", "f4", "odd"])
def test_a_single_file_of_any_format_and_its_header(kind: str, tmp_path: Path) -> None:
    """With spaces in its header, and of an odd length: it stays, as do quantised bytes."""
    source = tmp_path / "in"
    config, tensors = qwen3(kind)
    write(source, config, tensors, shards=1, pad=3)
    new = train(source, tmp_path / "new", ".gate.")
    report = write_replaced(open_checkpoint(source), tmp_path / "out", tmp_path / "new", {})
    assert report.replaced == 2
    check_bytes(source, tmp_path / "out", new)
    assert [line["plan"] for line in manifest(tmp_path / "out")] == [None]


def test_what_a_shard_has_that_another_supersedes_stays(tmp_path: Path) -> None:
    config, tensors = qwen3()
    write(tmp_path / "in", config, tensors, shards=1)
    (tmp_path / "in/model.safetensors").unlink()
    names, again = list(tensors), ROUTER.format(0)
    write_parts(tmp_path / "in", tensors, [names, [again, "model.embed_tokens.weight"]])
    new = train(tmp_path / "in", tmp_path / "new", again)
    write_replaced(tmp_path / "in", tmp_path / "out", tmp_path / "new", {})
    first, last = sorted((tmp_path / "out").glob("*.safetensors"))
    assert first.read_bytes() == (tmp_path / "in" / first.name).read_bytes()
    assert read_shard(last)[0] == {**read_shard(tmp_path / "in" / last.name)[0], **new}


def test_blocks_are_shared(tmp_path: Path) -> None:
    with mounted("xfs", 320 * MIB) as point:
        config, tensors = qwen3()
        tensors["model.embed_tokens.weight"] = ("U8", [1 << 20], os.urandom(1 << 20))
        source = write(point / "in", config, tensors, shards=1, pad=5)
        new = train(source, point / "new", ".gate.")
        report = write_replaced(source, point / "out", point / "new", {}, copy="reflink")
        assert report.cloned >= (1 << 20) - 4096
        check_bytes(source, point / "out", new)


def refuse(pruned: Path, tmp_path: Path, line: str, record: Any = RECORD) -> None:
    before = tree(pruned)
    with pytest.raises(InputError, match=line) as error:
        write_replaced(pruned, tmp_path / "out", tmp_path / "new", record)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not work_path(tmp_path / "out").exists()
    assert tree(pruned) == before


Change = Callable[[Path, Tensors], object]


def holding(name: str, dtype: str, *shape: int) -> Change:
    size = {"BF16": 2, "F32": 4}[dtype]
    for each in shape:
        size *= each
    tensors: Tensors = {name: (dtype, list(shape), bytes(size))}
    return lambda folder, new: (folder / "1.safetensors").write_bytes(shard_bytes(tensors))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (holding("model.other", "BF16", 4), "1.safetensors: tensor 'model.other': .*pruned has no tensor of"),
        (holding(NORM, "F32", 4), f"1.safetensors: tensor '{NORM}': is F32; in .*pruned it is BF16"),
        (holding(NORM, "BF16", 4, 1), r"1.safetensors: tensor .*: has shape \[4, 1\]; in .* it has \[4\]"),
        (holding(ROUTER.format(0), "BF16", 4, 4), "1.safetensors: tensor .* is also in 0.safetensors; give it once"),
        (lambda folder, new: (folder / "0.safetensors").rename(folder / ".0.safetensors"), "no safetensors file with"),
        (lambda folder, new: (folder / "0.safetensors").write_bytes(shard_bytes({})), "no safetensors file with"),
        (lambda folder, new: folder.rename(folder.with_name("else")), "new: no such folder"),
        (lambda folder, new: os.truncate(folder / "0.safetensors", 200), "0.safetensors: truncated"),
        (lambda folder, new: os.mkfifo(folder / "1.safetensors"), "1.safetensors: a link, pipe or other thing"),
        (lambda folder, new: (folder / "1.safetensors").symlink_to(folder / "0.safetensors"), "a link, pipe or other"),
        (lambda folder, new: folder.with_name("out").mkdir(), "exists already"),
    ],
)  # fmt: skip
def test_what_fits_no_place_is_refused(pruned: Path, tmp_path: Path, change: Change, line: str) -> None:
    change(tmp_path / "new", train(pruned, tmp_path / "new", ".gate."))
    if "exists already" in line:
        with pytest.raises(InputError, match=line):
            write_replaced(pruned, tmp_path / "out", tmp_path / "new", RECORD)
        return
    refuse(pruned, tmp_path, line)


def of_a_refit(checksums: Any = None, kind: Any = None, **refit: Any) -> str:
    """A line of a manifest."""
    return json.dumps({"tensors": checksums or {}, "checksum": kind, "refit": refit})


NO_MANIFEST, NO_TENSOR = "it is no manifest that moekern wrote", "'a': the checkpoint has no tensor of this name"
OF_A = {"format": "moekern.recovered/1", "source_fingerprint": "0" * 64, "tensors": {"a": "0" * 32}}


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        (MANIFEST, "[]", f"{MANIFEST}: expected a JSON object"),
        (MANIFEST, of_a_refit(tensors=["a"], recipe="x"), NO_MANIFEST),
        (MANIFEST, of_a_refit(["a"], tensors="a", recipe=RECIPE), NO_MANIFEST),
        (MANIFEST, of_a_refit({"a": "é" * 32}, "xxh3-128", tensors=["a"], recipe=RECIPE), NO_MANIFEST),
        (MANIFEST, of_a_refit({"a": "00"}, "blake3", tensors=["a"], recipe=RECIPE), NO_MANIFEST),
        (MANIFEST, of_a_refit(tensors=["a"], recipe=RECIPE), f"{MANIFEST}: {NO_TENSOR}"),
        (RECOVERY, "[" * 10_000, f"{RECOVERY}: not valid JSON"),
        (RECOVERY, json.dumps(OF_A), f"{RECOVERY}: {NO_TENSOR}"),
        (RECOVERY, json.dumps({**OF_A, "settings": {"a": 0}}), f"{RECOVERY}: settings: expected an object of numbers"),
        ("moekern_plan.json", '{"plan_sha256": 5}', "moekern_plan.json: plan_sha256: expected a sha256, got 5"),
    ],
)
def test_a_hostile_source_is_refused(pruned: Path, tmp_path: Path, file: str, content: str, line: str) -> None:
    train(pruned, tmp_path / "new", ".gate.")
    (pruned / file).write_text(content)
    refuse(pruned, tmp_path, line)


def test_records_that_nobody_could_read(pruned: Path, tmp_path: Path) -> None:
    train(pruned, tmp_path / "new", ".gate.")
    deep: Any = 1
    for _ in range(70):
        deep = [deep]
    refuse(pruned, tmp_path, f"{RECOVERY}: not valid JSON: nested more than 64 deep", {"deep": deep})
    for record in ({"loss": float("nan")}, {"tensors": {}}, {"settings": {}}):
        with pytest.raises(ValueError, match="JSON compliant|a key of the file's own"):
            write_replaced(pruned, tmp_path / "out", tmp_path / "new", record)


KILLED = """
import os, signal, sys
from pathlib import Path
from moekern.pruning.replaced import write_replaced
from moekern.publishing.rewritten import rewrite_card
def progress(done, total):
    if done > int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
write_replaced(sys.argv[1], sys.argv[2], Path(sys.argv[3]), {}, progress=progress)
"""


def test_killed_and_resumed(pruned: Path, tmp_path: Path) -> None:
    new, out = train(pruned, tmp_path / "new", ".gate.", "down_proj"), tmp_path / "out"
    write_replaced(pruned, tmp_path / "want", tmp_path / "new", {})
    for nbytes in ("1000", "2000"):  # in the first shard, and behind it
        arguments = [sys.executable, "-c", KILLED, pruned, out, tmp_path / "new", nbytes]
        assert subprocess.run(arguments, cwd=ROOT, check=False).returncode == -signal.SIGKILL
        assert not out.exists()
        assert work_path(out).is_dir()
    report = write_replaced(pruned, out, tmp_path / "new", {})
    assert 0 < report.reused < report.bytes_out
    check_bytes(pruned, out, new)
    assert tree(out) == tree(tmp_path / "want")
    assert not work_path(out).exists()


def test_other_tensors_than_those_of_a_stopped_run(pruned: Path, tmp_path: Path) -> None:
    """What that has written is not taken over where a trained tensor is in it."""
    train(pruned, tmp_path / "new", ".gate.")

    def stop(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_replaced(pruned, tmp_path / "out", tmp_path / "new", {}, progress=stop)
    new = train(pruned, tmp_path / "new", ".gate.", seed=4)
    write_replaced(pruned, tmp_path / "out", tmp_path / "new", {})
    check_bytes(pruned, tmp_path / "out", new)


def test_no_room_on_the_disk_is_one_line(pruned: Path, tmp_path: Path) -> None:
    new, (soft, hard) = train(pruned, tmp_path / "new", ".gate."), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(InputError, match="out: not finished: .*File too large") as error:
            write_replaced(pruned, tmp_path / "out", tmp_path / "new", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    write_replaced(pruned, tmp_path / "out", tmp_path / "new", {})
    check_bytes(pruned, tmp_path / "out", new)


def test_a_file_that_changes_meanwhile(pruned: Path, tmp_path: Path) -> None:
    train(pruned, tmp_path / "new", ".gate.")
    path = tmp_path / "new/0.safetensors"
    with pytest.raises(InputError, match=f"{path} changed while it was copied"):
        write_replaced(
            pruned, tmp_path / "out", tmp_path / "new", {}, progress=lambda done, _: os.utime(path, ns=(done, done))
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("made", ["xxh3", "blake3", "none"])
@pytest.mark.parametrize("copy", ["stream", "kernel"])
def test_what_a_refit_computed_keeps_its_record(tmp_path: Path, copy: Any, made: Any) -> None:
    """But for the tensors that were trained since; the checksum is that of the refit, however it is copied."""
    source = write(tmp_path / "in", *qwen3(), shards=3)
    plan = refit(source, PLAN, tmp_path / "refit")
    prune(source, plan, tmp_path / "pruned", refitted=tmp_path / "refit", checksum=made)
    new = train(tmp_path / "pruned", tmp_path / "new", ".gate.", "0.mlp.experts.1.down_proj")
    write_replaced(tmp_path / "pruned", tmp_path / "out", tmp_path / "new", {}, copy=copy)
    check_bytes(tmp_path / "pruned", tmp_path / "out", new)
    old = {name: xxh3(raw).hex() for name, (_, _, raw) in computed(tmp_path / "refit").items() if name not in new}
    told = {}
    for line in manifest(tmp_path / "out"):
        assert line.get("refit", {"recipe": RECIPE})["recipe"] == RECIPE
        told |= {name: line["tensors"][name] for name in line.get("refit", {"tensors": ()})["tensors"]}
        assert set(line["computed"]) == {name for name in line["tensors"] if name in old | new}
    assert told == (dict.fromkeys(old) if (made, copy) == ("none", "kernel") else old)


@pytest.mark.parametrize("made", ["xxh3", "blake3"])
def test_a_refitted_tensor_that_was_damaged_is_not_taken_for_right(tmp_path: Path, made: Any) -> None:
    source = write(tmp_path / "in", *qwen3(), shards=1)
    plan = refit(source, PLAN, tmp_path / "refit")
    prune(source, plan, tmp_path / "pruned", refitted=tmp_path / "refit", checksum=made)
    train(tmp_path / "pruned", tmp_path / "new", ".gate.")
    path, name = tmp_path / "pruned/model.safetensors", "model.layers.0.mlp.experts.1.down_proj.weight"
    raw, entry = bytearray(path.read_bytes()), read_shard(path)[1][name]
    raw[8 + int.from_bytes(raw[:8], "little") + entry["data_offsets"][0]] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match=f"{name}.*not those that were computed"):
        write_replaced(tmp_path / "pruned", tmp_path / "out", tmp_path / "new", {}, copy="stream")
    assert not (tmp_path / "out").exists()


def test_trained_twice(pruned: Path, tmp_path: Path) -> None:
    """All that was ever trained is named, with the checksum that it has now; the first record goes in whole."""
    first = train(pruned, tmp_path / "new", ".gate.")
    write_replaced(pruned, tmp_path / "once", tmp_path / "new", {"time": 1})
    second = train(tmp_path / "once", tmp_path / "newer", ROUTER.format(1), "layernorm", seed=5)
    report = write_replaced(tmp_path / "once", tmp_path / "twice", tmp_path / "newer", {"time": 2}, copy="kernel")
    assert (report.replaced, report.trained) == (3, 4)
    check_bytes(tmp_path / "once", tmp_path / "twice", second)
    found = json.loads((tmp_path / "twice" / RECOVERY).read_text())
    assert found["earlier"] == json.loads((tmp_path / "once" / RECOVERY).read_text())
    assert found["source_fingerprint"] == open_checkpoint(tmp_path / "once").fingerprint
    assert found["tensors"] == {name: xxh3(raw).hex() for name, (_, _, raw) in (first | second).items()}
    named = [name for line in manifest(tmp_path / "twice") for name in line.get("recover", {"tensors": ()})["tensors"]]
    assert sorted(named) == sorted(found["tensors"])

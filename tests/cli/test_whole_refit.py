"""The command `refit`: what it has written is proved by the same computation, and what it cannot write is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moekern._C as _C
from moekern.architectures import find_layout
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli import whole_refit, whole_run
from moekern.demo import MODEL, TEXT
from moekern.estimation.overview import overview
from moekern.estimation.refit import refitted_bytes
from moekern.plan.channels import channel_text
from moekern.plan.document import Plan
from moekern.pruning.prune import MANIFEST, prune
from tests.helpers import remote_code
from tests.helpers.commands import contents, document, model_and_ids, moekern
from tests.helpers.in_flight import random_plan
from tests.helpers.narrow import narrow_plan
from tests.helpers.quantised_models import plain, twins
from tests.helpers.tight import little_room, tighten


def text(work: Path, tokens: int = 800) -> tuple[object, ...]:
    return ("--data", f"a={work / 'ids.npy'}", "--sequence-length", 40, "--tokens", tokens, "--dtype", "fp32")


def spoil(out: Path, key: str) -> None:
    """Let one weight of the last expert of a refitted layer, and its checksum, be another."""
    name = f"model.layers.{key}.mlp.experts.3.down_proj.weight"
    checkpoint = open_checkpoint(out)
    entry = checkpoint.tensors[name]
    path = out / entry.shard
    raw = bytearray(path.read_bytes())
    raw[entry.start] ^= 1
    path.write_bytes(raw)
    state = _C.Xxh3()
    state.update(bytes(raw[entry.start : entry.stop]))
    lines = [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]
    for line in lines:
        if name in line.get("tensors", {}):
            line["tensors"][name] = state.digest().hex()
    (out / MANIFEST).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_what_was_written_is_computed_again(tmp_path: Path) -> None:
    model = model_and_ids(tmp_path) / "model"
    random_plan(find_layout(open_checkpoint(model)), 0).save(tmp_path / "plan.json")
    command, out = ("refit", model, tmp_path / "plan.json"), tmp_path / "out"
    made = moekern(*command, *text(tmp_path), "--no-forward", "--out", out)
    assert (made.returncode, f"serve with vllm: vllm serve {out}\n" in made.stderr) == (0, True), made.stderr
    before = {**contents(tmp_path)}
    found = document(*command, *text(tmp_path), "--verify", out, "--json")
    full = document(*command, *text(tmp_path), "--verify", out, "--full", "--json")
    assert found["good"]
    assert full["good"]
    assert full["recomputed"] == full["computed"]
    assert 0 < int(str(found["recomputed"])) < int(str(full["recomputed"]))
    assert contents(tmp_path) == before
    for change, line in (
        (("--refine",), "with another refine"),
        (("--width", 16), "with another width"),
        (("--tokens", 400), "to other text"),
        (("--dtype", "bf16"), r"another model, type \(--dtype\)"),
    ):
        done = moekern(*command, *text(tmp_path), *change, "--verify", out)
        assert done.returncode == 2
        assert line.replace("\\", "") in done.stderr
    spoil(out, "3")
    done = moekern(*command, *text(tmp_path), "--verify", out, "--full")
    assert done.returncode == 1
    assert "differs from what is computed again" in done.stderr + done.stdout
    assert moekern("verify", model, out / "moekern_plan.json", out).returncode == 2


def test_what_a_run_has_refitted_is_computed_again_from_the_plan_that_it_keeps(tmp_path: Path) -> None:
    model, out = model_and_ids(tmp_path) / "model", tmp_path / "out"
    narrow = ("--keep", 4, "--until-stable", 0.1, "--refit", "--shape", "6x16", "--reestimate", "--no-forward")
    done = moekern("run", model, *text(tmp_path), *narrow, "--out", out)
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "out.moekern" / "plan.before-refit.json"
    verify = (*text(tmp_path), "--verify", out)
    assert document("refit", model, kept, *verify, "--width", 16, "--reestimate", "--json")["good"]
    for plan, line in (
        (kept, "with another width (16 then, none now), choice;"),
        (tmp_path / "out.moekern" / "plan.json", "from another plan; give the one that its refit was given"),
    ):
        done = moekern("refit", model, plan, *verify)
        assert (done.returncode, line in done.stderr) == (2, True), done.stderr


CHANNELS = "in a format that experts are not narrowed in"
BLOCKS = "their format stores whole blocks of 16 channels; nearest width: 16 or 32"


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("gptq", ("gptq, which is read, and not written", CHANNELS, "one format; use --computed-dtype source")),
        ("compressed_int4_ordered", ("zero points) are read, and not written", CHANNELS, "one format")),
        ("fp8_block", (f"--width 24: {BLOCKS}", f"--shape 6x24: {BLOCKS}", "one format")),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_text_is_read(
    kind: str, lines: tuple[str, ...], tmp_path: Path
) -> None:
    source, _ = twins(plain("qwen3_moe", tmp_path / "plain"), tmp_path, kind, only=".experts.")
    random_plan(find_layout(open_checkpoint(source)), 0).save(tmp_path / "plan.json")
    (tmp_path / "text.txt").write_text("the model has no tokenizer")
    refit, options = ("refit", source, tmp_path / "plan.json"), ("--data", tmp_path / "text.txt")
    commands = (
        (*refit, "--width", 24),
        ("run", source, "--keep", 4, "--refit", "--shape", "6x24" if kind == "fp8_block" else "auto"),
        (*refit, "--computed-dtype", "bf16"),
    )
    for command, line in zip(commands, lines, strict=True):
        done = moekern(*command, *options, "--out", tmp_path / "out")
        assert (done.returncode, line in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out.moekern").exists()


@pytest.mark.whole
def test_a_shape_of_quantised_experts_is_one_that_their_format_holds(tmp_path: Path) -> None:
    source, _ = twins(plain("qwen3_moe", tmp_path / "plain", 64), tmp_path, "mxfp4", only=".experts.")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 90, (40, 32)))
    options = ("--data", tmp_path / "ids.npy", "--sequence-length", 32, "--refit", "--shape", "auto", "--keep", 0.5)
    out = tmp_path / "out"
    done = moekern("run", source, *options, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "equal to the original, pruned and refitted in memory" in done.stderr
    said = json.loads((tmp_path / "out.moekern" / "plan.json").read_text())["provenance"]["shape"]
    assert {*said["tried"]} == {"4x64", "8x32"}
    data = ("--data", tmp_path / "ids.npy", "--sequence-length", 32)
    assert moekern("evaluate", out, *data).returncode == 0


def test_layers_that_cannot_be_refitted_are_refused_before_any_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family_checkpoint: Callable[[str], Path]
) -> None:
    """A family whose forward passes are suspended, experts in a list, and layers that memory has no room for."""
    listed = remote_code.write(tmp_path / "list", next(iter(remote_code.STYLES)))
    source = family_checkpoint("qwen3_moe")
    (tmp_path / "text.txt").write_text("the models have no tokenizer")
    for model, line in (
        (family_checkpoint("inkling2"), "inkling2: its decoder layers hand on more than hidden states; prune it"),
        (listed, "layer 1: its experts are not held together"),
        (source, "and such layers are not refitted; give more (--memory, --gpu-memory)"),
    ):
        if model == source:
            tighten(monkeypatch, source)
        random_plan(find_layout(open_checkpoint(model)), 0).save(tmp_path / "plan.json")
        for command in (("run", model, "--keep", 0.5, "--refit"), ("refit", model, tmp_path / "plan.json")):
            options = ("--data", tmp_path / "text.txt", "--out", tmp_path / "out", "--trust-remote-code")
            done = moekern(*command, *options)
            assert (done.returncode, line in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out.moekern").exists()


def test_text_that_there_is_no_room_for_is_refused_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little_room(monkeypatch, 1 << 20, 1 << 20)
    data = ("--data", TEXT / "c" / "calibration.txt", "--tokens", 3000, "--sequence-length", 100)
    done = moekern("run", MODEL, *data, "--keep", 0.5, "--refit", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "a refit takes all of it at once: about" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_text_of_too_few_sequences_is_told(tmp_path: Path) -> None:
    """Nothing can be held back of it: to choose by, or to judge by."""
    plan = {"format": "moekern.plan/1", "layers": {str(i): {"keep": list(range(8))} for i in range(4)}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    few = ("--data", TEXT / "c" / "calibration.txt", "--tokens", 300, "--sequence-length", 100, "--no-forward")
    done = moekern("refit", MODEL, tmp_path / "plan.json", *few, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    said = done.stderr + done.stdout
    assert "no domain has the 4 sequences of which one is held back" in said
    assert "no text was held back to judge it by" in said


@pytest.mark.parametrize(
    ("width", "target", "line"),
    [
        ("9", "sglang", "sglang would not run it: experts have 9 channels: its activation"),
        ("9999", "vllm", "experts have 32 channels"),
    ],
)
def test_a_width_that_does_not_run_is_refused_before_any_text_is_read(
    width: str, target: str, line: str, tmp_path: Path
) -> None:
    source = plain("qwen3_moe", tmp_path / "plain")
    plan = random_plan(find_layout(open_checkpoint(source)), 0)
    plan.save(tmp_path / "plan.json")
    channels = channel_text(np.arange(int(width)), int(width))
    Plan({key: replace(layer, channels=(channels,) * len(layer.keep)) for key, layer in plan.layers.items()}).save(
        tmp_path / "narrow.json"
    )
    (tmp_path / "text.txt").write_text("the model has no tokenizer")
    refit, narrow = ("refit", source, tmp_path / "plan.json"), ("refit", source, tmp_path / "narrow.json")
    of_a_plan = line if width == "9" else "experts have 0 to 31"
    for command, says in (
        (("run", source, "--keep", 4, "--refit", "--shape", f"4x{width}"), f"--shape 4x{width}: {line}"),
        ((*refit, "--width", width), f"--width {width}: {line}"),
        (narrow, of_a_plan),
    ):
        done = moekern(*command, "--target", target, "--data", tmp_path / "text.txt", "--out", tmp_path / "out")
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out.moekern").exists()


def test_refitted_layers_need_room_that_is_looked_for_before_any_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the target, in its work folder, until it is done; where they are compared, in the folder of --spill."""
    source = plain("qwen3_moe", tmp_path / "plain")
    checkpoint = open_checkpoint(source)
    layout, found = find_layout(checkpoint), overview(checkpoint)
    plan = random_plan(layout, 0)
    plan.save(tmp_path / "plan.json")
    monkeypatch.setattr(whole_refit, "room_needed", lambda checkpoint, folder, nbytes: nbytes)
    monkeypatch.setattr(whole_run, "room_needed", lambda checkpoint, folder, nbytes: nbytes)
    kept = {key: len(layer.keep) for key, layer in plan.layers.items()}
    layers = refitted_bytes(checkpoint, layout, kept, all_parts=False)
    size = found.bytes_at(next(iter(kept.values())))
    status = list(os.statvfs(tmp_path))
    (tmp_path / "text.txt").write_text("the model has no tokenizer")
    data = ("--data", tmp_path / "text.txt")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "moekern_plan.json").write_text(json.dumps({"plan": json.loads(plan.to_json())}))
    out, other = ("--out", tmp_path / "out"), ("--verify", tmp_path / "made", "--spill", tmp_path)
    refit, run = ("refit", source, tmp_path / "plan.json"), ("run", source, "--keep", next(iter(kept.values())))
    for command, needed in (
        ((*refit, *out), size + layers),
        ((*refit, *out, "--refine"), size + 3 * layers),
        ((*refit, *out, "--width", 16), found.bytes_at(next(iter(kept.values())), 16) + layers // 2),
        ((*run, *out, "--refit"), size + layers),
        ((*refit, *other), layers),
    ):
        status[1], status[4] = 1, needed - 1  # f_frsize, f_bavail
        with monkeypatch.context() as patch:
            patch.setattr(os, "statvfs", lambda path: os.statvfs_result(status))
            short = moekern(*command, *data)
            status[4] = needed
            enough = moekern(*command, *data)
        assert (short.returncode, short.stderr.count("of it for refitted layers until it is done")) == (2, 1), short
        assert "of it for refitted layers" not in enough.stderr
        assert not (tmp_path / "out.moekern").exists()


def test_experts_are_chosen_anew_by_a_criterion_alone(tmp_path: Path) -> None:
    """What cannot be is refused before any text is read."""
    source = plain("qwen3_moe", tmp_path / "plain")
    random_plan(find_layout(open_checkpoint(source)), 0).save(tmp_path / "plan.json")
    (tmp_path / "text.txt").write_text("the model has no tokenizer")
    run, again = ("run", source, "--keep", 4), ("--reestimate", "--data", tmp_path / "text.txt")
    for command, line in (
        (run, "--reestimate: goes with --refit"),
        ((*run, "--refit", "--protect-super"), "--reestimate: some experts are to stay or go whatever their score"),
        ((*run, "--refit", "--criterion", "ewn"), "--reestimate: ewn looks at weights alone"),
        (("refit", source, tmp_path / "plan.json"), "--reestimate: the plan does not say by which criterion"),
    ):
        done = moekern(*command, *again, "--out", tmp_path / "out")
        assert (done.returncode, line in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out.moekern").exists()


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ("99x16", "--shape 99x16: more than the 8 experts there are; nearest legal: 8"),
        ("5x16", "--shape 5x16: sglang:ep=2 would not run it: experts must be a multiple of ep=2"),
    ],
)
def test_a_shape_s_number_of_experts_is_looked_at_before_any_text_is_read(
    shape: str, line: str, tmp_path: Path
) -> None:
    source = plain("qwen3_moe", tmp_path / "plain")
    (tmp_path / "text.txt").write_text("the model has no tokenizer")
    done = moekern(
        "run", source, "--keep", 4, "--refit", "--shape", shape, "--target", "sglang:ep=2",
        "--data", tmp_path / "text.txt", "--out", tmp_path / "out",
    )  # fmt: skip
    assert (done.returncode, line in done.stderr) == (2, True), done.stderr


def test_a_target_may_run_the_narrower_experts_alone(tmp_path: Path, family_checkpoint: Callable[[str], Path]) -> None:
    """Of experts with 18 channels transformers' grouped product takes none in float32; of 16 it does."""
    whole = family_checkpoint("qwen3_moe")
    source = tmp_path / "source"
    prune(whole, narrow_plan(find_layout(open_checkpoint(whole)), tuple(range(8)), 18, 0), source)
    (tmp_path / "text.txt").write_text("the model has no tokenizer")
    options = ("--target", "transformers", "--data", tmp_path / "text.txt", "--out", tmp_path / "out")
    for shape, line in (
        (("--shape", "4x16"), "tokenizer"),
        (("--shape", "auto"), "tokenizer"),
        (("--shape", "4x18"), "--shape 4x18: transformers would not run it: experts have 18 channels"),
        (("--shape", "auto", "--target", "vllm:tp=11"), "--shape auto: no shape of experts that hold the share runs"),
        ((), "--keep 4: transformers would not run it: experts have 18 channels"),
    ):
        done = moekern("run", source, "--keep", 4, "--refit", *shape, *options)
        assert (done.returncode, line in done.stderr) == (2, True), done.stderr


def test_a_plan_is_held_against_targets_before_any_text_is_read(tmp_path: Path) -> None:
    source = plain("qwen3_moe", tmp_path / "plain")
    plan = random_plan(find_layout(open_checkpoint(source)), 0)
    plan.save(tmp_path / "plan.json")
    narrow = {key: replace(layer, channels=("ff",) * len(layer.keep)) for key, layer in plan.layers.items()}
    Plan(narrow).save(tmp_path / "narrow.json")
    (tmp_path / "text.txt").write_text("the model has no tokenizer")
    for name, more, says in (
        ("plan", ("--target", "sglang:ep=5"), "plan: sglang:ep=5 would not run it: experts must be a multiple"),
        ("plan", ("--target", "llama.cpp", "--width", 16), "llama.cpp: experts have 16 channels: K-quants"),
        ("narrow", ("--width", 4), "--width 4: the plan says which channels stay, 8 of each expert"),
    ):
        data = ("--data", tmp_path / "text.txt", "--out", tmp_path / "out")
        done = moekern("refit", source, tmp_path / f"{name}.json", *data, *more)
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr

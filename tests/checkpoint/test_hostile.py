"""A hostile checkpoint ends in one clear line: nothing is believed, allocated, printed raw or written."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekern.architectures import find_layout
from moekern.checkpoint import header as module
from moekern.checkpoint.folder import INDEX, SINGLE, open_checkpoint
from moekern.checkpoint.header import parse_header
from moekern.checkpoint.strict_json import HEADER_CAP
from moekern.errors import InputError
from moekern.plan.document import LayerPlan, Plan
from moekern.pruning.prune import prune
from tests.helpers.bad_files import BAD, EXPECTED, GOOD, HOSTILE, MADE, entry, judge, kept, mutated, raw, single, valid
from tests.helpers.commands import moekern
from tests.helpers.synthetic import deepseek_v3, qwen3, tree, write

PLAN = Plan({key: LayerPlan((0, 2, 4, 6)) for key in ("0", "1")}, {})
# for each byte of JSON, see open_checkpoint; and what an error, a path and a file object take
BYTES_FOR_A_BYTE, OVERHEAD = 32, 1 << 18


def refusal(folder: Path) -> tuple[str, int]:
    """The error that the folder ends in, and the most bytes that were allocated on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            open_checkpoint(folder)
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_every_kept_file_is_small_and_has_its_message() -> None:
    held = {path.relative_to(BAD).as_posix() for part in ("headers", "folders") for path in (BAD / part).iterdir()}
    assert held == EXPECTED.keys()
    assert all(path.stat().st_size < 4096 for path in BAD.glob("*/**/*") if path.is_file())


@pytest.mark.parametrize("name", EXPECTED)
def test_kept(tmp_path: Path, name: str) -> None:
    folder = kept(name, tmp_path)
    message, peak = refusal(folder)
    assert message.startswith(str(folder))
    assert EXPECTED[name] in message
    assert message.isprintable()
    assert peak < OVERHEAD + BYTES_FOR_A_BYTE * sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("name", MADE)
def test_made(tmp_path: Path, name: str) -> None:
    make, expected = MADE[name]
    folder = tmp_path / "m"
    make(folder)
    message, peak = refusal(folder)
    assert message.startswith(str(folder))
    assert expected in message
    assert message.isprintable()
    assert len(message) < 2100
    # a header as long as the limit allows is read before it is looked at; all else here is refused unread or is short
    assert peak < OVERHEAD + (HEADER_CAP if name == "header of zeros" else BYTES_FOR_A_BYTE * 1_000_000)


@pytest.mark.parametrize("name", [name for name in MADE if name.startswith(("huge", "terabyte", "header above"))])
def test_declared_sizes_take_no_memory(tmp_path: Path, name: str) -> None:
    MADE[name][0](tmp_path / "m")
    assert refusal(tmp_path / "m")[1] < OVERHEAD


@pytest.mark.parametrize(
    "piece", [b"[],", b"{},", b'{"":0},', b"999,", b'"ab",', b'"%06d":0,', b'"%06d":{},', b'"%06d":[],']
)
@pytest.mark.parametrize("count", [30_000, 44_000])
def test_a_header_of_tiny_values_takes_memory_in_proportion(piece: bytes, count: int) -> None:
    named = b"%" in piece
    items = b"".join(piece % i if named else piece for i in range(count))[:-1]
    text = b"{" + items + b"}" if named else b'{"t":[' + items + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            parse_header(text, Path("x"), 8 + len(text))
        assert tracemalloc.get_traced_memory()[1] < BYTES_FOR_A_BYTE * len(text)
    finally:
        tracemalloc.stop()


def test_the_densest_header_that_opens_takes_memory_in_proportion() -> None:
    text = b"{" + b",".join(
        b'"%x":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(40_000)
    )
    tracemalloc.start()
    try:
        assert len(parse_header(text + b"}", Path("x"), 8 + len(text) + 1 + 40_000).tensors) == 40_000
        assert tracemalloc.get_traced_memory()[1] < BYTES_FOR_A_BYTE * len(text)
    finally:
        tracemalloc.stop()


def test_a_file_that_shrinks_between_look_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = single(tmp_path, GOOD)
    seen = module.regular_size

    def then_cut(path: Path) -> int:
        size = seen(path)
        if path.name == SINGLE:
            os.truncate(path, 20)
        return size

    monkeypatch.setattr(module, "regular_size", then_cut)
    with pytest.raises(InputError, match=r"model.safetensors: the file has shrunk to 20 bytes"):
        open_checkpoint(folder)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    single(tmp_path, GOOD)
    monkeypatch.setattr(Path, "open", refuse)  # root may read anything
    with pytest.raises(InputError, match=r"config.json: Permission denied"):
        open_checkpoint(tmp_path)


def test_a_table_too_large_for_its_place_is_not_read(tmp_path: Path) -> None:
    content = raw({"t": entry(0, 1 << 40)})
    os.truncate(single(tmp_path, content) / SINGLE, len(content) + (1 << 40))
    with pytest.raises(InputError, match="t: 1099511627776 bytes are too many"):
        open_checkpoint(tmp_path).array("t")


@pytest.mark.parametrize("total", [-1, 1e999, "x", None, [], 2**70, float("nan")])
def test_a_total_size_of_nonsense_is_not_believed(tmp_path: Path, total: Any) -> None:
    config, tensors = qwen3()
    folder = write(tmp_path / "in", config, tensors)
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["total_size"] = total
    (folder / INDEX).write_text(json.dumps(index))
    prune(folder, PLAN, tmp_path / "out")
    held = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"]
    assert held == sum(shard.size - shard.data_start for shard in open_checkpoint(tmp_path / "out").shards)


KEYS = (
    "num_experts", "n_routed_experts", "num_experts_per_tok", "num_hidden_layers", "n_group", "topk_group",
    "model_type", "num_nextn_predict_layers", "first_k_dense_replace", "quantization_config", "text_config",
    "architectures",
)  # fmt: skip


@pytest.mark.parametrize("make", [qwen3, pytest.param(deepseek_v3, marks=pytest.mark.whole)])
def test_configs_of_wrong_types(tmp_path: Path, make: Any) -> None:
    config, tensors = make()
    folder = write(tmp_path / "in", config, tensors)
    opened, said = 0, list[str]()
    for key in KEYS:
        for value in (*HOSTILE, float("nan"), [8, "8"], [[8]], {"num_experts": -8}):
            (folder / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                layout = find_layout(open_checkpoint(folder))
            except InputError as error:
                said.append(str(error))
                continue
            assert (layout.num_experts, 1 <= layout.router.top_k <= 8, 8 % layout.n_group) == (8, True, 0)
            opened += 1
    assert all(line.startswith(str(folder)) and line.isprintable() for line in said)
    assert opened > len(HOSTILE)  # keys that say nothing here may hold anything


@settings(max_examples=400)
@given(rng=st.randoms(use_true_random=False), changes=st.integers(0, 4))
def test_mutated_files_are_refused_or_read_as_the_library_reads_them(rng: random.Random, changes: int) -> None:
    content = valid(rng)
    for _ in range(changes):
        content = mutated(content, rng)
    assert judge(content) or changes > 0


def test_mutations_are_of_both_kinds() -> None:
    verdicts = [judge(mutated(valid(rng), rng)) for rng in map(random.Random, range(1000))]
    assert 50 < sum(verdicts) < 500


SHOWN = [
    "headers/terminal_codes_in_a_name.safetensors",
    "headers/newline_in_a_name.safetensors",
    "headers/lone_surrogate.safetensors",
    "headers/overlap.safetensors",
    "headers/nested_lists.safetensors",
    "folders/config_nested_lists",
    "folders/index_climbs_out",
    "folders/index_newline",
    "folders/only_a_pickle",
]


# How a line is encoded, and that nothing else is written, is seen of a process; the other cases run in this one.
IN_A_PROCESS = ("headers/lone_surrogate.safetensors", "file name of terminal codes")


def spoken(command: list[str], folder: Path, process: bool) -> tuple[int, bytes, bytes]:
    """How a command ends in a folder, and what it writes to standard output and error."""
    if process:
        environment = {**os.environ, "PYTHONPATH": str(BAD.parents[1])}
        line = [sys.executable, "-m", "moekern", *command]
        done = subprocess.run(line, cwd=folder, capture_output=True, timeout=120, env=environment)
        return done.returncode, done.stdout, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, out, err = moekern(*command)
    return code, out.encode(), err.encode()


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", [*SHOWN, "pipe", "dangling link", "file name of terminal codes"])
def test_the_command_line_says_one_line_and_writes_nothing(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    if name in MADE:
        MADE[name][0](folder)
    elif name.startswith("headers/"):
        single(folder, (BAD / name).read_bytes())
    else:
        folder.symlink_to(BAD / name)
    expected = MADE[name][1] if name in MADE else EXPECTED[name]
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    before, kept_before = listing(tmp_path), tree(BAD)
    for command in (["inspect", "m"], ["prune", "m", "plan.json", "--out", "o"]):
        code, out, err = spoken(command, tmp_path, name in IN_A_PROCESS)
        line, end = err.decode()[:-1], err[-1:]
        assert (code, out, end) == (2, b"", b"\n")
        assert line.startswith("moekern: m")
        assert expected in line
        assert line.isprintable()
    assert (listing(tmp_path), tree(BAD)) == (before, kept_before)


def test_config_that_says_infinity_is_kept(tmp_path: Path) -> None:
    config, tensors = qwen3()
    folder = write(tmp_path / "in", {**config, "time_step_limit": [0.0, math.inf]}, tensors)
    prune(folder, PLAN, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config["time_step_limit"] == [0.0, math.inf]

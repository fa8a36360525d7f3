"""Odd data, stopped commands and odd output: one clear line, nothing left, nothing cut short."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from moekern.checkpoint.folder import open_checkpoint
from moekern.cli import console, pipeline, whole_run
from moekern.cli import tour as show
from moekern.cli.earlier import earlier_statistics
from moekern.cli.given import parsed_size
from moekern.cli.verify import show_verdict
from moekern.data.read import read_data
from moekern.data.text import Text
from moekern.demo import MODEL, TEXT
from moekern.errors import InputError
from moekern.measurement.recorder import Recorder
from moekern.model.compute import Compute, check_device
from moekern.plan.document import Plan
from moekern.plan.several import Planning
from moekern.verification.tensors import MAX_PROBLEMS, VerifyReport
from tests.helpers import ROOT
from tests.helpers.commands import signalled
from tests.helpers.measured import layer_statistics


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"input_ids": [1, 100000000000000000000]}', "d.jsonl: first: line 1: expected text"),
        ('{"text": "a \\ud800 b"}', "d.jsonl: first: line 1: text holds half a surrogate pair"),
        ('{"messages": [1, 2]}', "d.jsonl: first: line 1: messages: expected objects"),
        ("[" * 100_000, "d.jsonl: first: line 1: not JSON"),
    ],
)
def test_odd_rows_are_named(row: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(row)
    with pytest.raises(InputError, match=message):
        read_data([str(tmp_path / "d.jsonl")], MODEL)


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour " * 20
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n"
    )
    (tmp_path / "b.txt").write_bytes(text.encode())
    one, other = (read_data([str(tmp_path / name)], MODEL).batches[0].input_ids for name in ("a.jsonl", "b.txt"))
    assert one.tolist() == other.tolist()


def test_an_archive_of_arrays_is_no_array(tmp_path: Path) -> None:
    with (tmp_path / "d.npy").open("wb") as file:
        np.savez(file, a=np.arange(5))
    with pytest.raises(InputError, match="not a readable .npy"):
        read_data([str(tmp_path / "d.npy")], MODEL)


def test_an_array_of_terabytes_is_declared_and_not_there(tmp_path: Path) -> None:
    with (tmp_path / "d.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**13,)})
    with pytest.raises(InputError, match="d.npy: not a readable .npy"):
        read_data([str(tmp_path / "d.npy")], MODEL)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("tokenizer.json", (256 << 20) + 1, "tokenizer.json: [0-9]+ bytes, more than the limit"),
        ("tokenizer_config.json", (4 << 20) + 1, "tokenizer_config.json: [0-9]+ bytes, more than the limit"),
        ("added_tokens.json", None, "added_tokens.json: not a regular file"),
        ("chat_template.jinja", None, "chat_template.jinja: not a regular file"),
    ],
)
def test_files_of_a_tokenizer_are_files_of_their_size(name: str, size: int | None, reason: str, tmp_path: Path) -> None:
    for path in (*MODEL.glob("*.json"),):
        shutil.copy(path, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if size is None:
        os.mkfifo(tmp_path / name)
    else:
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    with pytest.raises(InputError, match=reason):
        read_data([f"a={TEXT / 'c'}"], tmp_path)


@pytest.mark.parametrize("device", ["", "meta", "hpu", "cpu cpu", "cuda:9999", "\x1b[31m"])
def test_a_device_that_is_none_is_named(device: str) -> None:
    with pytest.raises(InputError, match="^--device") as caught:
        check_device(device)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["1" * 400, "9" * 30 + "GB", "nan", "-1", "", "1e5"])
def test_a_size_that_is_none_is_named(text: str) -> None:
    with pytest.raises(InputError, match="^--fit"):
        parsed_size("--fit", text)


def test_names_reach_the_terminal_without_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("a \x1b[31m b")
    console.show("t \x1b[31m", ("plan",), [("p\x1b]0;x\x07 \udcff.json",)])
    console.fail("e \x1b[31m", "plan")
    out = capsys.readouterr()
    assert all(c.isprintable() for c in (out.out + out.err).replace("\n", ""))
    assert "p\\x1b]0;x\\x07 \\udcff.json" in out.out


def test_pipes_empty_paths_names_and_seeds_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for spec, message in (
        (str(tmp_path / "pipe"), "a pipe or a device"),
        ("a=", "no path is given"),
        ("", "no path is given"),
        (f"a\udcff={TEXT}", "a plain name"),
    ):
        with pytest.raises(InputError, match=message):
            read_data([spec], MODEL)
    with pytest.raises(InputError, match="--seed -1"):
        read_data([f"a={TEXT}"], MODEL, seed=-1)


def test_a_tokenizer_made_from_nothing_is_none(tmp_path: Path) -> None:
    shutil.copy(MODEL / "config.json", tmp_path)
    with pytest.raises(InputError, match="no usable tokenizer.*its vocabulary is empty"):
        read_data([f"a={TEXT / 'c'}"], tmp_path)


def test_a_tokenizer_with_code_of_its_own_is_asked_for_by_flag_alone(tmp_path: Path) -> None:
    code = "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast):\n    pass\n"
    (tmp_path / "mine.py").write_text(code)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(MODEL / name, tmp_path)
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    data = read_data([f"a={TEXT / 'c'}"], tmp_path, tokens=64, trust_remote_code=True)
    assert data.tokens == {"a": 64}


def test_tables_are_neither_cut_short_nor_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"domain{i}" for i in range(40)]
    console.show("t [/x]", ("plan", "[/b]", *names), [("plans[/half].json", *(f"{i}.1415" for i in range(41)))])
    shown = capsys.readouterr().out
    assert "…" not in shown
    for text in ("t [/x]", "[/b]", "plans[/half].json", *names, "40.1415"):
        assert text in shown


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_folds_long_names_and_headings_and_cuts_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    names = [f"a-folder-of-plans/{'x' * 60}/{n}.json" for n in range(2)]
    rows = [(*names, "0.123", "0.456 (layer 12)", "12.34%"), (*names[::-1], "1.123", "0.456 (layer 2)", "99.99%")]
    with redirect_stdout(Terminal()) as stream:
        console.show("t", ("plan", "and", "kept by both of them", "the lowest of all", "share of the text"), rows)
    shown = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in stream.getvalue().splitlines()]
    assert max(map(len, shown)) <= 80
    assert "…" not in "".join(shown)
    for cell in rows[0][2:]:
        assert any(cell in line for line in shown)
    end = next(line.index(" and ") for line in shown if " and " in line)
    assert names[0] in "".join(line[1:end].strip() for line in shown)


def test_sentences_of_a_table_are_wrapped_by_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and names are on one line either way."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    reason = "the code of this engine needs a key that config.json lacks, and no count runs there"
    shown = {}
    for stream in (Terminal(), StringIO()):
        with redirect_stdout(stream):
            console.show("t", ("target", "size", "because"), [("one", "1 GiB", ""), ("two", "2 GiB", reason)])
        shown[type(stream)] = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in stream.getvalue().splitlines()]
    assert max(map(len, shown[Terminal])) <= 60
    assert reason in " ".join(" ".join(shown[Terminal]).split())
    assert any("2 GiB" in line and "the code of" in line for line in shown[Terminal])
    assert any(reason in line for line in shown[StringIO])


def test_a_list_of_differences_that_is_cut_short_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for count in (MAX_PROBLEMS - 1, MAX_PROBLEMS):
        show_verdict(pipeline.Verdict(VerifyReport(tuple(f"t{i}: missing" for i in range(count)), 0, 0), None))
        said = capsys.readouterr().err.splitlines()
        assert len([line for line in said if line.startswith("wrong: ")]) == count
        assert ("only the first 100 are listed" in said) == (count == MAX_PROBLEMS)


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit({"a": [1.5, float("nan")], "b": {"c": float("inf")}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [1.5, None], "b": {"c": None}}


def test_sums_that_are_not_finite_stop_the_run() -> None:
    recorder, sums = Recorder("softmax"), layer_statistics(0)
    top_k = int(sums.count.sum()) // 40
    recorder.sums = {"3": {"a": sums}}
    assert list(recorder.take("3", top_k)) == ["a"]
    sums.norm_sum[1] = float("inf")
    recorder.sums = {"3": {"a": sums}}
    with pytest.raises(InputError, match="layer 3, domain a: norm_sum: not finite for expert 1: .*--dtype"):
        recorder.take("3", top_k)


def _plan() -> Plan:
    layers = {str(i): {"keep": [0, 1, 2, 3]} for i in range(4)}
    return Plan.from_json(json.dumps({"format": "moekern.plan/1", "layers": layers}))


def test_a_plan_cannot_take_the_place_of_the_original() -> None:
    text = Text((f"a={TEXT / 'c'}",), tokens=64)
    with pytest.raises(InputError, match="a plan is named 'original'"):
        pipeline.evaluate_plans(MODEL, text, Compute(), {"original": _plan()})


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_a_stopped_command_says_so_and_leaves_nothing(number: signal.Signals, name: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(_plan().to_json())
    done = signalled(number, tmp_path, "prune", MODEL, "plan.json", "--out", "o")
    assert (done.returncode, done.stderr) == (128 + number, f"moekern: stopped by {name}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("stream", "command", "code"),
    [("stdout", ["criteria"], 141), ("stderr", ["prune", "none", "none", "--out", "o"], 2)],
)
def test_a_closed_pipe_ends_a_command_by_its_signal_and_hides_no_error(
    tmp_path: Path, stream: str, command: list[str], code: int
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    done = subprocess.run([sys.executable, "-m", "moekern", *command], cwd=tmp_path, check=False, **streams)  # type: ignore[call-overload]
    os.close(writer)
    assert done.returncode == code
    assert [done.stdout or b"", done.stderr or b""] == [b"", b""]


def test_a_demo_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "measured", fail)
    with pytest.raises(KeyboardInterrupt):
        show.run_demo(tmp_path / "demo", 1)
    assert list(tmp_path.iterdir()) == []


def test_statistics_in_another_dtype_are_not_used_again(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(MODEL)
    text, compute = Text((f"a={TEXT / 'c'}",), tokens=256, sequence_length=64), Compute(dtype="float32")
    path = tmp_path / "s.safetensors"
    pipeline.calibrate_to(MODEL, text, compute, path, tiers=["routed"])
    data = text.read(checkpoint)
    same = (path, checkpoint, data)
    assert earlier_statistics(*same, compute, ["routed"], restart=False) is not None
    assert earlier_statistics(*same, compute, ["routed"], restart=True) is None
    with pytest.raises(InputError, match=r"with another .*--dtype \(float32 then, bfloat16 now\); give the same again"):
        earlier_statistics(*same, replace(compute, dtype="bfloat16"), ["routed"], restart=False)


def test_a_source_distribution_can_be_built_from(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = ["setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "moekern/py.typed"]
    needed += [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    needed += [f"moekern/demo/{p.relative_to(MODEL.parent).as_posix()}" for p in MODEL.iterdir()]
    assert set(needed) <= held


def test_the_demo_loads_its_model_without_noise(capfd: pytest.CaptureFixture[str]) -> None:
    assert len(show.generate(MODEL, new_tokens=2)) == 3
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_run_stopped_while_calibrating_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "calibrate", stop)
    text, compute = Text((f"a={TEXT / 'c'}",), tokens=64), Compute(dtype="float32")
    with pytest.raises(KeyboardInterrupt):
        whole_run.run_stages(MODEL, text, compute, tmp_path / "o", whole_run.Asked(Planning(("reap",), (8,))))
    assert list(tmp_path.iterdir()) == []

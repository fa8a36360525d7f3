"""--json: one document on standard output; on standard error nothing but objects, a line each, the error the last."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from greenlet import greenlet

from moekern.architectures import find_layout
from moekern.benchmark import run as benchmark
from moekern.checkpoint.folder import open_checkpoint
from moekern.cli import console
from moekern.demo import MODEL
from moekern.errors import InputError
from tests.helpers.commands import Done, model_and_ids, moekern, signalled


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, token ids, statistics, a plan and the pruned model."""
    folder = model_and_ids(tmp_path_factory.mktemp("json"), 200)
    commands: list[tuple[object, ...]] = [
        ("calibrate", folder / "model", *text(folder), "--out", folder / "s.safetensors"),
        ("plan", folder / "s.safetensors", "--keep", 4, "--out", folder / "plan.json"),
        ("prune", folder / "model", folder / "plan.json", "--out", folder / "pruned"),
    ]
    for command in commands:
        assert moekern(*command).returncode == 0
    return folder


def text(folder: Path) -> tuple[object, ...]:
    return ("--data", f"a={folder / 'ids.npy'}", "--sequence-length", 40)


def told(done: Done) -> list[dict[str, Any]]:
    """The objects on standard error."""
    return [json.loads(line) for line in done.stderr.splitlines()]


Command = Callable[[Path, Path], tuple[object, ...]]

# Command -> how it is called in a work folder with a place to write, and the stages that it tells of.
LONG: dict[str, tuple[Command, list[str]]] = {
    "calibrate": (lambda w, out: ("calibrate", w / "model", *text(w), "--out", out), ["calibrating"]),
    "evaluate": (lambda w, out: ("evaluate", w / "model", *text(w), w / "plan.json"), ["evaluating"]),
    "iterate": (
        lambda w, out: ("iterate", w / "model", *text(w), "--keep", 4, "--out", out),
        ["measuring and planning"],
    ),
    "prune": (lambda w, out: ("prune", w / "model", w / "plan.json", "--out", out), ["pruning"]),
    "verify": (
        lambda w, out: ("verify", w / "model", w / "plan.json", w / "pruned", "--forward"),
        ["verifying", "comparing logits"],
    ),
    "run": (
        lambda w, out: ("run", w / "model", *text(w), "--keep", 4, "--out", out),
        ["calibrating", "evaluating held-out text", "pruning", "verifying", "comparing logits"],
    ),
    "score": (lambda w, out: ("score", w / "model", "--criterion", "aimer"), ["weighing"]),
    "plan": (lambda w, out: ("plan", w / "model", "--criterion", "aimer", "--keep", 4, "--out", out), ["weighing"]),
}


@pytest.mark.parametrize("name", LONG)
def test_progress_is_json_lines_and_the_result_one_document(name: str, work: Path, tmp_path: Path) -> None:
    command, stages = LONG[name]
    done = moekern(*command(work, tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    lines = told(done)
    assert all(set(line) == {"note"} or {"stage", "unit", "done", "total"} <= set(line) for line in lines)
    steps = [line for line in lines if "stage" in line]
    assert list(dict.fromkeys(line["stage"] for line in steps)) == stages
    for stage in stages:
        last = [line for line in steps if line["stage"] == stage][-1]
        assert last["done"] == last["total"] > 0


def test_what_a_person_is_told_is_a_note(work: Path, tmp_path: Path) -> None:
    command = LONG["calibrate"][0](work, tmp_path / "out")
    notes = [line["note"] for line in told(moekern(*command, "--json")) if "note" in line]
    assert any(note.startswith("kernels: native (") for note in notes)


def test_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = {"op": "router_stats", "case": "a", "backend": "native", "us": 1500.0}

    def measure(cases: list[str], *, done: Any, say: Any, **options: object) -> list[dict[str, object]]:
        for _ in cases:
            say("router_stats a native 1.5 ms")
            done([line])
        return [line] * len(cases)

    monkeypatch.setattr(benchmark, "measure", measure)
    done = moekern("bench", "--case", "mixtral-8x7b", "--out", tmp_path / "r.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [line]
    notes, steps = told(done)[:-1], told(done)[-1]
    assert notes == [{"note": "router_stats a native 1.5 ms"}]
    assert (steps["stage"], steps["done"], steps["total"]) == ("timing", 1, 1)
    again = moekern("bench", "--show", tmp_path / "r.jsonl", "--json")
    assert json.loads(again.stdout) == [line]


def _bad(w: Path, out: Path, content: str) -> Path:
    path = out.with_name("bad.json")
    path.write_text(content)
    return path


# What is wrong -> the command, the kind of its error.
WRONG: dict[str, tuple[Command, str]] = {
    "no model": (lambda w, out: ("inspect", w / "nothing"), "checkpoint"),
    "no checkpoint": (lambda w, out: ("inspect", w), "checkpoint"),
    "no plan": (lambda w, out: ("prune", w / "model", _bad(w, out, "{}"), "--out", out), "plan"),
    "a plan that does not fit": (
        lambda w, out: (
            "prune", w / "model",
            _bad(w, out, '{"format": "moekern.plan/1", "layers": {"7": {"keep": [0]}}}'), "--out", out,
        ),
        "plan",
    ),
    "no statistics": (lambda w, out: ("plan", w / "ids.npy", "--keep", 4, "--out", out), "statistics"),
    "no text": (lambda w, out: ("calibrate", w / "model", "--data", "a=/nowhere", "--out", out), "data"),
    "an option": (lambda w, out: ("plan", w / "s.safetensors", "--keep", "half", "--out", out), "option"),
    "a device": (
        lambda w, out: ("calibrate", w / "model", *text(w), "--device", "gpu9", "--out", out),
        "device",
    ),
    "a target": (lambda w, out: ("check", w / "model", "--target", "llama"), "target"),
    "an unknown flag": (lambda w, out: ("inspect", w / "model", "--colour"), "option"),
    "a number that is none": (lambda w, out: ("demo", "--seeds", "many"), "option"),
    "a missing argument": (lambda w, out: ("inspect",), "option"),
    "an unknown command": (lambda w, out: ("prunes",), "option"),
    "anything else": (lambda w, out: ("compare", w / "plan.json"), "plan"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_object_with_a_kind(case: str, work: Path, tmp_path: Path) -> None:
    command, kind = WRONG[case]
    arguments = command(work, tmp_path / "out")
    done = moekern(*arguments, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    (error,) = told(done)
    assert set(error) == {"error", "kind"}
    assert error["kind"] == kind
    plain = moekern(*arguments)
    assert plain.returncode == 2
    if not plain.stderr.startswith("Usage:") and kind != "option":
        assert plain.stderr == f"moekern: {error['error']}\n"


def test_files_that_cannot_be_read_are_of_kind_system(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekern.estimation import overview

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(overview, "overview", fail)
    done = moekern("inspect", work / "model", "--json")
    assert (done.returncode, told(done)) == (2, [{"error": "No space left on device", "kind": "system"}])


def test_what_moekern_did_not_expect_is_told_too(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekern.estimation import overview

    def fail(*arguments: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(overview, "overview", fail)
    done = moekern("inspect", work / "model", "--json")
    (error,) = told(done)
    assert (done.returncode, error["error"], error["kind"]) == (1, "RuntimeError: no such thing", "internal")
    assert "in fail" in error["traceback"]
    with pytest.raises(RuntimeError, match="no such thing"):
        moekern("inspect", work / "model")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_is_an_error_too(number: signal.Signals, name: str, tmp_path: Path) -> None:
    layers = {key: {"keep": [0, 1, 2, 3]} for key in find_layout(open_checkpoint(MODEL)).layers}
    (tmp_path / "plan.json").write_text(json.dumps({"format": "moekern.plan/1", "layers": layers}))
    done = signalled(number, tmp_path, "prune", MODEL, "plan.json", "--out", "o", "--json")
    assert done.returncode == 128 + number
    assert told(done)[-1] == {"error": f"stopped by {name}", "kind": "interrupted"}


def test_the_mode_ends_with_the_command(work: Path) -> None:
    assert moekern("inspect", work / "model", "--json").returncode == 0
    assert not console.as_json()
    assert moekern("inspect", work / "nothing").stderr.startswith("moekern: ")


def test_warnings_of_libraries_are_notes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekern.estimation import overview

    whole = overview.overview

    def warned(folder: Path) -> Any:
        import warnings

        warnings.simplefilter("always")
        warnings.warn("soon gone", DeprecationWarning, stacklevel=1)
        return whole(folder)

    monkeypatch.setattr(overview, "overview", warned)
    assert told(moekern("inspect", work / "model", "--json")) == [{"note": "soon gone"}]


def test_a_kind_can_be_given() -> None:
    assert InputError("x: broken", kind="plan").kind == "plan"
    assert InputError("x: broken").kind == "input"


def test_what_a_greenlet_or_a_thread_says_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    with console.output(True):
        greenlet(lambda: console.say("from a greenlet")).switch()
        thread = threading.Thread(target=console.say, args=("from a thread",))
        thread.start()
        thread.join()
    notes = [json.loads(line)["note"] for line in capsys.readouterr().err.splitlines()]
    assert notes == ["from a greenlet", "from a thread"]

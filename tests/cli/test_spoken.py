"""What of a command's words is shown: the device first, errors alone and in one style, nothing with --quiet, a log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moekern.cli import console
from moekern.cli.app import COMMANDS
from moekern.criteria.table import CRITERIA, DEFAULT
from moekern.model.compute import Compute
from moekern.plan.budgets import RELATIVE_TIER
from moekern.plan.replacement import TIERS as CONSTANTS_OF
from moekern.statistics.layer import TIERS
from tests.helpers.commands import document, model_and_ids, moekern


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_ids(tmp_path_factory.mktemp("spoken"))


def calibrate(work: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("calibrate", work / "model", "--data", f"a={work / 'ids.npy'}", "--out", out, *more)


def test_device_type_and_memory_are_the_first_line(work: Path, tmp_path: Path) -> None:
    done = moekern(*calibrate(work, tmp_path / "s", "--dtype", "fp32", "--memory", "1TiB"))
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"{Compute().described}, in float32, up to ")
    assert first.endswith(" GiB of memory")
    assert document(*calibrate(work, tmp_path / "t", "--dtype", "bf16"))["runs"][0]["dtype"] == "bfloat16"  # type: ignore[index]


def test_quiet_is_results_alone(work: Path, tmp_path: Path) -> None:
    done = moekern(*calibrate(work, tmp_path / "s", "-q"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "layer" in done.stdout
    assert moekern(*calibrate(work, tmp_path / "s", "-q")).stderr.startswith("moekern: --out ")


def test_what_is_said_goes_to_the_log_too(work: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        moekern(*calibrate(work, tmp_path / "s", "-q", "--log-file", log))
    text = log.read_text()
    assert text.count("moekern calibrate ") == 2
    assert Compute().described in text
    assert "calibrating: " in text
    assert "error: --out" in text
    done = moekern(*calibrate(work, tmp_path / "t", "--log-file", tmp_path / "none" / "log"))
    assert (done.returncode, done.stderr) == (
        2,
        f"moekern: --log-file {tmp_path / 'none' / 'log'}: No such file or directory\n",
    )


def test_verbose_tells_where_an_error_comes_from(tmp_path: Path) -> None:
    done = moekern("inspect", tmp_path / "none", "-v")
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("moekern: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plann",), "did you mean 'plan'"),
        (("plan", "s", "--kep", "4"), "plan: no such option: --kep; did you mean --keep?; see"),
        (("prune", "m", "p.json", "--keep", "4"), "prune: no such option: --keep; see"),  # --help is not like it
        (("plan", "s"), "plan: missing option '--out'"),
        (("run", "--nothing"), "run: no such option: --nothing"),
    ],
)
def test_mistakes_in_the_flags_are_one_line_too(arguments: tuple[str, ...], says: str) -> None:
    done = moekern(*arguments)
    assert done.returncode == 2
    assert says.lower() in done.stderr.lower()
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("moekern: ")
    assert "--help" in done.stderr


WITHOUT_TORCH = (
    ("plan", "none.safetensors", "--keep", "0.5", "--out", "OUT"),
    ("plan", "none.safetensors", "--keep", "half", "--out", "OUT"),
    ("score", "none.safetensors"),
    ("run", "none", "--data", "a=b", "--keep", "4", "--out", "OUT"),
    ("calibrate", "MODEL", "--data", "a=b", "--tier", "tear", "--out", "OUT"),
    ("iterate", "MODEL", "--keep", "half", "--out", "OUT"),
    ("iterate", "MODEL", "--keep", "4", "--data", "a=/none", "--out", "OUT"),
    ("check", "MODEL", "--target", "vlm"),
    ("calibrate", "MODEL", "--data", "a=b", "--criterion", "reep", "--out", "OUT"),
    ("run", "MODEL", "--data", "a=MODEL:20q", "--keep", "4", "--out", "OUT"),
    ("evaluate", "MODEL", "--data", "a=/none", "none.json"),
    ("calibrate", "MODEL", "--data", "a=MODEL", "--tokens", "5x", "--out", "OUT"),
    ("calibrate", "MODEL", "--data", "a=MODEL", "--memory", "-5", "--out", "OUT"),
    ("evaluate", "MODEL", "--data", "a=MODEL", "--spill", "OUT"),
    ("run", "MODEL", "--data", "a=MODEL", "--keep", "4", "--until-stable", "2", "--out", "OUT"),
    ("merge", "none.safetensors", "--out", "OUT"),
    ("criteria", "gate"),
)


def test_what_needs_no_torch_does_not_import_it(work: Path, tmp_path: Path) -> None:
    """One command after another in a process where the first import of torch would be noticed."""
    places = {"MODEL": str(work / "model"), "OUT": str(tmp_path / "out")}
    code = (
        "import json, sys, moekern.cli.app as app\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv, code = ['moekern', *arguments], 0\n"
        "    try: app.main()\n"
        "    except SystemExit as end: code = end.code or 0\n"
        "    assert 'torch' not in sys.modules, arguments\n"
        "    assert code == (0 if arguments[0] == 'criteria' else 2), arguments"
    )
    given = json.dumps([[places.get(word, word) for word in arguments] for arguments in WITHOUT_TORCH])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("moekern: ") == len(WITHOUT_TORCH) - 1


def test_every_tier_serves_something() -> None:
    """A criterion, what dropped experts become, or a budget: --tier is checked by these before torch is there."""
    served = {tier for row in CRITERIA.values() for tier in row.tiers} | {*CONSTANTS_OF.values(), RELATIVE_TIER}
    assert served - {None} == set(TIERS)


def test_criteria_fit_a_terminal_and_are_filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    whole = moekern("criteria").stdout
    assert whole.startswith(f"Take {DEFAULT}")
    assert max(map(len, whole.splitlines())) <= 80
    assert {row["name"] for row in document("criteria", "taylor")} == {"taylor", "gate_taylor"}  # type: ignore[index]
    assert all("replay" in row["tier"] for row in document("criteria", "--tier", "replay"))  # type: ignore[index]
    assert moekern("criteria", "nothing-like-it").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "m", "--dtype", "bf8", "--out", "o"), "moekern: --dtype bf8: expected one of float32,"),
        (("criteria", "gatd_norm"), "did you mean gated_norm?"),
    ],
)
def test_values_of_flags_that_are_unknown_are_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = moekern(*arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert says in done.stderr


@pytest.mark.parametrize("command", ["", *(function.__name__.replace("_", "-") for function, _ in COMMANDS)])
def test_help_fits_a_terminal_of_80_columns_and_is_whole(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = moekern(*command.split(), "-h").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    if command == "run":
        assert "--trust-remote-code " in shown
        assert "org/name[subset](split)" in " ".join(shown.split())  # not taken for markup
    if not command:
        assert "from the headers alone. estimate" in " ".join(shown.split())  # not cut short with dots


def test_the_shell_completes_commands() -> None:
    code = "import sys; sys.argv = ['moekern']; from moekern.cli.app import main; main()"
    asked = {"_MOEKERN_COMPLETE": "complete_bash", "COMP_WORDS": "moekern pl", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["plan"]


def test_the_time_that_is_left_is_known_inside_the_first_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was prepared before the first step is not counted."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.output(True), console.progress("calibrating", tokens=1000) as step:
        for moment, done in ((100.0, 0), (101.5, 0.5), (103.0, 1)):
            now[0] = moment
            step(done, 10)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["done"], line["seconds_left"]) for line in lines[1:]] == [(0.5, 28.5), (1, 27.0)]


def test_tokens_a_second_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.output(False), console.progress("calibrating", tokens=1000) as step:
        for moment, done in ((0.0, 0), (20.0, 0.25)):
            now[0] = moment
            step(done, 2)
    assert capsys.readouterr().err == "calibrating: 0.25/2 layers, 12 tokens/s a layer, 20 s, 140 s left\n"

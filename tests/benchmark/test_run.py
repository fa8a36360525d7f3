"""The kernels' benchmark: it times nothing that is wrong, finds every op and backend, and says what misses targets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moekern import kernels
from moekern.benchmark import experts, run, timing
from moekern.benchmark.inputs import Layer
from moekern.benchmark.ops import Job, Scale, jobs
from moekern.cli.app import app

TINY = Layer(6, 2, 32, 32, "softmax")
TIMED = ("router_stats", "sort_by_expert", "combine_and_measure", "similarity", "weight_stats bf16")
SMALL = Scale(tokens=64, row_bytes=1 << 14, tile_bytes=1 << 13, vocabulary=200)


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_scrub", [torch.zeros(1 << 20)])


def test_every_op_but_the_small_ones_has_a_job_with_each_backend() -> None:
    found = {job.op.split(" ")[0].split("+")[0]: job for job in jobs(TINY, SMALL)}
    # popcount and sketch are parts of pair_popcount and similarity; grouped_mlp is timed as the experts block
    assert found.keys() == set(kernels.OPS) - {"popcount", "sketch", "grouped_mlp"}
    for op, job in found.items():
        assert set(job.backends) == set(kernels.available()[op]["cpu"])
        assert "eager" in job.rivals


def test_a_line_says_what_was_measured() -> None:
    lines = run.measure(["tiny"], threads=1, repeats=1, compiled=False, scale=SMALL, layers={"tiny": TINY})
    for line in lines:
        assert {"date", "device", "torch", "threads", "read_gb_s", "op", "case", "size", "backend", "target"} <= set(
            line
        )
        assert isinstance(line["us"], int)
        assert (line.get("gb_s") is None) != (line.get("gflop_s") is None)
    native = {line["op"] for line in lines if line["backend"] == "native"}
    assert native == {line["op"] for line in lines if line["backend"] == "eager"}
    text = run.markdown(lines)
    assert text.count("\n") == 2 + len([line for line in lines if line["backend"] in run.OURS])


@pytest.mark.parametrize(
    "op", ["router_stats", "combine_and_measure", "sort_by_expert", "vocabulary", "weight_stats bf16"]
)
def test_a_wrong_kernel_is_never_timed(op: str) -> None:
    job = next(job for job in jobs(TINY, SMALL) if job.op == op)

    def spoiled() -> Any:
        right = job.backends["native"]()

        def call() -> list[torch.Tensor]:
            results = [t.clone() for t in right()]
            largest = max((t for t in results if t.numel()), key=lambda t: float(t.double().abs().max()))
            largest.view(-1)[largest.double().abs().argmax()] += (
                1 if not largest.is_floating_point() else largest.abs().max()
            )
            return results

        return call

    wrong = replace(job, backends={**job.backends, "native": spoiled})
    with pytest.raises(AssertionError, match=f"{op} native: "):
        run.job_lines(wrong, "tiny", {"read_gb_s": 1.0}, 1, compiled=False)


def test_a_rival_that_cannot_run_is_told() -> None:
    def broken() -> Any:
        raise RuntimeError("no compiler\nhere")

    job = Job("op", "size", {"reference": lambda: lambda: []}, {"eager": broken}, moved=1)
    lines = run.job_lines(job, "tiny", {"read_gb_s": 1.0}, 1, compiled=False)
    assert [(line["backend"], line["us"], line["failed"]) for line in lines] == [("eager", None, "no compiler")]


@pytest.mark.parametrize("model", experts.CLASSES)
def test_the_measured_block_is_the_plain_block(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "MODELS", {model: Layer(6, 2, 32, 32, "softmax")})
    lines = experts.lines(model, 1, flops=1e6)
    one_op = [] if model == "gpt-oss-120b" else ["grouped_mlp grouped_mm"]
    assert [line["backend"] for line in lines] == ["plain", "measured", "measured+dimensions", *one_op]
    assert lines[0]["over_plain"] == 1.0


def test_targets_are_met_or_missed() -> None:
    line = {"op": "combine_and_measure", "case": "x", "backend": "native", "us": 5, "share": 0.6, "threads": 1}
    assert run.target(line) == ">= 0.7 of reading: MISSED"
    assert run.target({**line, "share": 0.8}) == ">= 0.7 of reading: met"
    assert run.target({**line, "backend": "eager"}) is None
    router = {**line, "op": "router_stats", "case": "qwen3-30b-a3b", "us": 9000, "over_eager": 6.5, "read_gb_s": 20.0}
    assert run.target(router) == ">= 7 x eager: MISSED; <= 10 ms: met"
    block = {**line, "op": "experts block", "backend": "measured", "over_plain": 1.04}
    assert run.target(block) == "<= 1.05 of plain: met"


def test_the_command_shows_a_record_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    record = tmp_path / "r.jsonl"
    record.write_text(json.dumps({"op": "o", "case": "c", "size": "s", "backend": "native", "us": 3}) + "\n")
    shown = CliRunner().invoke(app, ["bench", "--show", str(record)])
    assert shown.stdout == "| op | case | size | backend | us |\n|---|---|---|---|---|\n| o | c | s | native | 3 |\n"
    for arguments, problem in ((["--show", "no"], "no such record"), (["--case", "gpt-2"], "expected one of mixtral")):
        assert problem in str(CliRunner().invoke(app, ["bench", *arguments]).exception)


@pytest.mark.parametrize(
    "op", ["router_stats", "sort_by_expert", "combine_and_measure", "similarity", "weight_stats bf16"]
)
def test_speed_against_earlier_runs(op: str, benchmark: Any) -> None:
    """Timed by `make bench-regression`; in the suite it runs once."""
    job = next(
        job for job in jobs(Layer(128, 8, 2048, 768, "softmax"), Scale(2048, 1 << 22, 1 << 22, 2000)) if job.op == op
    )
    benchmark(job.backends["native"]())

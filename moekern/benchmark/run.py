"""Time every backend of every kernel on the layers people prune, and what measuring adds to a whole experts block:

    moekern bench [--out results.jsonl]        (or: python -m bench.kernels)

Each backend must first agree with the reference: a wrong kernel is never timed. `eager` is what a user would write in
torch, `compiled` the same through torch.compile. Bytes are those that must move, from the shapes: logits, ids, rows and
weights read once, results written once. What misses its target is said in the table.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moekern.benchmark import experts
from moekern.benchmark.inputs import MODELS, Layer
from moekern.benchmark.ops import Job, Make, Scale, jobs
from moekern.benchmark.records import Line
from moekern.benchmark.timing import DEVICE, facts, seconds
from moekern.errors import first_line

WORDS = ("op", "case", "size", "backend", "target")
NUMBERS = ("us", "gb_s", "gflop_s", "share", "over_eager", "over_compiled", "over_plain")
OURS = ("native", "triton", "measured", "measured+dimensions", "grouped_mlp grouped_mm", "grouped_mlp triton")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def measure(
    cases: Sequence[str],
    *,
    threads: int,
    repeats: int,
    ops: Sequence[str] = (),
    compiled: bool = True,
    scale: Scale | None = None,
    layers: Mapping[str, Layer] = MODELS,
    done: Callable[[list[Line]], None] = lambda lines: None,
    say: Callable[[str], None] = _to_stderr,
) -> list[Line]:
    """One line a case, op and backend; `ops` names beginnings of ops (none: all). `done` gets the lines of each case.

    `say` gets each line in words, as soon as it is measured. Raises AssertionError for a kernel that does
    not agree with the reference.
    """
    torch.set_num_threads(threads)
    base = facts(threads, repeats)
    lines: list[Line] = []
    for case in cases:
        before = len(lines)
        for job in jobs(layers[case], scale or Scale()):
            if ops and not job.op.startswith(tuple(ops)):
                continue
            found = job_lines(job, case, base, repeats, compiled)
            lines += found
            for line in found:
                say(_words(line))
        if case in experts.CLASSES and (not ops or "experts" in ops) and scale is None:
            found = [{**base, **line} for line in experts.lines(case, max(3, repeats // 2))]
            lines += found
            for line in found:
                say(_words(line))
        lines[before:] = [{**line, "target": target(line)} for line in lines[before:]]
        done(lines[before:])
        gc.collect()
    return lines


def _words(line: Line) -> str:
    took = f"{float(str(line['us'])) / 1e3:.1f} ms" if line.get("us") is not None else line.get("failed")
    return f"{line['op']} {line['case']} {line['backend']} {took}"


def job_lines(job: Job, case: str, base: Line, repeats: int, compiled: bool) -> list[Line]:
    """Times of a job's backends and rivals, once each has given what the reference gives."""
    want = [t.clone() for t in job.backends["reference"]()()]
    runs: dict[str, Make] = {**job.rivals, **{name: make for name, make in job.backends.items() if name != "reference"}}
    if compiled and job.compiled:
        runs["compiled"] = job.compiled(torch.compile)
    if "triton" in runs and DEVICE == "cpu":
        del runs["triton"]  # its interpreter: for correctness, which tests hold, and not for speed
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, make in runs.items():
        try:
            run = make()
            got = run()
            if name != "gemm":
                agree(job, name, got, want)
            times[name] = seconds(run, repeats)
        except AssertionError:
            raise
        except Exception as error:  # a rival that cannot run is a result, not the end
            if name in job.backends:
                raise
            failed[name] = first_line(error)
    same = {**base, "op": job.op, "case": case, "size": job.size}
    lines: list[Line] = [{**same, "backend": name, **_rates(job, name, times, base)} for name in times]
    return lines + [{**same, "backend": name, "us": None, "failed": why} for name, why in failed.items()]


def agree(job: Job, name: str, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    """Raise AssertionError, naming op and backend, unless each result is the reference's within float32 sums.

    A rival's sums may be of any length in float32; ours are of 256 numbers.
    """
    for a, b in zip(got, want, strict=False):
        if name in job.rivals and a.shape != b.shape:
            continue  # a rival may keep its results otherwise, as bools instead of bits
        if job.exact and name in job.backends:
            assert torch.equal(a, b), f"{job.op} {name}: not the reference's bits"
            continue
        rounded = a.dtype in (torch.bfloat16, torch.float16)
        relative, absolute = (
            (2.0**-7, 2.0**-7) if rounded else (1e-3, 1e-4) if name not in job.backends else (1e-4, 1e-5)
        )
        bound = absolute * float(b.double().abs().max()) if b.numel() else 0.0
        try:
            torch.testing.assert_close(a.double(), b.double(), rtol=relative, atol=bound)
        except AssertionError as error:
            raise AssertionError(f"{job.op} {name}: {error}") from None


def _rates(job: Job, name: str, times: Mapping[str, float], base: Line) -> Line:
    t = times[name]
    line: Line = {"us": round(t * 1e6)}
    if job.moved:
        line |= {
            "gb_s": round(job.moved / t / 1e9, 2),
            "share": round(job.moved / t / 1e9 / float(str(base["read_gb_s"])), 3),
        }
    if job.flops:
        line |= {
            "gflop_s": round(job.flops / t / 1e9, 1),
            "share": round(times["gemm"] / t, 3) if "gemm" in times else None,
        }
    for rival in ("eager", "compiled"):
        line[f"over_{rival}"] = round(times[rival] / t, 2) if rival in times else None
    return line


def target(line: Line) -> str | None:
    """What this line was meant to reach, and whether it did; None where nothing was set."""

    def value(key: str) -> float:
        return float(str(line.get(key) or 0))

    op, case, backend = line["op"], line["case"], line["backend"]
    if line.get("us") is None or backend not in OURS:
        return None
    wanted: list[tuple[str, bool]] = []
    if op == "experts block" and str(backend).startswith("measured"):
        limit = 1.03 if DEVICE == "cuda" else 1.10 if backend == "measured+dimensions" else 1.05
        wanted.append((f"<= {limit} of plain", value("over_plain") <= limit))
    elif op == "router_stats" and DEVICE == "cuda" and case == "deepseek-v3":
        wanted.append(("<= 900 us", value("us") <= 900))
    elif op == "router_stats" and DEVICE == "cpu" and line["threads"] == 1 and case == "qwen3-30b-a3b":
        limit = 10e3 * 20 / max(value("read_gb_s"), 1)
        wanted.append((">= 7 x eager", value("over_eager") >= 7))
        wanted.append((f"<= {limit / 1e3:.0f} ms", value("us") <= limit))
    elif op == "combine_and_measure" and DEVICE == "cpu":
        wanted.append((">= 0.7 of reading", value("share") >= 0.7))
    elif op == "similarity":
        wanted.append((">= 0.7 of the GEMM", value("share") >= 0.7))
    elif op in ("expert_gram", "scatter_residual"):
        wanted.append((">= 0.6 of the GEMM", value("share") >= 0.6))
    return "; ".join(f"{what}: {'met' if met else 'MISSED'}" for what, met in wanted) or None


def table(lines: Sequence[Line]) -> None:
    """A readable table of one run."""
    first = lines[0]
    machine = f"{first['device']}, {first['threads']} threads, reads {first['read_gb_s']} GB/s"
    out = Table(title=f"{machine}, torch {first['torch']}")
    shown = columns(lines)
    for column in shown:
        out.add_column(column, justify="left" if column in WORDS else "right")
    for line in lines:
        out.add_row(*("" if line.get(c) is None else str(line[c]) for c in shown))
    Console(width=190).print(out)


def columns(lines: Sequence[Line]) -> list[str]:
    order = (*WORDS[:-1], *NUMBERS, WORDS[-1])
    return [c for c in order if any(line.get(c) is not None for line in lines)]


def markdown(lines: Sequence[Line]) -> str:
    """The lines of moekern's own kernels as a Markdown table."""
    rows = [line for line in lines if line["backend"] in OURS]
    shown = columns(rows)
    head = f"| {' | '.join(shown)} |\n|{'---|' * len(shown)}\n"
    return head + "".join(f"| {' | '.join('' if r.get(c) is None else str(r[c]) for c in shown)} |\n" for r in rows)


def read(path: Path) -> list[Line]:
    """The lines of a record."""
    return [json.loads(line) for line in path.read_text().splitlines()]

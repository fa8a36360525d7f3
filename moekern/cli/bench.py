"""The command `bench`."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from moekern.cli import console
from moekern.cli.given import result
from moekern.cli.options import Json
from moekern.errors import InputError


def bench(
    case: Annotated[list[str] | None, typer.Option(help="Layers to take; repeatable. Default: all.")] = None,
    op: Annotated[
        list[str] | None, typer.Option(help="Beginnings of ops, or experts; repeatable. Default: all.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")] = None,
    repeats: Annotated[int, typer.Option(help="Calls a median is taken of.")] = 9,
    compiled: Annotated[bool, typer.Option(help="Time torch.compile of the torch code too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Append one JSON line a time to this file.")] = None,
    show: Annotated[Path | None, typer.Option(help="Measure nothing: print a record as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Time the kernels on layers of real models, against torch and torch.compile; correct first."""
    import torch

    from moekern.benchmark import run as benchmark
    from moekern.benchmark.inputs import MODELS
    from moekern.benchmark.records import Line, append

    if show is not None:
        if not show.is_file():
            raise InputError(f"--show {show}: no such record")
        found = benchmark.read(show)
        result(found, lambda: print(benchmark.markdown(found), end=""))
        return
    for name in case or ():
        if name not in MODELS:
            raise InputError(f"--case {name}: expected one of {', '.join(MODELS)}")
    cases = case or list(MODELS)
    append(out, ())  # a record that cannot be written is noticed before the first time
    counted = itertools.count(1)
    # A person sees the times as they come; the count of layers is for programs.
    with console.progress("timing", "cases") if console.as_json() else nullcontext(lambda done, total: None) as step:

        def done(found: list[Line]) -> None:
            append(out, found)
            step(next(counted), len(cases))

        lines = benchmark.measure(
            cases, threads=threads or torch.get_num_threads(), repeats=repeats, ops=op or (), compiled=compiled,
            done=done, say=console.say,
        )  # fmt: skip
    if not lines:
        raise InputError(f"--op {', '.join(op or ())}: no op begins so")
    result(lines, lambda: benchmark.table(lines))

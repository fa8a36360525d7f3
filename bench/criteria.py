"""What criteria cost in held-out loss: one-shot, re-estimated and in rounds, over several draws of calibration text.

python -m bench.criteria [--criteria reap usage] [--shares 0.75 0.5 0.25] [--seeds 3] [--rounds 4] [--out FILE.jsonl]
python -m bench.criteria --model MODEL --data NAME=PATH --held-out NAME=PATH --tokens 100000
python -m bench.criteria --show FILE.jsonl          measures nothing: the table of a record, in Markdown

Without --model, the small trained model that ships with moekern. A seed draws --tokens of the calibration text (and the
scores of the random criterion); all plans are evaluated on the same held-out tokens. Losses are nats per token, with
the standard error over seeds; "gain" is one-shot's mean loss less the method's, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moekern.benchmark.records import append, machine
from moekern.checkpoint import Checkpoint, open_checkpoint
from moekern.demo import MODEL, text_sources
from moekern.errors import InputError
from moekern.evaluation import ORIGINAL, Evaluation, evaluate
from moekern.iteration import Compute, Method, iterate, needs_text
from moekern.plan import Plan
from moekern.stages import Calibration, read_tokens

Line = dict[str, Any]
CRITERIA = ("reap", "ean_dim", "gated_norm", "hope_all_tokens", "usage", "random")
SHARES = (0.75, 0.5, 0.25)
ONE_SHOT = "one-shot"


def methods(rounds: int) -> dict[str, tuple[int, bool]]:
    """Name -> rounds, re-estimation."""
    return {
        ONE_SHOT: (1, False),
        "re-estimated": (1, True),
        f"{rounds} rounds": (rounds, False),
        f"{rounds} rounds, re-estimated": (rounds, True),
    }


def measure(options: argparse.Namespace) -> list[Line]:
    """A line for the original, and one for each criterion, share, method and seed; written when a seed is done."""
    checkpoint = open_checkpoint(options.model)
    how = Compute(dtype=torch.float32)
    held_out = read_tokens(
        checkpoint,
        Calibration(tuple(options.held_out), options.held_out_tokens, options.sequence_length, options.batch_size),
    )
    base: Line = {
        **machine(), "model": options.model.name, "tokens": options.tokens, "held_out_tokens": options.held_out_tokens,
        "sequence_length": options.sequence_length, "rounds": options.rounds,
    }  # fmt: skip
    lines: list[Line] = []
    for seed in range(options.seeds):
        plans = dict(made_plans(checkpoint, options, how, seed))
        print(f"seed {seed}: evaluating {len(plans)} plans", file=sys.stderr)
        before, named = len(lines), {json.dumps(key): plan for key, plan in plans.items()}
        losses = evaluate(checkpoint, held_out, named, dtype=torch.float32)
        if not lines:
            lines.append(
                {**base, "criterion": ORIGINAL, "share": 1.0, "method": "", "seed": 0, **loss(losses, ORIGINAL)}
            )
        for (criterion, share, method), plan in plans.items():
            key = json.dumps((criterion, share, method))
            row = {"criterion": criterion, "share": share, "method": method, "seed": seed}
            lines.append({**base, **row, "plan": plan.digest[:12], **loss(losses, key)})
        append(options.out, lines[before:])
    return lines


def made_plans(
    checkpoint: Checkpoint, options: argparse.Namespace, how: Compute, seed: int
) -> Iterator[tuple[tuple[str, float, str], Plan]]:
    """(criterion, share, method) -> plan, all from one draw of the text."""
    text = Calibration(tuple(options.data), options.tokens, options.sequence_length, options.batch_size, seed)
    data = read_tokens(checkpoint, text)
    for criterion in options.criteria:
        start = time.perf_counter()
        for share in options.shares:
            for method, (rounds, reestimate) in methods(options.rounds).items():
                asked = Method(criterion, share, rounds, reestimate, seed=seed)
                plan = iterate(checkpoint, data if needs_text(criterion) else None, asked, compute=how)
                yield (criterion, share, method), plan
        print(f"seed {seed}: {criterion}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def loss(losses: Evaluation, name: str) -> Line:
    """Loss per domain, and their mean."""
    domains = {domain: round(found.nll, 6) for domain, found in losses[name].items()}
    return {"loss": domains, "mean": round(statistics.fmean(domains.values()), 6)}


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± standard error; the mean alone of a single value."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def rows(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the original, then share by share the criteria, each with its methods."""
    domains = list(lines[0]["loss"])
    groups: dict[tuple[float, str, str], dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["share"], line["criterion"], line["method"]), {})[line["seed"]] = line
    cells = []
    for (share, criterion, method), seeds in groups.items():
        plain = groups.get((share, criterion, ONE_SHOT), {})
        gains = [plain[seed]["mean"] - line["mean"] for seed, line in seeds.items() if seed in plain]
        gain = spread(gains, sign="+") if gains and method != ONE_SHOT else ""
        each = [spread([line["loss"][domain] for line in seeds.values()]) for domain in domains]
        mean = spread([line["mean"] for line in seeds.values()])
        cells.append([f"{share:.0%}", criterion, method, mean, gain, *each])
    order = list(dict.fromkeys(line["share"] for line in lines))
    cells.sort(key=lambda row: [f"{share:.0%}" for share in order].index(row[0]))
    return ["kept", "criterion", "method", "mean", "gain", *domains], cells


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    header, cells = rows(lines)
    table = [header, ["---"] * 3 + ["---:"] * (len(header) - 3), *cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    header, cells = rows(lines)
    table = Table(title="held-out loss, nats per token")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < 3 else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", nargs="+", default=list(text_sources("calibration")), metavar="NAME=PATH")
    parser.add_argument("--held-out", nargs="+", default=list(text_sources("evaluation")), metavar="NAME=PATH")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=12288, help="calibration tokens that a seed draws")
    parser.add_argument("--held-out-tokens", type=int, default=12288)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--show", type=Path, help="a record to print as Markdown")
    options = parser.parse_args()
    try:
        if options.show:
            print(markdown([json.loads(line) for line in options.show.read_text().splitlines()]), end="")
            return
        lines = measure(options)
    except (InputError, OSError) as error:
        sys.exit(f"bench.criteria: {error}")
    show(lines)


if __name__ == "__main__":
    main()

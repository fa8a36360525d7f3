"""What criteria cost: every criterion one-shot, some re-estimated and in rounds, over draws of calibration text.

python -m bench.criteria [--criteria reap usage] [--iterated reap] [--shares 0.75 0.5] [--seeds 3] [--out FILE.jsonl]
python -m bench.criteria --model MODEL --data NAME=PATH --held-out NAME=PATH --tokens 100000
python -m bench.criteria --show FILE.jsonl          measures nothing: the tables of a record, in Markdown

Without --model, the small trained model that ships with moekern. A seed draws --tokens of the calibration text (and the
scores of the random criterion), calibrates once with every tier, and all plans are evaluated on the same held-out
tokens: loss and KL to the original in nats per token, and how often the likeliest token is the original's, per domain.
Seeds that are in --out already are not measured again. The criteria of --iterated are run through `iterate` too and,
as "DOMAIN alone", planned from the first domain's sums. NAME and inverse(NAME) among the criteria give the table of
both ends. Errors are standard errors over seeds; "gain" is one-shot's loss less the method's, seed by seed.
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

from rich.console import Console
from rich.table import Table

from moekern.benchmark.records import append, machine
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.cli.pipeline import losses_of
from moekern.criteria import CRITERIA
from moekern.criteria.table import described
from moekern.data.batches import TokenData
from moekern.data.text import Text
from moekern.demo import MODEL, text_sources
from moekern.errors import InputError
from moekern.evaluation.held_out import apart
from moekern.evaluation.losses import ORIGINAL, Evaluation
from moekern.iteration.rounds import Method, iterate, needs_text
from moekern.model.compute import Compute
from moekern.plan.document import Plan
from moekern.plan.make import make_plan
from moekern.statistics.layer import TIERS

Line = dict[str, Any]
ITERATED = ("reap", "ean_dim", "gated_norm", "hope_all_tokens", "usage", "ews")
COMPUTE = Compute(dtype="float32")
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
    """A line for the original and for each criterion, share, method and seed, written when a seed is done."""
    checkpoint = open_checkpoint(options.model)
    held_out = _text(options, options.held_out, options.held_out_tokens).read(checkpoint)
    base: Line = {
        **machine(), "model": options.model.name, "tokens": options.tokens, "held_out_tokens": options.held_out_tokens,
        "sequence_length": options.sequence_length, "rounds": options.rounds,
    }  # fmt: skip
    lines = read(options.out) if options.out and options.out.exists() else []
    there = {line["seed"] for line in lines}
    for seed in range(options.seeds):
        if seed in there:
            continue
        plans = {json.dumps(key): plan for key, plan in made_plans(checkpoint, options, seed, held_out)}
        losses = losses_of(checkpoint, held_out, COMPUTE, plans, None, f"seed {seed}: evaluating {len(plans)} plans")
        found: list[Line] = []
        if not lines:
            found.append(
                {**base, "criterion": ORIGINAL, "share": 1.0, "method": "", "seed": seed, **loss(losses, ORIGINAL)}
            )
        for key, plan in plans.items():
            criterion, share, method = json.loads(key)
            row = {"criterion": criterion, "share": share, "method": method, "seed": seed}
            found.append({**base, **row, "plan": plan.digest[:12], **loss(losses, key)})
        append(options.out, found)
        lines += found
    return lines


def _text(options: argparse.Namespace, data: Sequence[str], tokens: int, seed: int = 0) -> Text:
    return Text(
        data=tuple(data),
        tokens=tokens,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        seed=seed,
    )


def drawn(text: Text, checkpoint: Checkpoint, judged: TokenData) -> tuple[TokenData, int]:
    """A draw of calibration text, without its sequences that are judged too, and how many these were."""
    data, both = apart(text.read(checkpoint), judged)
    if both:
        print(f"seed {text.seed}: {both} sequences that are judged too are left out", file=sys.stderr, flush=True)
    return data, both


def made_plans(
    checkpoint: Checkpoint, options: argparse.Namespace, seed: int, judged: TokenData
) -> Iterator[tuple[tuple[str, float, str], Plan]]:
    """(criterion, share, method) -> plan, all from one draw of the text."""
    data, _ = drawn(_text(options, options.data, options.tokens, seed), checkpoint, judged)
    start = time.perf_counter()
    sums = calibrate(checkpoint, data, COMPUTE, tiers=TIERS)
    print(f"seed {seed}: calibrated with every tier: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for criterion in options.criteria:
        for share in options.shares:
            yield (criterion, share, ONE_SHOT), make_plan(sums, criterion, share, seed=seed)
    for criterion in options.iterated:
        start = time.perf_counter()
        for share in options.shares:
            one = next(iter(data.tokens))
            if needs_text(criterion):
                yield (
                    (criterion, share, f"{one} alone"),
                    make_plan(sums, criterion, share, seed=seed, domains=[one]),
                )
            for method, (rounds, reestimate) in methods(options.rounds).items():
                if method != ONE_SHOT and (reestimate is False or needs_text(criterion)):
                    asked = Method(criterion, share, rounds, reestimate, seed=seed)
                    text_of = data if needs_text(criterion) else None
                    yield (criterion, share, method), iterate(checkpoint, text_of, asked, COMPUTE)
        print(f"seed {seed}: {criterion}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def loss(losses: Evaluation, name: str) -> Line:
    """Loss, KL and agreement per domain, and their means."""
    row = losses[name]
    each = {kind: {d: round(getattr(found, kind), 6) for d, found in row.items()} for kind in ("nll", "kl", "top1")}
    means = {"mean" if kind == "nll" else f"mean_{kind}": _mean(values) for kind, values in each.items()}
    return {"loss": each["nll"], "kl": each["kl"], "top1": each["top1"], **means}


def _mean(values: Mapping[str, float]) -> float:
    return round(statistics.fmean(values.values()), 6)


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± standard error; the mean alone of a single value."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def groups_of(lines: Sequence[Line]) -> dict[tuple[str, float, str], dict[int, Line]]:
    """(criterion, share, method) -> seed -> line."""
    groups: dict[tuple[str, float, str], dict[int, Line]] = {}
    for line in lines:
        groups.setdefault((line["criterion"], line["share"], line["method"]), {})[line["seed"]] = line
    return groups


def one_shot(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """A row a criterion, from the least loss at the middle share: loss, KL and agreement at every share."""
    groups = groups_of(lines)
    shares = sorted({share for _, share, method in groups if method == ONE_SHOT}, reverse=True)
    names = dict.fromkeys(name for name, _, method in groups if method == ONE_SHOT)

    def values(name: str, share: float, kind: str) -> list[float]:
        return [line[kind] for line in groups[name, share, ONE_SHOT].values()]

    order = sorted(names, key=lambda name: statistics.fmean(values(name, shares[len(shares) // 2], "mean")))
    kinds = (("mean", "loss"), ("mean_kl", "KL"), ("mean_top1", "top-1"))
    header = ["criterion", *(f"{word}, {share:.0%}" for _, word in kinds for share in shares)]
    first = next(line for line in lines if line["criterion"] == ORIGINAL)
    cells = [[ORIGINAL, *(f"{first[kind]:.3f}" for kind, _ in kinds for _ in shares)]]
    cells += [[name, *(spread(values(name, share, kind)) for kind, _ in kinds for share in shares)] for name in order]
    return header, cells


def by_method(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """A row a criterion, share and method that is not one-shot: its loss, and what it gains over one-shot."""
    groups = groups_of(lines)
    cells = []
    for (criterion, share, method), seeds in groups.items():
        plain = groups.get((criterion, share, ONE_SHOT), {})
        if method in (ONE_SHOT, "") or not plain:
            continue
        gains = [plain[seed]["mean"] - line["mean"] for seed, line in seeds.items()]
        means = [spread([line["mean"] for line in each.values()]) for each in (plain, seeds)]
        cells.append([criterion, f"{share:.0%}", method, *means, spread(gains, sign="+")])
    return ["criterion", "kept", "method", "one-shot", "loss", "gain"], cells


def by_end(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """A row a criterion and share for which inverse(criterion) was run too: what dropping either end costs."""
    groups = groups_of(lines)
    drops = {row["name"]: row["drop first"] for row in described()}
    cells = []
    for (criterion, share, method), seeds in groups.items():
        other = groups.get((f"inverse({criterion})", share, ONE_SHOT))
        if method == ONE_SHOT and other is not None:
            ends = [spread([line["mean"] for line in each.values()]) for each in (seeds, other)]
            cells.append([criterion, drops.get(criterion, ""), f"{share:.0%}", *ends])
    return ["criterion", "drop first", "kept", "loss", "loss, the other end first"], cells


def tables(lines: Sequence[Line]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title -> header and rows; those without rows are left out."""
    made = {"one-shot": one_shot(lines), "other ways": by_method(lines), "both ends": by_end(lines)}
    return {title: table for title, table in made.items() if table[1]}


def markdown(lines: Sequence[Line]) -> str:
    text = []
    for header, cells in tables(lines).values():
        table = [header, ["---"] + ["---:"] * (len(header) - 1), *cells]
        text.append("".join(f"| {' | '.join(row)} |\n" for row in table))
    return "\n".join(text)


def show(lines: Sequence[Line]) -> None:
    for title, (header, cells) in tables(lines).items():
        table = Table(title=f"{title}: held-out loss and KL in nats per token")
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in cells:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", nargs="+", default=list(text_sources("calibration")), metavar="NAME=PATH")
    parser.add_argument("--held-out", nargs="+", default=list(text_sources("evaluation")), metavar="NAME=PATH")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--iterated", nargs="*", default=list(ITERATED))
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
            print(markdown(read(options.show)), end="")
            return
        lines = measure(options)
    except (InputError, OSError) as error:
        sys.exit(f"bench.criteria: {error}")
    show(lines)


if __name__ == "__main__":
    main()

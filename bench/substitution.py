"""What constants in the place of dropped experts are worth: the same plans dropped and replaced, over draws of text.

python -m bench.substitution [--criterion gated_square] [--shares 0.75 0.5] [--seeds 0 1 2] [--out FILE.jsonl]
python -m bench.substitution --show FILE.jsonl      measures nothing: the table of a record, in Markdown

Without --model, the small trained model that ships with moekern. A seed draws --tokens of the calibration text; all
plans are evaluated on the same held-out tokens, as in bench.criteria. "relative" and "global" share the experts of all
layers (--budget); no engine loads what is dropped by one of these. Seeds that are in --out already are not measured
again. Errors are standard errors over seeds; "KL gained" is the share of dropping's KL that is gone, seed by seed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.criteria import COMPUTE, Line, loss, spread
from bench.draws import begun, draw_of, finish, parser_of, text_of
from moekern.benchmark.records import append, machine
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.cli.pipeline import losses_of
from moekern.data.batches import TokenData
from moekern.evaluation.losses import ORIGINAL
from moekern.plan.budgets import Budget
from moekern.plan.document import Plan
from moekern.plan.make import make_plan
from moekern.plan.replacement import KINDS, LEAST_SQUARES
from moekern.statistics.file import Statistics

DROPPED = "dropped"
BUDGETS = {"global": Budget("global", allow_nonuniform=True), "relative": Budget("relative", allow_nonuniform=True)}
TIERS = ("dimensions", "constants", "stream")


def measure(options: argparse.Namespace) -> list[Line]:
    """A line for the original, and one for each share, method and seed, written when a seed is done."""
    checkpoint = open_checkpoint(options.model)
    held_out = text_of(options, options.held_out, options.held_out_tokens).read(checkpoint)
    base: Line = {
        **machine(), "model": options.model.name, "tokens": options.tokens, "held_out_tokens": options.held_out_tokens,
        "criterion": options.criterion,
    }  # fmt: skip
    lines, left = begun(options)
    for seed in left:
        with tempfile.TemporaryDirectory() as place:
            sums = Path(place) / "s.safetensors"
            plans = made_plans(checkpoint, options, seed, sums, held_out)
            named = {f"{share} {method}": plan for (share, method), plan in plans.items()}
            losses = losses_of(checkpoint, held_out, COMPUTE, named, None, f"seed {seed}", statistics=sums)
        keys = [(1.0, ORIGINAL), *plans] if not lines else list(plans)
        found: list[Line] = []
        for share, method in keys:
            name = ORIGINAL if method == ORIGINAL else f"{share} {method}"
            counts = [] if method == ORIGINAL else [len(layer.keep) for layer in named[name].layers.values()]
            found.append(
                {**base, "share": share, "method": method, "seed": seed, "counts": counts, **loss(losses, name)}
            )
        append(options.out, found)
        lines += found
    return lines


def made_plans(
    checkpoint: Checkpoint, options: argparse.Namespace, seed: int, sums: Path, judged: TokenData
) -> dict[tuple[float, str], Plan]:
    """(share, method) -> plan, all from one draw of the text, whose statistics are saved."""
    data, _ = draw_of(options, checkpoint, judged, seed)
    calibrate(checkpoint, data, COMPUTE, tiers=TIERS, out=sums)
    statistics, plans = Statistics.load(sums), dict[tuple[float, str], Plan]()
    for share in options.shares:
        plans[share, DROPPED] = make_plan(statistics, options.criterion, share)
        for kind in KINDS:
            plans[share, kind] = make_plan(statistics, options.criterion, share, replaced=kind)
        for name, budget in BUDGETS.items():
            for kind in (None, LEAST_SQUARES):
                made = make_plan(statistics, options.criterion, share, replaced=kind, budget=budget)
                plans[share, f"{kind or DROPPED}, {name}"] = made
    return plans


def markdown(lines: Sequence[Line]) -> str:
    """A row a share and method: loss, KL and agreement over seeds, and what is gained over dropping."""
    groups: dict[tuple[float, str], dict[int, Line]] = {}
    for line in lines:
        groups.setdefault((line["share"], line["method"]), {})[line["seed"]] = line
    rows = [["kept", "method", "loss", "KL", "top-1", "KL gained"], ["---", "---", *["---:"] * 4]]
    for (share, method), seeds in groups.items():
        cells = [spread([line[kind] for line in seeds.values()]) for kind in ("mean", "mean_kl", "mean_top1")]
        plain = groups.get((share, DROPPED), {})
        gains = [100 * (1 - line["mean_kl"] / plain[seed]["mean_kl"]) for seed, line in seeds.items() if plain]
        told = spread(gains, digits=1) + " %" if gains and method != DROPPED else ""
        rows.append([f"{share:.0%}", method, *cells, told])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = parser_of(__doc__, criterion="gated_square", shares=(0.75, 0.5), tokens=12288, held_out_tokens=12288)
    finish("substitution", parser, measure, markdown)


if __name__ == "__main__":
    main()

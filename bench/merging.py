"""What merging experts costs beside dropping them: M-SMoE, HC-SMoE and REAM, channels matched or not, over draws of
text.

python -m bench.merging [--shares 0.75 0.5] [--seeds 0 1 2] [--tokens 60000] [--out FILE.jsonl]
python -m bench.merging --model MODEL --data NAME=PATH --held-out NAME=PATH
python -m bench.merging --show FILE.jsonl           measures nothing: the table of a record, in Markdown

Without --model, the small trained model that ships with moekern. A seed draws --tokens of the calibration text and
calibrates once, with the replay tier. For each method three plans keep the same experts: the others dropped, merged
with their channels matched, and merged as they lie; and --criterion drops by itself. All are judged on the --held-out
text, and so are ridge refits of the criterion's plan and of M-SMoE's. Errors are standard errors over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.criteria import COMPUTE, loss, spread
from bench.draws import begun, draw_of, finish, parser_of, setting, text_of
from moekern.benchmark.records import append
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.merging.groups import METHODS, merging_plan
from moekern.plan.document import Plan
from moekern.plan.make import make_plan
from moekern.refit import Ridge
from moekern.refit.refit import refit
from moekern.refit.variants import Variant
from moekern.statistics.file import Statistics

Line = dict[str, Any]
REFITTED = "m-smoe"  # whose merged experts are refitted too


def measure(options: argparse.Namespace) -> list[Line]:
    """A line for each share, way and seed, written when a seed is done."""
    checkpoint = open_checkpoint(options.model)
    judged = text_of(options, options.held_out, options.held_out_tokens).read(checkpoint)
    lines, left = begun(options)
    for seed in left:
        data, _ = draw_of(options, checkpoint, judged, seed)
        sums = calibrate(checkpoint, data, COMPUTE, tiers=("replay",))
        base = setting(options, data, judged, seed)
        for share in options.shares:
            losses = refit(checkpoint, data, _variants(sums, options.criterion, share), COMPUTE, judged=judged).losses
            lines += (found := [{**base, "share": share, "way": way, **loss(losses, way)} for way in losses])
            append(options.out, found)
            print(f"seed {seed}, {share:.0%}: done", file=sys.stderr, flush=True)
    return lines


def _variants(sums: Statistics, criterion: str, share: float) -> list[Variant]:
    plans = {f"{criterion}, dropped": make_plan(sums, criterion, share)}
    for method in METHODS:
        matched, plain = (merging_plan(sums, method, share, align=align) for align in ("weights", "none"))
        plans |= {f"{method}, dropped": _dropped(plain), f"{method}, merged": plain, f"{method}, matched": matched}
    made = [Variant(way, plan) for way, plan in plans.items()]
    for way in (f"{criterion}, dropped", f"{REFITTED}, dropped", f"{REFITTED}, matched"):
        made.append(Variant(f"{way}, ridge", plans[way], ridge=Ridge()))
    return made


def _dropped(plan: Plan) -> Plan:
    """The same experts, with nothing merged into them."""
    return replace(plan, layers={key: replace(layer, groups=None) for key, layer in plan.layers.items()})


def markdown(lines: Sequence[Line]) -> str:
    """A row a share and way: mean loss, KL and agreement over the seeds."""
    rows = [["kept", "what", "loss", "KL", "top-1"], ["---", "---", *["---:"] * 3]]
    for share, way in dict.fromkeys((line["share"], line["way"]) for line in lines):
        own = [line for line in lines if (line["share"], line["way"]) == (share, way)]
        rows.append(
            [f"{share:.0%}", way, *(spread([x[kind] for x in own]) for kind in ("mean", "mean_kl", "mean_top1"))]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = parser_of(__doc__, criterion="gated_square", shares=(0.75, 0.5))
    finish("merging", parser, measure, markdown)


if __name__ == "__main__":
    main()

"""What fitting the experts that stay is worth: dropped, re-estimated, refitted, fewer and narrower, over draws of text.

python -m bench.refit [--shares 0.75 0.5 0.25] [--seeds 0 1 2] [--tokens 60000] [--out FILE.jsonl]
python -m bench.refit --model MODEL --data NAME=PATH --held-out NAME=PATH
python -m bench.refit --show FILE.jsonl             measures nothing: the table of a record, in Markdown

Without --model, the small trained model that ships with moekern. A seed draws --tokens of the calibration text; the
criterion is measured on them, shapes are tried on them as `run --shape auto` does, and experts are fitted to them.
Everything is judged on the --held-out text, which neither training, nor choosing, nor fitting has seen: loss and KL to
the original in nats per token, and how often the likeliest token is the original's, per domain. Every refit is a pass
of its own, as a user makes it, so that its CPU time is its own; that of judging is in it. Seeds that are in --out
already are not measured again. Errors are standard errors over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.criteria import COMPUTE, SHARES, loss, spread
from bench.draws import begun, draw_of, finish, parser_of, setting, text_of
from moekern.architectures import find_layout
from moekern.architectures.widths import narrow_problem, widths_held
from moekern.benchmark.records import append
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import TokenData
from moekern.errors import InputError
from moekern.evaluation.held_out import held_back
from moekern.evaluation.losses import ORIGINAL, Evaluation
from moekern.iteration.rounds import Method, iterate
from moekern.model.compute import Compute
from moekern.plan.document import Plan
from moekern.plan.make import make_plan
from moekern.plan.served import served_as
from moekern.plan.shapes import Shape, candidates
from moekern.plan.targets import widths_for
from moekern.refit import Refine, Ridge
from moekern.refit.refit import refit
from moekern.refit.shapes import best, trial_text, trials
from moekern.refit.variants import Variant
from moekern.statistics.file import Statistics

Line = dict[str, Any]
T = TypeVar("T")
DROPPED, AGAIN = "dropped", "re-estimated"
FITS = {"ridge": (Ridge(), None), "ridge, refine": (Ridge(), Refine())}
SHAPED = "shape, "
METHODS = (ORIGINAL, DROPPED, AGAIN, *FITS, *(SHAPED + name for name in FITS))
PASSES = {DROPPED: 1, AGAIN: 1, **dict.fromkeys(FITS, 2), **{SHAPED + name: 3 for name in FITS}}  # over the weights


def timed(make: Callable[[], T]) -> tuple[T, float]:
    """What is made, and the CPU seconds of this process that it took."""
    start = time.process_time()
    made = make()
    return made, time.process_time() - start


@dataclass(frozen=True)
class Draw:
    """One draw of the text, and what choosing has made of it."""

    checkpoint: Checkpoint
    data: TokenData
    judged: TokenData
    criterion: str
    sums: Statistics
    seconds: float  # of calibration
    compute: Compute = COMPUTE

    def plan(self, keep: float | int) -> Plan:
        return make_plan(self.sums, self.criterion, keep)

    def fitted(self, variants: Sequence[Variant]) -> tuple[Evaluation, float]:
        """Losses of variants made in one pass, and its CPU seconds."""
        found, seconds = timed(lambda: refit(self.checkpoint, self.data, variants, self.compute, judged=self.judged))
        return found.losses, seconds

    def shape(self, share: float) -> tuple[Shape, Mapping[str, float], float]:
        """The shape that `--shape auto` takes, the KL of all that were tried, and the CPU seconds of trying. Raises
        InputError, before anything is computed, for experts that cannot be narrower."""
        layout = find_layout(self.checkpoint)
        problem = narrow_problem(self.checkpoint, layout)
        if layout.width is None or problem:
            raise InputError(f"{self.checkpoint.folder}: no shapes to try: {problem or 'experts of several widths'}")
        allowed = widths_for(served_as(layout, self.checkpoint.config), (), share, widths_held(layout))
        shapes, width = candidates(layout.router, layout.width, share, allowed), layout.width
        rest, held = held_back(self.data)
        found, seconds = timed(
            lambda: refit(
                self.checkpoint, trial_text(rest), trials(shapes, self.plan, width), self.compute, judged=held
            )
        )
        return *best(shapes, found.losses), seconds


def measure(options: argparse.Namespace) -> list[Line]:
    """A line for the original and for each share, method and seed, written when a seed is done."""
    checkpoint = open_checkpoint(options.model)
    judged = text_of(options, options.held_out, options.held_out_tokens).read(checkpoint)
    lines, left = begun(options)
    for seed in left:
        data, _ = draw_of(options, checkpoint, judged, seed)
        base = setting(options, data, judged, seed)
        sums, seconds = timed(lambda data=data: calibrate(checkpoint, data, COMPUTE))  # type: ignore[misc]
        draw = Draw(checkpoint, data, judged, options.criterion, sums, seconds)
        found = [{**base, **row} for share in options.shares for row in _share(draw, share)]
        append(options.out, found)
        lines += found
    return lines


def _share(draw: Draw, share: float) -> list[Line]:
    """All methods at one share of the routed bytes."""
    rows: list[Line] = []

    def add(method: str, losses: Evaluation, name: str, seconds: float, **more: Any) -> None:
        cost = {} if method == ORIGINAL else {"cpu_seconds": round(seconds, 1), "passes": PASSES[method]}
        rows.append({"share": share, "method": method, **cost, **more, **loss(losses, name)})
        print(f"{share:.0%} {method}: loss {rows[-1]['mean']:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    plain = draw.plan(share)
    asked = Method(draw.criterion, share, 1, True)
    again, seconds = timed(lambda: iterate(draw.checkpoint, draw.data, asked, COMPUTE))
    losses, _ = draw.fitted([Variant(DROPPED, plain), Variant(AGAIN, again)])
    add(ORIGINAL, losses, ORIGINAL, 0)
    add(DROPPED, losses, DROPPED, draw.seconds)
    add(AGAIN, losses, AGAIN, seconds)
    shape, tried, trying = draw.shape(share)
    for name, (ridge, refine) in FITS.items():
        losses, seconds = draw.fitted([Variant(name, plain, ridge=ridge, refine=refine)])
        add(name, losses, name, draw.seconds + seconds)
        width = None if shape.width == find_layout(draw.checkpoint).width else shape.width
        losses, seconds = draw.fitted([Variant(name, draw.plan(shape.experts), width, ridge, refine)])
        said = {"shape": str(shape), "tried": {each: round(kl, 6) for each, kl in tried.items()}}
        add(SHAPED + name, losses, name, draw.seconds + trying + seconds, **said)
    return rows


def table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """A row a share and method: losses, gains over dropping seed by seed, and costs, over the seeds."""
    header = ["kept", "method", "loss", "gain over dropping", "KL", "top-1", "shapes", "CPU s", "passes"]
    cells = []
    for share in sorted({line["share"] for line in lines}, reverse=True):
        of = {m: {x["seed"]: x for x in lines if (x["share"], x["method"]) == (share, m)} for m in METHODS}
        for method, seeds in of.items():
            some = list(seeds.values())
            if not some:
                continue
            gains = [of[DROPPED][seed]["mean"] - line["mean"] for seed, line in seeds.items()]
            costs = [""] * 2
            if method != ORIGINAL:
                costs = [f"{statistics.fmean(x['cpu_seconds'] for x in some):.0f}", str(some[0]["passes"])]
            plain = method in (ORIGINAL, DROPPED)
            cells.append([
                f"{share:.0%}", method, spread([x["mean"] for x in some]),
                "" if plain else spread(gains, sign="+"),
                *(spread([x[kind] for x in some]) for kind in ("mean_kl", "mean_top1")),
                ", ".join(dict.fromkeys(x["shape"] for x in some if "shape" in x)), *costs,
            ])  # fmt: skip
    return header, cells


def by_domain(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """A row a share and method: the loss of each domain."""
    domains = list(lines[0]["loss"])
    groups: dict[tuple[float, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["share"], line["method"]), []).append(line)
    order = sorted(groups, key=lambda key: (-key[0], METHODS.index(key[1])))
    cells = [
        [f"{key[0]:.0%}", key[1], *(spread([line["loss"][d] for line in groups[key]]) for d in domains)]
        for key in order
    ]
    return ["kept", "method", *domains], cells


def markdown(lines: Sequence[Line]) -> str:
    """Both tables."""
    text = []
    for header, cells in (table(lines), by_domain(lines)):
        rows = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *cells]
        text.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join(text)


def main() -> None:
    parser = parser_of(__doc__, criterion="hope_all_tokens", shares=SHARES)
    finish("refit", parser, measure, markdown)


if __name__ == "__main__":
    main()

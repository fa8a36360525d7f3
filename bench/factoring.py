"""MC-SMoE's second stage on merged and on dropped experts: products of low rank and sparse rows, over draws of text.

python -m bench.factoring [--share 0.5] [--ratio 0.25] [--rows 0.1] [--seeds 0 1 2] [--tokens 60000] [--out FILE.jsonl]
python -m bench.factoring --model MODEL --data NAME=PATH --held-out NAME=PATH
python -m bench.factoring --show FILE.jsonl           measures nothing: the table of a record, in Markdown

Without --model, the small trained model that ships with moekern. A seed draws --tokens of the calibration text and
calibrates once. Two models of a share of the experts are made: M-SMoE's merges, channels matched, and what --criterion
drops. Each is judged as it is, factored from its weights alone, factored and trained, and trained without being
factored. Beside them stands what --criterion drops down to about the bytes that the factors take, trained alike. All
trains on the same text, once through, by the next token and 0.2 times KL to the original at temperature 2. "bytes" are
those of experts over the original's, factors counted as such, which no engine runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.criteria import COMPUTE, spread
from bench.draws import begun, draw_of, finish, parser_of, setting, text_of
from moekern.benchmark.records import append
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import TokenData
from moekern.evaluation.losses import Loss, mean_of
from moekern.merging.groups import merging_plan
from moekern.merging.merge import merge_experts
from moekern.plan.document import Plan
from moekern.plan.make import make_plan
from moekern.pruning.prune import prune
from moekern.recovery import Recovery, Training, recover
from moekern.statistics.file import Statistics

Line = dict[str, Any]
AS_IT_IS, FACTORED, TRAINED, BOTH = "as it is", "factored", "trained", "factored and trained"


@dataclass(frozen=True)
class Bench:
    """One draw."""

    checkpoint: Checkpoint
    data: TokenData
    judged: TokenData
    sums: Statistics
    options: argparse.Namespace
    work: Path

    def rows(self, seed: int) -> Iterator[Line]:
        options = self.options
        training = Training(train=("experts",), kl=0.2, next=1.0, temperature=2.0, seed=seed)
        factors = replace(training, train=("factors",), factor_ratio=options.ratio, kept_rows=options.rows)
        dropped, taken = f"{options.criterion}, dropped", options.share
        merged = merging_plan(self.sums, "m-smoe", options.share)
        for base, plan in (("m-smoe, matched", merged), (dropped, self._dropped(options.share))):
            folder, share = self._made(base, plan), _share(plan)
            for what, how in ((FACTORED, replace(factors, epochs=0.0)), (BOTH, factors), (TRAINED, training)):
                found, seconds = self._recovered(folder, how)
                size = found.factored
                least = share * size["bytes"] / size["of_bytes"] if size else share
                taken = min(taken, least)
                if what == FACTORED:
                    yield _row(base, AS_IT_IS, found.judged[0], share, 0.0)
                yield _row(base, what, found.judged[1], least, seconds)
        plan = self._dropped(taken)
        found, seconds = self._recovered(self._made("few", plan), training)
        yield _row(f"{options.criterion}, as few bytes", TRAINED, found.judged[1], _share(plan), seconds)

    def _dropped(self, share: float) -> Plan:
        return make_plan(self.sums, self.options.criterion, share)

    def _made(self, name: str, plan: Plan) -> Path:
        """The checkpoint of a plan."""
        place = self.work / name.replace(" ", "-").replace(",", "")
        if plan.merges:
            plan = merge_experts(self.checkpoint, plan, place / "layers")
        prune(self.checkpoint, plan, place / "out", refitted=place / "layers" if plan.merges else None)
        return place / "out"

    def _recovered(self, folder: Path, training: Training) -> tuple[Recovery, float]:
        """What came of it, and CPU seconds, without those of what the original predicts."""
        start = time.process_time()
        with tempfile.TemporaryDirectory(dir=self.work) as place:
            found = recover(
                folder, self.checkpoint, self.data, Path(place) / "work", training, COMPUTE, judged=self.judged,
                predictions=self.work / "predictions",
            )  # fmt: skip
        return found, time.process_time() - start


def _share(plan: Plan) -> float:
    """Of the experts, those that stay: all are as large."""
    return sum(len(layer.keep) for layer in plan.layers.values()) / sum(
        len(layer.scores or layer.keep) for layer in plan.layers.values()
    )


def _row(base: str, what: str, losses: Mapping[str, Loss], share: float, seconds: float) -> Line:
    nll, kl, top1 = (mean_of(losses, kind) for kind in ("nll", "kl", "top1"))
    print(f"{base}, {what}: {nll:.4f}, {share:.1%} of the bytes, {seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        "base": base, "what": what, "bytes": round(share, 6), "mean": round(nll, 6), "mean_kl": round(kl, 6),
        "mean_top1": round(top1, 6), "cpu_seconds": round(seconds, 1),
        "loss": {domain: round(found.nll, 6) for domain, found in losses.items()},
    }  # fmt: skip


def measure(options: argparse.Namespace) -> list[Line]:
    """A line for each base, what was made of it, and seed, written when a seed is done."""
    checkpoint = open_checkpoint(options.model)
    judged = text_of(options, options.held_out, options.held_out_tokens).read(checkpoint)
    lines, left = begun(options)
    for seed in left:
        data, _ = draw_of(options, checkpoint, judged, seed)
        base = setting(options, data, judged, seed)
        base |= {"share": options.share, "ratio": options.ratio, "rows": options.rows}
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            bench = Bench(checkpoint, data, judged, calibrate(checkpoint, data, COMPUTE), options, Path(work))
            found = [{**base, **row} for row in bench.rows(seed)]
        append(options.out, found)
        lines += found
    return lines


def markdown(lines: Sequence[Line]) -> str:
    """A row a base and what was made of it: bytes, loss, KL, agreement and CPU seconds over the seeds."""
    rows = [["experts", "what", "bytes", "loss", "KL", "top-1", "CPU s"], ["---", "---", *["---:"] * 5]]
    for base, what in dict.fromkeys((line["base"], line["what"]) for line in lines):
        own = [line for line in lines if (line["base"], line["what"]) == (base, what)]
        each = [spread([x[kind] for x in own]) for kind in ("mean", "mean_kl", "mean_top1")]
        share, seconds = (statistics.fmean(x[kind] for x in own) for kind in ("bytes", "cpu_seconds"))
        rows.append([base, what, f"{share:.1%}", *each, f"{seconds:.0f}" if seconds else ""])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = parser_of(__doc__, criterion="gated_square", shares=())
    parser.add_argument("--share", type=float, default=0.5, help="of the experts, what is merged or dropped to")
    parser.add_argument("--ratio", type=float, default=0.25, help="of a matrix' numbers, what products hold")
    parser.add_argument("--rows", type=float, default=0.1, help="of the rows beside products, what stays")
    parser.add_argument("--work", type=Path, help="a folder for what is made; default: the system's")
    finish("factoring", parser, measure, markdown)


if __name__ == "__main__":
    main()

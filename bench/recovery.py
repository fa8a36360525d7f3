"""What training brings a pruned model back: by what trains, from plain dropping and from a refit, over draws of text.

python -m bench.recovery [--shares 0.5 0.25] [--seeds 0 1 2] [--tokens 60000] [--out FILE.jsonl]
python -m bench.recovery --model MODEL --data NAME=PATH --held-out NAME=PATH
python -m bench.recovery --show FILE.jsonl             measures nothing: the table of a record, in Markdown

Without --model, the small trained model that ships with moekern. A seed draws --tokens of the calibration text; the
criterion is measured on them, shapes are tried and experts fitted as `run --shape auto --refine` does, and everything
trains on the same tokens, once through. All is judged on the --held-out text, which has decided nothing: loss and KL to
the original in nats per token. CPU seconds are those of training alone, with what the original predicts. Seeds that are
in --out already are not measured again. Errors are standard errors over seeds.
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
from bench.refit import Draw, timed
from moekern.architectures import find_layout
from moekern.benchmark.records import append
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.evaluation.evaluate import evaluate
from moekern.evaluation.losses import ORIGINAL, Loss, mean_loss
from moekern.pruning.prune import prune
from moekern.recovery import Training, recover
from moekern.recovery.lottery import Lottery, lottery
from moekern.refit import Refine, Ridge
from moekern.refit.refit import refit
from moekern.refit.variants import Variant

Line = dict[str, Any]
DROPPED, REFITTED, WHOLE = "dropped", "shape, ridge, refine", "whole"
NEXT = ", next token"
KINDS = ("scale", "router", "norms", "lora", "down", "experts", "all")
AGAIN = ("router", "norms", "experts", "all")  # from a refitted model
LOTTERY = "lottery, 4 rounds"
STARTS = (WHOLE, DROPPED, REFITTED)


@dataclass(frozen=True)
class Bench:
    """What is done from each start: all kinds from a dropped model, some of them from a refitted one."""

    draw: Draw
    seed: int
    work: Path

    def rows(self, share: float) -> Iterator[Line]:
        """Of one share."""
        draw, training = self.draw, Training(seed=self.seed)
        dropped, refitted = self._pruned(share)
        yield self._row(share, WHOLE, "", self._original(), 0.0)
        whole = replace(training, train=("all",), kl=0.0, next=1.0)
        yield self._trained(share, WHOLE, draw.checkpoint.folder, "all" + NEXT, whole)
        for start, folder in ((DROPPED, dropped), (REFITTED, refitted)):
            for kind in KINDS if start == DROPPED else AGAIN:
                way = replace(training, train=(kind,), lora_targets=("linear",))
                yield self._trained(share, start, folder, kind, way)
            if start == DROPPED:
                yield self._trained(share, start, folder, "all" + NEXT, whole)
        tokens = sum(draw.data.tokens.values())
        method = Lottery(share, 4, draw.criterion, tokens // 4, False, replace(training, train=("all",)))
        seconds = time.process_time()
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            drawn = lottery(
                draw.checkpoint, draw.data, method, Path(folder) / "out", Path(folder) / "work", COMPUTE,
                judged=draw.judged, control=False,
            )  # fmt: skip
        yield self._row(share, DROPPED, LOTTERY, drawn.rounds[-1].trained, time.process_time() - seconds)

    def _pruned(self, share: float) -> tuple[Path, Path]:
        """Folders of what is trained: dropped, and refitted in the best shape."""
        draw, place = self.draw, Path(tempfile.mkdtemp(dir=self.work))
        prune(draw.checkpoint, draw.plan(share), place / "dropped")
        shape, _, _ = draw.shape(share)
        width = None if shape.width == find_layout(draw.checkpoint).width else shape.width
        variant = Variant(REFITTED, draw.plan(shape.experts), width, Ridge(), Refine(), place / "layers")
        made = refit(draw.checkpoint, draw.data, [variant], COMPUTE, judged=draw.judged)
        prune(draw.checkpoint, made.plans[REFITTED], place / "refitted", refitted=place / "layers")
        return place / "dropped", place / "refitted"

    def _original(self) -> Mapping[str, Loss]:
        return evaluate(self.draw.checkpoint, self.draw.judged, {}, COMPUTE)[ORIGINAL]

    def _trained(self, share: float, start: str, folder: Path, kind: str, training: Training) -> Line:
        draw = self.draw
        with tempfile.TemporaryDirectory(dir=self.work) as place:
            original = draw.checkpoint if start != WHOLE else None
            made, seconds = timed(
                lambda: recover(
                    folder, original, draw.data, Path(place) / "work", training, COMPUTE, judged=draw.judged
                )
            )
        before, after = made.judged
        if training.kl == 0:
            after = {d: replace(loss, kl=float("nan")) for d, loss in after.items()}
        return self._row(share, start, kind, after, seconds, before=mean_loss({d: x.nll for d, x in before.items()}))

    def _row(
        self, share: float, start: str, kind: str, losses: Mapping[str, Loss], seconds: float, **more: Any
    ) -> Line:
        nll = {d: loss.nll for d, loss in losses.items()}
        kl = mean_loss({d: loss.kl for d, loss in losses.items()})
        print(f"{share:.0%} {start}, {kind}: {mean_loss(nll):.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)
        told = {"mean": round(mean_loss(nll), 6), "kl": None if kl != kl else round(kl, 6)}
        by_domain = {d: round(x, 6) for d, x in nll.items()}
        return {
            "share": share,
            "start": start,
            "trains": kind,
            "cpu_seconds": round(seconds, 1),
            **told,
            **more,
            "loss": by_domain,
        }


def measure(options: argparse.Namespace) -> list[Line]:
    """A line for each share, start, kind and seed, written when a seed is done."""
    checkpoint = open_checkpoint(options.model)
    judged = text_of(options, options.held_out, options.held_out_tokens).read(checkpoint)
    lines, left = begun(options)
    for seed in left:
        data, _ = draw_of(options, checkpoint, judged, seed)
        base = setting(options, data, judged, seed)
        draw = Draw(checkpoint, data, judged, options.criterion, calibrate(checkpoint, data, COMPUTE), 0.0)
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            bench = Bench(draw, seed, Path(work))
            found = [{**base, **row} for share in options.shares for row in bench.rows(share)]
        append(options.out, found)
        lines += found
    return lines


def markdown(lines: Sequence[Line]) -> str:
    """A row a share, start and kind: losses and gains over the start, over the seeds."""
    header = ["kept", "start", "trains", "loss", "gain", "KL", "CPU s"]
    cells, order = [], list(dict.fromkeys((x["share"], x["start"], x["trains"]) for x in lines))
    starts = {(x["share"], x["start"], x["seed"]): x["before"] for x in lines if "before" in x}
    shown: set[tuple[float, str]] = set()
    for share, start, kind in order:
        some = [x for x in lines if (x["share"], x["start"], x["trains"]) == (share, start, kind)]
        if start != WHOLE and (share, start) not in shown:
            shown.add((share, start))
            cells.append(
                [f"{share:.0%}", start, "", spread([starts[share, start, x["seed"]] for x in some]), "", "", ""]
            )
        gains = [starts[share, start, x["seed"]] - x["mean"] for x in some] if kind else []
        kl = "" if some[0]["kl"] is None or not kind else spread([x["kl"] for x in some])
        seconds = f"{statistics.fmean(x['cpu_seconds'] for x in some):.0f}" if kind else ""
        gain = spread(gains, sign="+") if gains else ""
        cells.append([f"{share:.0%}", start, kind, spread([x["mean"] for x in some]), gain, kl, seconds])
    rows = [header, ["---"] * 3 + ["---:"] * 4, *cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = parser_of(__doc__, criterion="hope_all_tokens", shares=(0.5, 0.25))
    parser.add_argument("--work", type=Path, help="a folder for what is made; default: the system's")
    finish("recovery", parser, measure, markdown)


if __name__ == "__main__":
    main()

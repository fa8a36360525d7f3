"""Every way to shrink a model by its experts on one ruler: loss, KL and top-1 against bits a routed weight and cost.

python -m bench.comparison MODEL --data NAME=PATH --held-out NAME=PATH --seeds 3 --out RECORD.jsonl
python -m bench.comparison --demo --out RECORD.jsonl        the small trained model that ships with moekern
python -m bench.comparison --show RECORD.jsonl              measures nothing: the tables of a record, in Markdown

A seed draws --tokens of the calibration text; criteria, constants, merges, masks, refits and training all get these,
and all are judged on the same --held-out tokens, whose sequences are left out of them: by `moekern.evaluate` where a
plan says all, by the refit's own pass, or as a folder against what the original predicts. Every one must find the same
loss of the original. Beside them stands the unpruned model with its experts rounded to few bits (no product of a
quantiser). Rows that are in --out already are not measured again. --only names rows or kinds of rows. Errors are
standard errors over draws, intervals are paired by sequence. CPU seconds are those of making: of calibration with the
tiers that the row needs, of choosing and of fitting; for refitted and trained rows that of judging is in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.comparison_tables import markdown
from bench.comparison_ways import KINDS, TRAINED, Way, fitted, planned
from bench.criteria import loss, read
from bench.draws import draw_of, finish, text_of, with_record
from bench.refit import FITS, SHAPED, Draw, timed
from bench.rounding import twin
from bench.ruler import Routed, Ruler
from moekern.benchmark.records import append, machine
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import open_checkpoint
from moekern.criteria.table import CRITERIA, DEFAULT
from moekern.data.batches import TokenData
from moekern.demo import MODEL, text_sources
from moekern.errors import InputError
from moekern.evaluation.losses import ORIGINAL, Row
from moekern.masks import Search, optimise
from moekern.model.compute import Compute
from moekern.plan.document import Plan
from moekern.plan.make import make_plan
from moekern.pruning.prune import prune
from moekern.pruning.replaced import write_replaced
from moekern.recovery import Training, recover
from moekern.refit.refit import refit
from moekern.refit.variants import Variant
from moekern.statistics.file import Statistics
from moekern.version import versions

Line = dict[str, Any]
PASSES = {"gradient": 3, "outliers": 2}  # over the weights, of a calibration with this tier; 1 of others


@dataclass
class Bench:
    """One draw of the text at work."""

    ruler: Ruler
    routed: Routed
    data: TokenData
    criterion: str
    seed: int
    work: Path
    steps: int | None  # of masks
    calibrated: dict[tuple[str, ...], tuple[Path, float]] = field(default_factory=dict)
    made: dict[tuple[float, str], tuple[Row, Plan, float, Line]] = field(default_factory=dict)

    def sums(self, tiers: tuple[str, ...]) -> tuple[Statistics, float]:
        """The statistics of these tiers, and the CPU seconds that they took."""
        if tiers not in self.calibrated:
            out = self.work / f"statistics-{'-'.join(tiers)}.safetensors"
            _, seconds = timed(
                lambda: calibrate(self.ruler.checkpoint, self.data, self.ruler.compute, tiers=tiers, out=out)
            )
            self.calibrated[tiers] = out, seconds
        path, seconds = self.calibrated[tiers]
        return Statistics.load(path), seconds

    def plans(self, share: float, ways: Mapping[str, Way]) -> Iterator[Line]:
        """Rows of one share that plans say all of, judged in one pass; those that are refused are said."""
        plans, told = dict[str, Plan](), dict[str, Line]()
        for name, way in ways.items():
            row: Line = {"row": name, "kind": way.kind, "keep": share}
            try:
                sums, seconds = self.sums(way.tiers)
                plans[name], more = timed(partial(way.plan, sums, share, self.seed))
            except InputError as error:
                yield {**row, "refused": str(error)}
                continue
            passes = max([1, *(PASSES.get(tier, 1) for tier in way.tiers)])
            bits = self.routed.bits(plans[name])
            told[name] = {**row, "bits": bits, "passes": passes, "cpu_seconds": round(seconds + more, 1)}
        of = next((way.tiers for name, way in ways.items() if name in plans and way.kind == "constants"), None)
        statistics = None if of is None else self.calibrated[of][0]
        rows = self._judged(plans, statistics)
        for name, line in told.items():
            row = rows[name]
            yield {**line, "refused": row} if isinstance(row, str) else {**line, **measured(row)}

    def _judged(self, plans: Mapping[str, Plan], statistics: Path | None) -> dict[str, Row | str]:
        """Losses of each plan; why not, where the model refuses it."""
        try:
            return dict(self.ruler.plans(plans, statistics)) if plans else {}
        except InputError as error:
            if len(plans) == 1:
                return dict.fromkeys(plans, str(error))
        return {name: row for own in plans for name, row in self._judged({own: plans[own]}, statistics).items()}

    def plan(self, keep: float | int) -> Plan:
        return make_plan(self.sums(CRITERIA[self.criterion].tiers)[0], self.criterion, keep, seed=self.seed)

    @property
    def calibration(self) -> float:
        """CPU seconds of what the criterion is measured by."""
        return self.sums(CRITERIA[self.criterion].tiers)[1]

    def fit(self, share: float, name: str, kind: str) -> Line:
        """A row that computes weights, or masks."""
        told: Line = {"row": name, "kind": kind, "keep": share}
        try:
            make = self._masks if kind == "masks" else self._trained if kind == TRAINED else self._refitted
            row, plan, seconds, more = make(share, name)
        except InputError as error:
            return {**told, "refused": str(error)}
        return {**told, "bits": self.routed.bits(plan), "cpu_seconds": round(seconds, 1), **more, **measured(row)}

    def _refitted(self, share: float, name: str) -> tuple[Row, Plan, float, Line]:
        """Made once: training goes on from it."""
        if (share, name) not in self.made:
            self.made[share, name] = self._refit(share, name)
        return self.made[share, name]

    def _refit(self, share: float, name: str) -> tuple[Row, Plan, float, Line]:
        ruler = self.ruler
        sums, seconds = self.sums(CRITERIA[self.criterion].tiers)
        plan, width, more = self.plan(share), None, dict[str, Any](passes=2)
        if name.startswith(SHAPED):
            draw = Draw(ruler.checkpoint, self.data, ruler.judged, self.criterion, sums, seconds, ruler.compute)
            if (share, SHAPED) not in self.made:
                shape, _, trying = draw.shape(share)
                self.made[share, SHAPED] = ({}, self.plan(shape.experts), trying, {"shape": shape})
            _, plan, trying, found = self.made[share, SHAPED]
            whole = found["shape"].width == self.routed.layout.width
            width, seconds = None if whole else found["shape"].width, seconds + trying
            more = {"passes": 3, "shape": str(found["shape"])}
        ridge, refine = FITS[name.removeprefix(SHAPED)]
        variant = Variant(name, plan, width, ridge, refine, self._folder(share, name) / "layers")
        made, fitting = timed(lambda: refit(ruler.checkpoint, self.data, [variant], ruler.compute, judged=ruler.judged))
        return ruler.checked(made.losses)[name], made.plans[name], seconds + fitting, more

    def _masks(self, share: float, name: str) -> tuple[Row, Plan, float, Line]:
        search = Search(seed=self.seed) if self.steps is None else Search(steps=self.steps, seed=self.seed)
        ruler, plan = self.ruler, self.plan(share)
        found, seconds = timed(
            lambda: optimise(
                ruler.checkpoint, plan, self.data, self._folder(share, name), search, ruler.compute
            )
        )  # fmt: skip
        passes = 4 + 2 * found.steps + sum("held" in each for each in found.curve)
        more = {"passes": passes, "changed": found.changed}
        return ruler.plans({name: found.plan})[name], found.plan, self.calibration + seconds, more

    def _trained(self, share: float, name: str) -> tuple[Row, Plan, float, Line]:
        """All weights that are left, towards the original's predictions, judged as the folder that is written."""
        ruler, start, place = self.ruler, name.removesuffix(f", {TRAINED}"), self._folder(share, name)
        plan, seconds, more = self.plan(share), self.calibration, dict[str, Any](passes=1)
        if start == "dropped":
            prune(ruler.checkpoint, plan, place / "start")
        else:
            _, plan, seconds, more = self._refitted(share, start)
            prune(ruler.checkpoint, plan, place / "start", refitted=self._folder(share, start) / "layers")
        made, training = timed(
            lambda: recover(
                place / "start", ruler.checkpoint, self.data, place / "work", Training(seed=self.seed), ruler.compute,
                judged=ruler.judged,
            )
        )  # fmt: skip
        write_replaced(place / "start", place / "trained", made.folder, dict(made.record))
        looks = 2 + sum("held" in each for each in made.curve)
        more = {**more, "passes": more["passes"] + 1 + 2 * made.steps + looks}
        return ruler.folder(place / "trained"), plan, seconds + training, more

    def _folder(self, share: float, name: str) -> Path:
        place = self.work / f"{share:g} {name}"
        place.mkdir(exist_ok=True)
        return place


def measured(row: Row) -> Line:
    """Losses, and KL by sequence, of which differences are taken."""
    sums = {d: [round(float(x), 3) for x in found.sums[:, 1]] for d, found in row.items() if found.sums is not None}
    return {**loss({"": row}, ""), "kl_sums": sums}


def measure(options: argparse.Namespace) -> list[Line]:
    """A line for the original, for each twin, and for each share, row and seed that the record lacks."""
    checkpoint, compute = open_checkpoint(options.model), Compute(dtype=options.dtype, device=options.device)
    judged = text_of(options, options.held_out, options.held_out_tokens).read(checkpoint).by_chunk()
    setting: Line = {
        "model": checkpoint.folder.name, "fingerprint": checkpoint.fingerprint, "criterion": options.criterion,
        "tokens_asked": options.tokens, "judged_tokens": sum(judged.tokens.values()),
        "sequence_length": options.sequence_length, "dtype": options.dtype, "device_kind": options.device,
    }  # fmt: skip
    base = {**machine(), "versions": versions(), "threads": torch.get_num_threads(), **setting}
    lines = read(options.out) if options.out and options.out.exists() else []
    _check_record(options.out, lines, setting)

    def add(*found: Line) -> None:
        whole = [{**base, **line} for line in found]
        append(options.out, whole)
        lines.extend(whole)
        for line in found:
            said = line.get("refused") or f"KL {line['mean_kl']:.4f}, {line.get('cpu_seconds', 0)} s"
            print(f"{line['keep']:.0%} {line['row']}: {said}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=options.work) as work:
        ruler, routed = Ruler(checkpoint, judged, Path(work) / "predictions", compute), Routed.of(checkpoint)
        there = {(line["keep"], line["row"], line["seed"]) for line in lines}
        if not lines:
            tokens = {d: x.sums[:, 3].long().tolist() for d, x in ruler.original.items() if x.sums is not None}
            bits = 8 * sum(routed.layers.values()) / routed.numbers
            row = {"row": ORIGINAL, "kind": ORIGINAL, "keep": 1.0, "seed": 0, "bits": bits, "sequences": tokens}
            add({**row, **measured(ruler.original)})
        _check_original(lines[0], ruler.original)
        for bits in options.bits:
            name, place = f"rounded to {bits} bits", Path(work) / f"{bits}"
            if _wanted(options, name, "twin") and (1.0, name, 0) not in there:
                taken, seconds = timed(
                    lambda: twin(checkpoint, place / "out", place / "layers", bits, options.group)  # noqa: B023
                )
                row = {"row": name, "kind": "twin", "keep": 1.0, "seed": 0, "bits": taken, "group": options.group}
                add({**row, "passes": 1, "cpu_seconds": round(seconds, 1), **measured(ruler.folder(place / "out"))})
        for seed in range(options.seeds):
            _draw(options, ruler, routed, seed, Path(work) / f"seed {seed}", there, add)
    return lines


def _draw(
    options: argparse.Namespace,
    ruler: Ruler,
    routed: Routed,
    seed: int,
    work: Path,
    there: set[tuple[float, str, int]],
    add: Callable[..., None],
) -> None:
    """What the record lacks of one draw of the text."""
    ways, fits = planned(options.criterion), fitted()
    left = {
        share: (
            {n: w for n, w in ways.items() if _wanted(options, n, w.kind) and (share, n, seed) not in there},
            {n: kind for n, kind in fits.items() if _wanted(options, n, kind) and (share, n, seed) not in there},
        )
        for share in options.keeps
    }
    if not any(map(any, left.values())):
        return
    data, both = draw_of(options, ruler.checkpoint, ruler.judged, seed)
    work.mkdir()
    bench = Bench(ruler, routed, data, options.criterion, seed, work, options.steps)
    own = {"seed": seed, "tokens": sum(data.tokens.values()), "left_out": both}
    for share, (some, rest) in left.items():
        add(*({**own, **line} for line in bench.plans(share, some)))
        for name, kind in rest.items():
            add({**own, **bench.fit(share, name, kind)})


def _wanted(options: argparse.Namespace, name: str, kind: str) -> bool:
    return not options.only or name in options.only or kind in options.only


def _check_record(path: Path | None, lines: Sequence[Line], setting: Line) -> None:
    for name, value in setting.items():
        if lines and lines[0][name] != value:
            what = f"measured with {name} {lines[0][name]}, and this is {value}"
            raise InputError(f"{path}: {what}; name another --out")


def _check_original(line: Line, original: Row) -> None:
    """Raise InputError where a record's original has other losses than now."""
    for domain, found in original.items():
        if abs(line["loss"][domain] - found.nll) > 1e-4:
            raise InputError(f"--out: the original's loss of {domain} was {line['loss'][domain]} and is {found.nll}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint folder whose experts are not quantised")
    parser.add_argument("--demo", action="store_true", help="the model that ships, and its text")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH", help="what choosing and fitting see")
    parser.add_argument("--held-out", nargs="+", default=[], metavar="NAME=PATH", help="what all are judged on")
    parser.add_argument("--keeps", type=_numbers(float), default=[0.75, 0.5, 0.25], help="shares of the routed bytes")
    parser.add_argument("--bits", type=_numbers(int), default=[8, 4, 3, 2], help="of the twins")
    parser.add_argument("--group", type=int, default=32, help="numbers that share a scale in a twin")
    parser.add_argument("--seeds", type=int, default=3, help="how many draws of the calibration text")
    parser.add_argument("--criterion", default=DEFAULT, help="chooses where a row needs a choice")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help=f"rows, or kinds: {', '.join(KINDS)}")
    parser.add_argument("--steps", type=int, help="of optimised masks; default: as many as `optimise` takes")
    parser.add_argument("--tokens", type=int, default=60_000, help="calibration tokens that a seed draws")
    parser.add_argument("--held-out-tokens", type=int, default=24_576)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="a folder for what is made on the way; default: the system's")
    with_record(parser)
    return parser


def _numbers(kind: type[Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    if options.demo:
        options.model = options.model or MODEL
        options.data = options.data or list(text_sources("calibration"))
        options.held_out = options.held_out or list(text_sources("evaluation"))
    if options.model is None or not options.data or not options.held_out:
        raise InputError("name MODEL, --data and --held-out, or take --demo; --show prints a record")
    if options.criterion not in CRITERIA:
        raise InputError(f"--criterion {options.criterion}: expected one of {', '.join(CRITERIA)}")
    rows = {*planned(options.criterion), *fitted(), *(f"rounded to {bits} bits" for bits in options.bits), *KINDS}
    for name in options.only:
        if name not in rows:
            raise InputError(f"--only {name}: expected kinds or rows, of {', '.join(sorted(rows))}")
    return options


def main() -> None:
    finish("comparison", _parser(), lambda options: measure(_checked(options)), markdown)


if __name__ == "__main__":
    main()

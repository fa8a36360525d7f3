"""Instruction following of a whole model and of pruned ones, with the same help: MC-Suite's third study (2504.05586).

python -m bench.instruction [--shares 0.5 0.25] [--seeds 0 1 2] [--out FILE.jsonl]
python -m bench.instruction --model MODEL --plan half.json --tasks arc_easy --shots 0,5 --paper arc_easy --train all
python -m bench.instruction --show FILE.jsonl          measures nothing: the table of a record, in Markdown

Every model answers the tasks without examples, with --shots of them, and, after it was trained on the tasks' own
training sets, without any. The whole model gets the same help. Without --model it is the small trained one that ships
with moekern, and without --tasks two tasks are made of its text: `language` (which of six domains is a passage of?),
and `continuation` (which of four pieces of the domain goes on?), with training sets of the calibration text and
questions of the evaluation text. Without --plan experts are dropped by --criterion to --shares, once; a seed draws
examples, and the order and the starting values of training. Training is `recover --kl 0 --next 1`, with loss on answers
alone, for so many --steps of --batch examples. --paper takes what the paper says of a task: steps, a peak of 1e-4 and
512 tokens; it says no batch but MMLU's (4), no schedule, and not what trains. --sft FILE.jsonl learns from rows
{"prompt", "completion"} instead. Rows that are in --out already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch

from bench.criteria import spread
from bench.draws import begun, finish, with_record
from moekern.benchmark.records import append, machine
from moekern.calibration.calibrate import calibrate
from moekern.checkpoint.folder import Checkpoint, open_checkpoint
from moekern.data.batches import TokenData
from moekern.data.text import Text, config_number
from moekern.demo import MODEL, TEXT, text_sources
from moekern.evaluation.losses import ORIGINAL
from moekern.model.compute import Compute
from moekern.plan.document import Plan
from moekern.plan.make import make_plan
from moekern.pruning.prune import prune
from moekern.pruning.replaced import write_replaced
from moekern.recovery import Training, recover
from moekern.refit.variants import FITTED, Split
from moekern.tasks import Asked, Score, task_scores
from moekern.tasks.lessons import lesson_data, lessons, read_lessons
from moekern.tasks.scores import named
from moekern.tasks.settings import shots_of
from moekern.version import versions

Line = dict[str, Any]
TUNED = "tuned"
RATE, LONGEST, BATCH = 1e-4, 512, 4  # arXiv:2504.05586; the batch: of MMLU, elsewhere not said
PAPER = {"commonsense_qa": 2500, "winogrande": 2500, "mmlu": 1000, "arc_easy": 1500, "boolq": 2500}  # steps
RECONSTRUCTED = "the batch but for MMLU's, the schedule, what trains, the choice of the best state, and k are not known"
PIECE, PASSAGE, CONTEXT = 24, 96, 160  # characters: of a continuation, of a passage, of what a continuation follows


@dataclass(frozen=True)
class Bench:
    """What all models are asked, and how they are trained."""

    checkpoint: Checkpoint
    asked: Asked
    data: TokenData
    training: Training
    compute: Compute

    def helped(self, plans: Mapping[str, Plan], work: Path) -> Iterator[tuple[Score, str]]:
        """Scores of the original and of plans, by help: with examples, and after training."""
        for score in task_scores(self.checkpoint, plans, self.asked, self.compute):
            yield score, f"{score.shots}-shot"
        once = replace(self.asked, shots=(0,))
        for name, plan in {ORIGINAL: None, **plans}.items():
            place = Path(tempfile.mkdtemp(dir=work))
            folder = self.checkpoint.folder
            if plan is not None:
                folder = place / "pruned"
                prune(self.checkpoint, plan, folder)
            made = recover(folder, None, self.data, place / "training", self.training, self.compute)
            write_replaced(folder, place / TUNED, made.folder, made.record)
            _told(f"{name}: trained {made.steps} steps, best after {made.best}")
            for score in named(task_scores(place / TUNED, {}, once, self.compute), name):
                yield score, TUNED


def training_of(options: argparse.Namespace, data: TokenData, seed: int) -> Training:
    """So many steps of so many lessons."""
    steps = PAPER[options.paper] if options.paper else options.steps
    size = max(1, round(options.batch * sum(data.tokens.values()) / len(data.batches)))
    return Training(
        train=tuple(options.train.split(",")), kl=0.0, next=1.0, rate=options.rate, seed=seed,
        epochs=steps * size / Split.of(data).tokens(FITTED), step_tokens=size, patience=steps,
    )  # fmt: skip


def plans_of(options: argparse.Namespace, checkpoint: Checkpoint, compute: Compute) -> dict[str, Plan]:
    """Those that are named; else of the criterion, one for each share."""
    if options.plan:
        return {str(path): Plan.load(path) for path in options.plan}
    text = Text(tuple(options.data), options.tokens, options.sequence_length)
    sums = calibrate(checkpoint, text.read(checkpoint), compute)
    return {f"{share:.0%}": make_plan(sums, options.criterion, share) for share in options.shares}


def measure(options: argparse.Namespace) -> list[Line]:
    """A line for each seed, model, help, task and metric, written when a seed is done."""
    checkpoint, compute = open_checkpoint(options.model), Compute(dtype=options.dtype)
    lines, left = begun(options)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        tasks, folder = options.tasks, options.task_dir
        if tasks is None:
            folder = demo_tasks(Path(work) / "tasks", options.questions)
            tasks = "continuation,language"
        plans = plans_of(options, checkpoint, compute)
        for seed in left:
            start = time.process_time()
            asked = Asked(tuple(tasks.split(",")), folder, shots_of(options.shots), options.limit, None, seed)
            some = read_lessons(options.sft) if options.sft else lessons(asked)
            most = config_number(checkpoint, "max_position_embeddings") or options.max_length
            data = lesson_data(checkpoint, some, min(options.max_length, most))
            training = training_of(options, data, seed)
            base = {
                **machine(), "versions": versions() | {"lm_eval": version("lm_eval")},
                "threads": torch.get_num_threads(), "model": options.model.name,
                "criterion": None if options.plan else options.criterion, "seed": seed, "lessons": len(some),
                "training": asdict(training), "paper": options.paper, "reconstructed": RECONSTRUCTED,
            }  # fmt: skip
            bench = Bench(checkpoint, asked, data, training, compute)
            found = [_line(base, *each) for each in bench.helped(plans, Path(work))]
            _told(f"seed {seed}: {time.process_time() - start:.0f} CPU seconds")
            append(options.out, found)
            lines += found
    return lines


def _line(base: Line, score: Score, helped: str) -> Line:
    return {**base, **asdict(score), "kept": score.model, "help": helped, "model": base["model"]}


def _told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def demo_tasks(folder: Path, questions: int) -> Path:
    """Two tasks of the text that ships, so many questions of each a domain, and four times as many to learn from."""
    folder.mkdir()
    domains = sorted(path.name for path in TEXT.iterdir() if path.is_dir())
    for split, part, count in (("train", "calibration", 4 * questions), ("test", "evaluation", questions)):
        rng, rows = Random(part), {"language": list[Line](), "continuation": list[Line]()}
        for number, domain in enumerate(domains):
            text = (TEXT / domain / f"{part}.txt").read_text()
            for _ in range(count):
                start = rng.randrange(len(text) - PASSAGE)
                passage = " ".join(text[start : start + PASSAGE].split())
                rows["language"].append({"text": passage, "choices": domains, "gold": number})
                rows["continuation"].append(_continuation(text, rng))
        for name, some in rows.items():
            rng.shuffle(some)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in some)
            (folder / f"{name}-{split}.jsonl").write_text("".join(lines))
    asks = {"language": ("Text: {{text}}\nKind:", " "), "continuation": ("{{text}}", "")}
    for name, (text, between) in asks.items():
        files = {split: str(folder / f"{name}-{split}.jsonl") for split in ("train", "test")}
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files},
            "training_split": "train", "test_split": "test", "output_type": "multiple_choice",
            "doc_to_text": text, "doc_to_target": "gold", "doc_to_choice": "choices", "target_delimiter": between,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML
    return folder


def _continuation(text: str, rng: Random) -> Line:
    """What follows a piece of text, between pieces from elsewhere in it."""
    words = [match for match in range(CONTEXT, len(text) - PIECE) if text[match] == " "]
    start = rng.choice(words)
    pieces = [text[at : at + PIECE] for at in (start, *rng.sample(words, 3))]
    gold = rng.randrange(4)
    pieces[0], pieces[gold] = pieces[gold], pieces[0]
    return {"text": text[start - CONTEXT : start], "choices": pieces, "gold": gold}


def markdown(lines: Sequence[Line]) -> str:
    """A row a task, metric and model; a column a help: means over seeds ± their standard errors, or of one seed ± the
    harness's own over questions."""
    helps = list(dict.fromkeys(line["help"] for line in lines))
    table: dict[tuple[str, str, str], dict[str, list[Line]]] = {}
    for line in lines:
        key = line["task"], line["metric"], "whole" if line["kept"] == ORIGINAL else line["kept"]
        table.setdefault(key, {}).setdefault(line["help"], []).append(line)
    rows = [["task", "metric", "kept", *helps], ["---"] * 3 + ["---:"] * len(helps)]
    for key in sorted(table, key=lambda key: key[:2]):
        rows.append([*key, *(_cell(table[key].get(name, [])) for name in helps)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(some: Sequence[Line]) -> str:
    if len(some) == 1 and some[0]["stderr"] is not None:
        return f"{some[0]['value']:.3f} ± {some[0]['stderr']:.3f}"
    return spread([line["value"] for line in some]) if some else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--plan", nargs="+", type=Path, help="plans in the place of --shares")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--criterion", default="gated_norm")
    parser.add_argument("--data", nargs="+", default=list(text_sources("calibration")), metavar="NAME=PATH")
    parser.add_argument("--tokens", type=int, default=60_000, help="of --data, to calibrate on")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--tasks", help="of lm-evaluation-harness, separated by commas; default: two of the text")
    parser.add_argument("--task-dir", type=Path, help="a folder of task files: no network is asked")
    parser.add_argument("--shots", default="0,5")
    parser.add_argument("--limit", type=int, help="questions of a task")
    parser.add_argument("--questions", type=int, default=40, help="of the default tasks, a domain")
    parser.add_argument("--sft", type=Path, help="rows to learn from; default: the tasks' own training sets")
    parser.add_argument("--train", default="all", help="what trains, as of `recover`")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=BATCH, help="lessons of a step, about")
    parser.add_argument("--max-length", type=int, default=LONGEST, help="tokens of a lesson")
    parser.add_argument("--paper", choices=list(PAPER), help="the paper's steps for a task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--work", type=Path, help="a folder for what is made; default: the system's")
    with_record(parser)
    finish("instruction", parser, measure, markdown)


if __name__ == "__main__":
    main()

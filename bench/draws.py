"""What benches have in common that draw calibration text by seed and judge on held-out text: options, text, the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.criteria import drawn, read
from moekern.benchmark.records import machine
from moekern.checkpoint.folder import Checkpoint
from moekern.data.batches import TokenData
from moekern.data.text import Text
from moekern.demo import MODEL, text_sources
from moekern.errors import InputError
from moekern.version import versions

Lines = list[dict[str, Any]]


def parser_of(
    about: str | None, *, criterion: str, shares: Sequence[float], tokens: int = 60_000, held_out_tokens: int = 24_576
) -> argparse.ArgumentParser:
    """Options with these defaults; the model that ships and its text unless others are named."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", nargs="+", default=list(text_sources("calibration")), metavar="NAME=PATH")
    parser.add_argument("--held-out", nargs="+", default=list(text_sources("evaluation")), metavar="NAME=PATH")
    parser.add_argument("--criterion", default=criterion)
    parser.add_argument("--shares", nargs="+", type=float, default=list(shares))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="which draws")
    parser.add_argument("--tokens", type=int, default=tokens, help="calibration tokens that a seed draws")
    parser.add_argument("--held-out-tokens", type=int, default=held_out_tokens)
    parser.add_argument("--sequence-length", type=int, default=128)
    with_record(parser)
    return parser


def with_record(parser: argparse.ArgumentParser) -> None:
    """The options of a record."""
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--show", type=Path, help="a record to print as Markdown")


def text_of(options: argparse.Namespace, data: Sequence[str], tokens: int | None, seed: int = 0) -> Text:
    """A draw of text."""
    return Text(data=tuple(data), tokens=tokens, sequence_length=options.sequence_length, seed=seed)


def draw_of(options: argparse.Namespace, checkpoint: Checkpoint, judged: TokenData, seed: int) -> tuple[TokenData, int]:
    """What a seed draws of the calibration text; see `drawn`."""
    return drawn(text_of(options, options.data, options.tokens, seed), checkpoint, judged)


def begun(options: argparse.Namespace) -> tuple[Lines, list[int]]:
    """The lines that the record has already, and the seeds that it lacks."""
    lines = read(options.out) if options.out and options.out.exists() else []
    there = {line["seed"] for line in lines}
    return lines, [seed for seed in options.seeds if seed not in there]


def setting(options: argparse.Namespace, data: TokenData, judged: TokenData, seed: int) -> dict[str, Any]:
    """What a line tells of where and of what it was measured."""
    return {
        **machine(), "versions": versions(), "threads": torch.get_num_threads(), "model": options.model.name,
        "criterion": options.criterion, "tokens": sum(data.tokens.values()),
        "judged_tokens": sum(judged.tokens.values()), "sequence_length": options.sequence_length, "seed": seed,
    }  # fmt: skip


def finish(
    name: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Lines],
    markdown: Callable[[Lines], str],
) -> None:
    """Measure, or read a record, and print its table; what is wrong is one line."""
    options = parser.parse_args()
    try:
        lines = read(options.show) if options.show else measure(options)
    except (InputError, OSError) as error:
        sys.exit(f"bench.{name}: {error}")
    print(markdown(lines), end="")

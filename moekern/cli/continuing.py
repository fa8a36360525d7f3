"""`evaluate --continue`: what a model and its plans write behind prompts, in the place of losses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekern.cli import console
from moekern.cli.options import at_least
from moekern.errors import InputError
from moekern.rows import with_error

if TYPE_CHECKING:
    from moekern.data.text import Text
    from moekern.judging.decoding import Decoding
    from moekern.judging.figures import Measure, Shift, Written
    from moekern.judging.written import Steering
    from moekern.model.compute import Compute
    from moekern.plan.document import Plan

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, TOGETHER = 200, 32, 256, 16
DECODED = ("greedy", "sampled")
Continue = Annotated[
    list[str] | None,
    typer.Option(
        "--continue",
        help="Have prompts continued in the place of --data: a source as there. Of conversations the part before the "
        "last answer is the prompt, else the first tokens of rows, or pieces of a text. Repeatable.",
    ),
]
Prompts = Annotated[
    int | None,
    typer.Option(help=f"Prompts of each source of --continue. Default: {PROMPTS}.", callback=at_least(1)),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(help=f"Tokens of a prompt that is no conversation. Default: {PROMPT_TOKENS}.", callback=at_least(2)),
]
NewTokens = Annotated[
    int | None,
    typer.Option(help=f"Tokens that are written, at the most. Default: {NEW_TOKENS}.", callback=at_least(1)),
]
Decode = Annotated[
    list[str] | None,
    typer.Option(
        help="How tokens are taken: greedy, sampled, guarded (min_p=0.05,repetition=1.1), or temperature=, top_p=, "
        f"top_k=, min_p=, repetition= with commas. Repeatable. Default: {' and '.join(DECODED)}."
    ),
]
Steer = Annotated[
    list[str] | None,
    typer.Option(
        help="With --continue, beside plans: MAP=N:STRENGTH, a map of `contrast`, how many of its experts, and what is "
        "added to their router logits. Default: 10 that are never chosen. Repeatable."
    ),
]


@dataclass(frozen=True)
class Asked:
    """What the options ask for."""

    sources: tuple[str, ...]
    prompts: int
    prompt_tokens: int
    new_tokens: int
    decodings: tuple[Decoding, ...]
    steering: tuple[tuple[str, str, int, float], ...]  # name, map, experts, strength


def asked_of(
    *,
    sources: Sequence[str] | None,
    prompts: int | None,
    prompt_tokens: int | None,
    new_tokens: int | None,
    decode: Sequence[str] | None,
    steer: Sequence[str] | None,
    others: Mapping[str, object],
) -> Asked | None:
    """None where no prompts are to be continued. `others`: flags that do not go with it. Raises InputError for options
    that do not go together."""
    more = {
        "--prompts": prompts, "--prompt-tokens": prompt_tokens, "--new-tokens": new_tokens, "--decode": decode,
        "--steer": steer,
    }  # fmt: skip
    if not sources:
        for flag, value in more.items():
            if value:
                raise InputError(f"{flag} {value if isinstance(value, int) else value[0]}: goes with --continue")
        return None
    for flag, other in others.items():
        if other:
            raise InputError(f"--continue: goes without {flag}")

    from moekern.data.mixes import domains_of
    from moekern.judging.decoding import decoding_of

    with speaking_continue():
        domains_of(sources)
    decodings = tuple(decoding_of(text) for text in dict.fromkeys(decode or DECODED))
    return Asked(
        tuple(sources),
        prompts or PROMPTS,
        prompt_tokens or PROMPT_TOKENS,
        new_tokens or NEW_TOKENS,
        decodings,
        tuple(map(_steering_of, dict.fromkeys(steer or ()))),
    )


def _steering_of(text: str) -> tuple[str, str, int, float]:
    """ "map.json", "map.json=20" or "map.json=20:-2.5". Raises InputError."""
    found = re.fullmatch(r"(.+?)(?:=([0-9]{1,6})(?::(-?[0-9.]{1,12}|-inf))?)?", text)
    path, count, strength = found.groups() if found else (text, None, None)
    try:
        value = -inf if strength is None else float(strength)
    except ValueError:
        value = 0.0
    if count == "0" or not value:
        raise InputError(f"--steer {text}: expected MAP, MAP=COUNT or MAP=COUNT:STRENGTH, such as map.json=10:-2")
    if not Path(path).is_file():
        raise InputError(f"--steer {text}: no such file as {path}")
    return text, path, int(count or 10), value


@contextmanager
def speaking_continue() -> Iterator[None]:
    """Errors in prompts name their flag."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--data", "--continue"), error.kind) from error


def written_of(
    folder: Path,
    asked: Asked,
    text: Text,
    plans: Mapping[str, Plan],
    compute: Compute,
    statistics: Path | None = None,
    *,
    restart: bool = False,
) -> dict[str, Written]:
    """Decoding -> model -> continuations; `statistics` give the constants of replaced experts. How it goes is said."""
    from moekern.architectures import find_layout
    from moekern.architectures.substitution import as_whole
    from moekern.checkpoint.folder import open_checkpoint
    from moekern.cli import pipeline
    from moekern.judging.figures import TIMES, WINDOW
    from moekern.judging.written import check_variants, continuations
    from moekern.model.journal import Resume
    from moekern.plan.fits_model import check_plan

    source = open_checkpoint(folder)
    place = pipeline.place_of_state(source, compute)
    checkpoint, _ = as_whole(source)
    layout = find_layout(checkpoint)
    for name, plan in plans.items():
        console.hint(check_plan(plan, layout, checkpoint, name, replaced=True))
    steering = {name: _read(checkpoint, path, count, by) for name, path, count, by in asked.steering}
    variants: dict[str, Plan | Steering] = {**plans, **steering}
    check_variants(checkpoint, variants)
    compute = pipeline.told_compute(compute, checkpoint, layout)
    wanted = replace(
        text, data=asked.sources, prompts=asked.prompts, sequence_length=asked.prompt_tokens,
    )  # fmt: skip
    with speaking_continue():
        data = wanted.read(checkpoint, trust_remote_code=compute.trust_remote_code)
    if asked.new_tokens < WINDOW:
        console.say(
            f"--new-tokens {asked.new_tokens}: loops are seen in {WINDOW} tokens or more, {TIMES} cycles of them"
        )
    with console.progress("writing", "batches") as step:
        return continuations(
            source, data, variants, asked.decodings, compute,
            new_tokens=asked.new_tokens, seed=text.seed, statistics=statistics, tell=console.say, progress=step,
            resume=Resume(place, restart, console.say),
        )  # fmt: skip


def _read(checkpoint: Any, path: str, count: int, strength: float) -> Steering:
    from moekern.architectures import find_layout
    from moekern.architectures.twins import router_numbers
    from moekern.judging.written import Steering
    from moekern.plan.contrast import Contrast

    found, layout = Contrast.load(path), find_layout(checkpoint)
    found.check(layout, router_numbers(checkpoint, layout), path)
    return Steering(found.distinctive(count), strength)


def document_of(written: Mapping[str, Written], asked: Asked, seed: int) -> dict[str, Any]:
    """As JSON: figures by decoding and model, differences to the original, and every continuation's own."""
    from moekern.judging.figures import MEASURES, figure, shifts
    from moekern.version import versions

    settings = {key: value for key, value in asdict(asked).items() if key not in ("decodings", "steering")}
    steering = [[*each[:3], each[3] if isfinite(each[3]) else str(each[3])] for each in asked.steering]
    figures: dict[str, Any] = {}
    differences: list[dict[str, Any]] = []
    each: list[dict[str, Any]] = []
    for decoding, table in written.items():
        figures[decoding] = {
            name: {m.name: found._asdict() for m in MEASURES if (found := figure(m, rows)) is not None}
            for name, rows in table.items()
        }
        for name, apart in shifts(table).items():
            for measure, shift in apart.items():
                differences.append({
                    "decoding": decoding, "plan": name, "measure": measure, "mean": shift.mean,
                    "interval": shift.interval, "clear": shift.clear, "prompts": shift.prompts,
                })  # fmt: skip
        for name, rows in table.items():
            for number, row in enumerate(rows):
                own = {m.name: m.of(row) for m in MEASURES}
                each.append({"decoding": decoding, "plan": name, "prompt": number, **own})
    return {
        "asked": {**settings, "seed": seed, "decodings": [asdict(d) for d in asked.decodings], "steering": steering},
        "versions": versions(),
        "figures": figures,
        "differences": differences,
        "continuations": each,
    }


def show_written(written: Mapping[str, Written]) -> None:
    """A table for each decoding, then what the prompts do not tell apart."""
    from moekern.evaluation.losses import ORIGINAL
    from moekern.judging.figures import MEASURES, doubts, shifts

    for decoding, table in written.items():
        prompts = len(table[ORIGINAL])
        columns = [m for m in MEASURES if any(m.of(row) is not None for rows in table.values() for row in rows)]
        title = f"{decoding}: what {prompts} prompts are continued by (± standard error)"
        rows = [(name, *(_shown(m, some) for m in columns)) for name, some in table.items()]
        console.show(title, ("model", *(m.words for m in columns)), rows)
        apart = shifts(table)
        paired = [m for m in MEASURES if any(m.name in found for found in apart.values())]
        if apart:
            more = [(name, *(_apart(m, found.get(m.name)) for m in paired)) for name, found in apart.items()]
            title = f"{decoding}: more than the original (95 % interval, paired by prompt)"
            console.show(title, ("model", *(m.words for m in paired)), more)
        for line in doubts(table):
            console.say(f"{decoding}: {line}")


def _apart(measure: Measure, found: Shift | None) -> str:
    if found is None:
        return "-"
    form = _form(measure, sign="+")
    interval = f" ({found.low:{form}} to {found.high:{form}})" if isfinite(found.low) else ""
    return f"{found.mean:{form}}{interval}"


def _form(measure: Measure, sign: str = "") -> str:
    return sign + (".1%" if measure.binary else ".1f" if measure.name in ("length", "agreed") else ".3f")


def _shown(measure: Measure, rows: Sequence[Any]) -> str:
    from moekern.judging.figures import figure

    found = figure(measure, rows)
    if found is None:
        return "-"
    return with_error(found.value, found.error, _form(measure))

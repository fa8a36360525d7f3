"""README.md of a pruned checkpoint: what was done to which model, in sections that can be written anew."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from moekern.checkpoint.strict_json import short
from moekern.errors import InputError
from moekern.files import sized
from moekern.plan.document import Plan
from moekern.plan.groups import is_merged, merged_into
from moekern.publishing.evaluation import ORIGINAL, Figure, evaluation_table, figures_of, row_of
from moekern.publishing.front_matter import front_matter
from moekern.publishing.markdown import block, code, plain, table
from moekern.publishing.text import text_section
from moekern.version import __version__

RECIPE = "moekern_recipe.yaml"  # in a folder that `run` has written: the options that decide its bytes
SECTION = "<!-- moekern: {name} -->\n{text}<!-- /moekern: {name} -->\n"
FOLDER = "MODEL"  # in commands
BASE, EVALUATION, TEXT, TRAINING = "base", "evaluation", "text", "training"  # names of sections
NAME = re.compile(r"\w[\w .,-]{0,59}", re.ASCII)  # of a judging
JUDGED = rf"^<!-- moekern: ({EVALUATION}(?: {NAME.pattern})?) -->$"
CARD_CAP = 16 << 20  # bytes of a card that is read
CHANGES = 40  # lines of config.json that are shown
BEFORE_TRAINING = "Of the model before the training that is told below:\n\n"
NOT_MEASURED = "Not measured yet: `moekern card FOLDER --evaluation evaluation.json` writes it here.\n"


@dataclass(frozen=True)
class About:
    """What a command knows of a result beside model and plan.

    recipe: the text of RECIPE. evaluation: a document of `evaluate`, of which `row` is the model's (None: the only
    one). header: of the statistics that the plan was made from.
    """

    recipe: str | None = None
    evaluation: Mapping[str, Any] | None = None
    row: str | None = None
    header: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Facts:
    """What a card tells. Of pairs the first is the original's; parameters: all, and those that a token uses, where they
    are known."""

    name: str  # of the original: its id, or its kind
    base: str | None  # id on the hub
    commit: str | None
    fingerprint: str
    layers: Mapping[str, tuple[int, int]]  # key -> experts
    top_k: int
    width: tuple[int | None, int | None]
    parameters: tuple[tuple[int, int], tuple[int, int]] | None
    nbytes: tuple[int, int]
    settings: Sequence[tuple[str, Any, Any]]  # of config.json: path, before, after
    plan: Plan
    mtp: str
    serve: Mapping[str, str]  # engine -> command
    original_card: str | None  # the file that it is kept in
    inherited: Mapping[str, Any] = field(default_factory=dict)  # of its front matter
    flags: Sequence[str] = ()  # that made it, where the plan does not say so


def card(facts: Facts, about: About = About()) -> str:
    """The whole file. Raises InputError for an evaluation that is none."""
    text, datasets = text_section(facts.plan, about.header)
    measured = NOT_MEASURED if about.evaluation is None else evaluation_section(about.evaluation, about.row)
    parts = (
        front_matter(facts.inherited, facts.base, datasets),
        f"\n# {plain(facts.name)}, {_left(facts)} experts\n\n{_opening(facts)}\n",
        f"## What is left\n\n{_sizes(facts)}\n{_layers(facts)}\n",
        f"## How it was made\n\n{_method(facts)}\n",
        f"## Text that chose the experts\n\n{section(TEXT, text)}\n",
        f"## Evaluation\n\n{section(EVALUATION, measured)}\n",
        f"{section(TRAINING, '')}\n",
        f"## What changed in config.json\n\n{_settings(facts.settings)}\n",
        f"## Serving\n\n{_serving(facts.serve)}\n",
        f"## The same again\n\n{_again(facts, about.recipe is not None)}",
    )
    return "".join(parts)


def section(name: str, text: str) -> str:
    """A part of a card that `with_section` finds again."""
    return SECTION.format(name=name, text=text)


def with_section(card: str, name: str, text: str, source: str) -> str:
    """A card with another text in a section. Raises InputError, naming `source`, where it has none of this name."""
    found = _found(card, name, source)
    return card[: found.start()] + section(name, text) + card[found.end() :]


def evaluations(card: str, source: str) -> dict[str, str]:
    """The judgings that stand in a card: section -> its text. Raises InputError as with_section."""
    _found(card, EVALUATION, source)
    found = {match[1]: _found(card, match[1], source)[1] for match in re.finditer(JUDGED, card, re.MULTILINE)}
    return {name: text for name, text in found.items() if text not in ("", NOT_MEASURED)}


def with_evaluation(card: str, name: str | None, text: str, source: str) -> str:
    """A card with a judging: of no name in the place of the one without, else under its name beside others. Raises
    InputError as with_section."""
    if name is None:
        return with_section(card, EVALUATION, text, source)
    own, known = f"{EVALUATION} {name}", evaluations(card, source)
    text = f"### {name}\n\n{text}"
    if own in known:
        return with_section(card, own, text, source)
    if EVALUATION not in known:
        card = with_section(card, EVALUATION, "", source)
    at = max(_found(card, each, source).end() for each in (EVALUATION, *known))
    return f"{card[:at]}\n{section(own, text)}{card[at:]}"


def _found(card: str, name: str, source: str) -> re.Match[str]:
    match = re.search("^" + SECTION.format(name=name, text=r"((?:.*?\n)?)"), card, re.DOTALL | re.MULTILINE)
    if match is None:
        raise InputError(f"{source}: has no section {name!r} as moekern writes it; write what there is to say yourself")
    return match


def evaluation_section(document: Mapping[str, Any], row: str | None, source: str = "evaluation") -> str:
    """A table. Raises InputError, naming `source`, for a document that is none, and for a row that is not in it."""
    figures = figures_of(document, source)
    return measured_text(figures, row_of(figures, row, source))


def measured_text(figures: list[Figure], row: str) -> str:
    """A table of the original and of the model whose row it is."""
    errors = any(each.error is not None for each in figures if each.model in (ORIGINAL, row))
    said = "Errors are standard errors." if errors else "No standard error is known."
    return f"{evaluation_table(figures, row)}\n{said}\n"


def trained_card(card: str, tensors: int, told: Mapping[str, Any], source: str) -> str:
    """A card with what was trained; figures that it has say that they are older. Raises InputError as with_section."""
    for name, measured in evaluations(card, source).items():
        if not measured.startswith(BEFORE_TRAINING):
            card = with_section(card, name, BEFORE_TRAINING + measured, source)
    return with_section(card, TRAINING, training_section(tensors, told), source)


def training_section(tensors: int, told: Mapping[str, Any]) -> str:
    """What was trained after pruning; told: as its record has it, whatever it is."""
    rows = [(plain(key), code(value)) for key, value in told.items() if isinstance(value, (str, int, float))]
    text = f"## Training after pruning\n\n{tensors} tensors were trained since; `moekern_recovery.json` names them.\n\n"
    text += "What is said below about making the same again makes the model before that training.\n\n"
    return text + (table(("setting", "value"), rows[:CHANGES]) + "\n" if rows else "")


def base_section(base: str | None, commit: str | None = None) -> str:
    """A line: the original on the hub."""
    if base is None:
        return "The original has no id on the hub that is known.\n"
    of = f" at commit {code(commit)}" if commit else ""
    return f"The original is [{plain(base)}](https://huggingface.co/{base}){of}.\n"


def _opening(facts: Facts) -> str:
    what = f"{_left(facts)} experts in each of {len(facts.layers)} layers are left"
    done = "; the others are constants" if facts.plan.replace is not None else ""
    done = "; others are merged into them" if facts.plan.merges else done
    text = f"Pruned by moekern {plain(__version__)}: {what}{done}.\n\n"
    text += section(BASE, base_section(facts.base, facts.commit))
    if facts.original_card is not None:
        name = facts.original_card
        text += f"\nThe original's card is [{plain(name)}]({name}); its sizes and results are the original's.\n"
    return text


def _left(facts: Facts) -> str:
    before, after = ({pair[i] for pair in facts.layers.values()} for i in (0, 1))
    return f"{_span(after)} of {_span(before)}"


def _span(numbers: set[int]) -> str:
    return f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _sizes(facts: Facts) -> str:
    rows = []
    if facts.parameters is not None:
        (whole, active), (left, used) = facts.parameters
        rows += [("parameters", _many(whole), _many(left)), ("of these used by a token", _many(active), _many(used))]
    rows.append(("size of the weights", sized(facts.nbytes[0]), sized(facts.nbytes[1])))
    rows.append(("experts that a token chooses", str(facts.top_k), str(facts.top_k)))
    if facts.width[0] != facts.width[1]:
        rows.append(("channels of an expert", str(facts.width[0]), str(facts.width[1])))
    return table(("", "original", "this model"), rows)


def _many(n: int) -> str:
    for unit, of in (("B", 10**9), ("M", 10**6)):
        if n >= of:
            return f"{n / of:.2f} {unit}"
    return f"{n:,}"


def _layers(facts: Facts) -> str:
    """A row for layers that follow one another with the same numbers."""
    rows = []
    for (before, after), some in groupby(facts.layers.items(), key=lambda each: each[1]):
        keys = [key for key, _ in some]
        named = keys[0] if len(keys) == 1 else f"{keys[0]} to {keys[-1]} ({len(keys)} layers)"
        rows.append((plain(named), str(before), str(after)))
    return table(("layers", "experts", "left"), rows)


def _method(facts: Facts) -> str:
    rows = [*_of_plan(facts.plan, facts.fingerprint), ("MTP layers", plain(facts.mtp))]
    rows.append(("sha256 of the plan", code(facts.plan.digest)))
    rows.append(("fingerprint of the original", code(facts.fingerprint)))
    return table(("what", "value"), rows) + "\nThe plan is in `moekern_plan.json`.\n"


def _of_plan(plan: Plan, fingerprint: str) -> Iterator[tuple[str, str]]:
    """What a plan says of how its experts were chosen, and of what became of the others."""
    made = plan.provenance
    yield "criterion", code(made["criterion"]) if "criterion" in made else "none: the plan was written by hand"
    budget = made.get("budget")
    kind = budget.get("kind") if isinstance(budget, Mapping) else None
    if kind not in (None, "uniform"):
        yield "shared out over layers", code(kind)
    if made.get("guards"):
        yield "kept or dropped in any case", code(made["guards"])
    if plan.replace is not None:
        yield "dropped experts", f"constants: {code(plan.replace.constants)}"
    if plan.merges:
        told = made.get("merge")
        method = told.get("method") if isinstance(told, Mapping) else None
        merged = sum(map(merged_into, plan.layers.values()))
        yield "merged", f"{merged} experts into those that stay" + (f", by {code(method)}" if method else "")
    if plan.width is not None:
        yield "channels", f"{plan.width} of each expert stay"
    if "refit" in made and not is_merged(plan, fingerprint):
        told = made["refit"].get("layers") if isinstance(made["refit"], Mapping) else None
        layers = list(told.values()) if isinstance(told, Mapping) else []
        refined = any(isinstance(each, Mapping) and each.get("refine") for each in layers)
        what = "gate, up and down" if refined else "down"
        yield "fitted anew", f"{what} projections of the experts of {len(layers)} layers"
    for key, words in (("optimise", "optimised"), ("rounds", "rounds of re-estimation"), ("choice", "chosen by")):
        if key in made:
            yield words, code(short(made[key]))
    if "seed" in made:
        yield "seed", code(made["seed"])


def _settings(settings: Sequence[tuple[str, Any, Any]]) -> str:
    if not settings:
        return "Nothing.\n"
    rows = [(code(path), code(before, 60), code(after, 60)) for path, before, after in settings[:CHANGES]]
    more = len(settings) - CHANGES
    return table(("key", "original", "here"), rows) + (f"\nand {more} more.\n" if more > 0 else "")


def _serving(serve: Mapping[str, str]) -> str:
    if not serve:
        return "No engine is known whose rules it passes: `moekern check FOLDER` names what stands in the way.\n"
    said = f"Engines whose rules it passes (`moekern check`). `{FOLDER}` is this folder, or its id on the hub.\n"
    return said + "".join(f"\n{plain(engine)}:\n\n{block(command)}" for engine, command in serve.items())


def _again(facts: Facts, recipe: bool) -> str:
    if recipe:
        text = f"`{RECIPE}` has all that decides the bytes:\n\n"
        return text + block(f"moekern run --recipe {RECIPE} --out OUT")
    text = "`moekern_plan.json` has the plan under `plan`; as a file of its own it makes the same weights"
    plan, out = facts.plan, shlex.join([*facts.flags, "--out", "OUT"])
    if is_merged(plan, facts.fingerprint):
        return f"{text}:\n\n{block(f'moekern merge-experts ORIGINAL --plan plan.json {out}')}"
    if "refit" in plan.provenance:
        text += ", with the text and the options that it has under `provenance.refit`"
        return f"{text}:\n\n{block(f'moekern refit ORIGINAL plan.json --data TEXT {out}')}"
    if plan.replace is not None and plan.replace.constants != "zero":
        out = f"--statistics s.safetensors {out}"
        text += ", with the statistics that its constants are of"
    return f"{text}:\n\n{block(f'moekern prune ORIGINAL plan.json {out}')}"

"""The commands that artefacts imply: those that would make the same again, as far as the files tell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moekern.plan.document import Plan
from moekern.report.recipe import plan_rows, runs_of, text_of
from moekern.statistics.file import Statistics

# provenance of plans that `plan` has not made, and what has
OTHERWISE = {"merge": "merge-experts", "refit": "refit", "optimise": "optimise", "earlier_rounds": "iterate"}
STATISTICS = "s.safetensors"


def commands_of(
    statistics: Statistics, plans: Mapping[str, Plan], evaluation: Mapping[str, Any] | None = None
) -> list[str]:
    """A line each: `calibrate` for every run, `plan` for every plan that it makes, else a comment that says what made
    it, and `evaluate`. Names of folders and of most files are not known. `evaluation` is what `losses.told` gives."""
    runs = runs_of(statistics)
    names = [STATISTICS] if len(runs) == 1 else [f"s-{i}.safetensors" for i in range(1, len(runs) + 1)]
    lines = [_calibrate(run, statistics.tiers, name) for run, name in zip(runs, names, strict=True)]
    if len(runs) > 1:
        lines.append(shlex.join(["moekern", "merge", *names, "--out", STATISTICS]))
    lines += [_plan(row, plan, statistics) for row, plan in zip(plan_rows(plans), plans.values(), strict=True)]
    if evaluation is not None:
        text = [word for name in evaluation["domains"] for word in ("--data", f"{name}=TEXT")]
        more = ["--layers"] if evaluation["layers"] else []
        plan_files = [f"{name}.json" for name in plans]
        lines.append(shlex.join(["moekern", "evaluate", "MODEL", *plan_files, *text, *more, "--out", "losses.json"]))
    return lines


def _calibrate(run: Mapping[str, Any], tiers: Sequence[str], out: str) -> str:
    name, _, commit = run["model"].rpartition("@")
    words = ["moekern", "calibrate", *([name, "--revision", commit] if name else ["MODEL"])]
    for domain in run["domains"]:
        amount = "" if domain["tokens"] is None else f":{domain['tokens']}"
        words += ["--data", f"{domain['name']}={domain['source'] or 'TEXT'}{amount}"]
    for flag in ("sequence_length", "chunk", "seed"):
        words += [] if run[flag] is None else [f"--{flag.replace('_', '-')}", str(run[flag])]
    words += ["--no-pack"] if run["rows"] else []
    words += ["--thinking", run["thinking"]] if run["thinking"] in ("on", "off") else []
    words += ["--dtype", run["dtype"]] if run["dtype"] else []
    words += [word for tier in tiers for word in ("--tier", tier)]
    return shlex.join([*words, "--out", out])


def _plan(row: Mapping[str, Any], plan: Plan, statistics: Statistics) -> str:
    file, made = f"{row['name']}.json", plan.provenance
    other = next((command for key, command in OTHERWISE.items() if key in made), None)
    other = "merge-experts" if row["merged"] else "refit" if row["width"] is not None else other
    if other is not None or row["criterion"] == "not named":
        by = "by hand, or by what it does not name" if other is None else f"by {other}, and does not tell how"
        return f"# {shlex.quote(file)} was made {by}"
    words = ["moekern", "plan", STATISTICS, "--criterion", row["criterion"]]
    words += ["--keep", row["keep"] or str(row["kept"][0])]
    words += ["--seed", str(made["seed"])] if made.get("seed") else []
    words += _budget(made.get("budget"))
    words += ["--allow-nonuniform"] if len(row["kept"]) > 1 and row["replace"] is None else []
    words += [] if row["replace"] is None else ["--replace", str(row["replace"])]
    some = row["domains"] if row["domains"] != list(statistics.domains) else ()
    words += [word for name in some for word in ("--domain", name)]
    words += ["--protect-super"] if isinstance(made.get("protect_super"), dict) else []
    words += _guards(made.get("guards"))
    targets = made.get("targets")
    words += [word for each in targets for word in ("--target", text_of(each))] if isinstance(targets, list) else []
    words += ["--mtp", text_of(made["mtp"])] if made.get("mtp") else []
    return shlex.join([*words, "--out", file])


def _budget(budget: Any) -> list[str]:
    """Of what a plan says of its budget, what is not as by default."""
    flags = {"kind": ("--budget", "uniform"), "floor": ("--floor", None), "normalise": ("--normalise", "none"),
             "by": ("--adaptive-by", "usage"), "multiple_of": ("--multiple-of", 1)}  # fmt: skip
    found = budget if isinstance(budget, dict) else {}
    return [word for key, (flag, default) in flags.items() if found.get(key, default) != default
            for word in (flag, text_of(found[key]))]  # fmt: skip


def _guards(guards: Any) -> Iterator[str]:
    found = guards if isinstance(guards, dict) else {}
    for name in ("keep_always", "drop_first"):
        for key, experts in found[name].items() if isinstance(found.get(name), dict) else ():
            numbers = experts if isinstance(experts, list) else []
            yield from (f"--{name.replace('_', '-')}", f"{text_of(key)}:{','.join(map(text_of, numbers))}")
    for name in ("guard", "suppress"):
        for each in found[name] if isinstance(found.get(name), list) else ():
            if isinstance(each, dict) and isinstance(each.get("domains"), list):
                domains = ",".join(map(text_of, each["domains"]))
                yield from (f"--{name}", f"{domains}={text_of(each.get('count'))}")
    floors = found.get("domain_floor")
    for name, share in floors.items() if isinstance(floors, dict) else ():
        yield from ("--domain-floor", text_of(share) if name == "all" else f"{text_of(name)}={text_of(share)}")

"""What the artefacts tell of how they were made: the model, the text, the plans, and the commands that they imply."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from moekern.estimation.overview import Overview
from moekern.plan.document import Plan
from moekern.statistics.file import Statistics

WIDEST = 300  # characters of a text that a file holds
MADE_OTHERWISE = ("merge", "refit", "optimise", "earlier_rounds")  # provenance of plans that are not `plan`'s


def text_of(value: Any) -> str:
    """What a file says, short enough to be shown; nothing is trusted to be of its type."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def model_of(
    statistics: Statistics, overview: Overview | None, plans: Mapping[str, Plan], cache: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The model that was measured; with an overview, its bytes before and after each plan. cache: the "bytes" that keys
    and values of so many "tokens" take beside them, where that is known."""
    header = statistics.header
    experts = [statistics.num_experts(key) for key in statistics.layers]
    found = {
        "family": header["family"], "fingerprint": header["fingerprint"], "score": header["score"],
        "layers": len(experts), "experts": sorted(set(experts)), "top_k": header["top_k"],
        "n_group": header["n_group"], "topk_group": header["topk_group"], "tiers": list(statistics.tiers),
        "statistics": statistics.sha256,
    }  # fmt: skip
    if overview is None:
        return {**found, "name": None, "bytes": None, "routed_bytes": None, "after": {}, "cache": None}
    after = {name: _bytes_after(overview, plan, statistics) for name, plan in plans.items()}
    return {
        **found, "name": overview.model, "bytes": overview.total_bytes, "routed_bytes": overview.routed_bytes,
        "after": after, "cache": None if cache is None else dict(cache),
    }  # fmt: skip


def _bytes_after(overview: Overview, plan: Plan, statistics: Statistics) -> int:
    counts = [len(plan.layers[key].keep) for key in statistics.layers]
    return overview.bytes_at(sum(counts) / len(counts), plan.width)


def runs_of(statistics: Statistics) -> list[dict[str, Any]]:
    """What text was measured, and how: of every run its domains with their tokens, of which the header has the sum."""
    rows = []
    for run in statistics.header["runs"]:
        data = run.get("data")
        data = data if isinstance(data, dict) else {}
        sources = data.get("sources")
        named = sources.items() if isinstance(sources, dict) else ()
        rows.append({
            "domains": [{"name": text_of(name), "tokens": _count(each, "tokens"), "source": _entry(each, "path")}
                        for name, each in named],
            "sequence_length": _count(data, "sequence_length"),
            "seed": _count(data, "seed"),
            "dtype": text_of(run.get("dtype")),
            "model": text_of(run.get("model")),
            "versions": _versions(run.get("versions")),
        })  # fmt: skip
    if rows and any(row["domains"] for row in rows):
        return rows
    whole = [{"name": name, "tokens": n, "source": ""} for name, n in statistics.header["tokens"].items()]
    first = rows[0] if rows else {"sequence_length": None, "seed": None, "dtype": "", "model": "", "versions": ""}
    return [{**first, "domains": whole}]


def _count(value: Any, name: str) -> int | None:
    found = value.get(name) if isinstance(value, dict) else None
    return found if type(found) is int else None


def _entry(value: Any, name: str) -> str:
    return text_of(value.get(name)) if isinstance(value, dict) else ""


def _versions(value: Any) -> str:
    return ", ".join(f"{text_of(k)} {text_of(v)}" for k, v in value.items()) if isinstance(value, dict) else ""


def plan_rows(plans: Mapping[str, Plan]) -> list[dict[str, Any]]:
    """What the plans say of themselves."""
    rows = []
    for name, plan in plans.items():
        made = plan.provenance
        counts = sorted({len(layer.keep) for layer in plan.layers.values()})
        budget = made.get("budget")
        rows.append({
            "name": name,
            "criterion": text_of(made.get("criterion")) or "not named",
            "keep": text_of(made.get("keep")),
            "kept": counts,
            "budget": _entry(budget, "kind") or "uniform",
            "width": plan.width,
            "replace": None if plan.replace is None else plan.replace.constants,
            "merged": plan.merges,
            "refitted": "refit" in made,
            "domains": [text_of(each) for each in made["domains"]] if isinstance(made.get("domains"), list) else [],
            "digest": plan.digest,
        })  # fmt: skip
    return rows


def commands_of(statistics: Statistics, plans: Mapping[str, Plan], evaluated: bool) -> list[str]:
    """Command lines that would do it again, as far as the files tell: names of models and of files are not in them, and
    plans of other commands than `plan` have none."""
    words = ["moekern", "calibrate", "MODEL"]
    run = runs_of(statistics)[0]
    for domain in run["domains"]:
        amount = "" if domain["tokens"] is None else f":{domain['tokens']}"
        words += ["--data", f"{domain['name']}={domain['source'] or 'TEXT'}{amount}"]
    for flag in ("sequence_length", "seed"):
        words += [] if run[flag] is None else [f"--{flag.replace('_', '-')}", str(run[flag])]
    words += [word for tier in statistics.tiers for word in ("--tier", tier)]
    lines = [shlex.join([*words, "--out", "s.safetensors"])]
    rows = plan_rows(plans)
    for row, plan in zip(rows, plans.values(), strict=True):
        other = row["merged"] or row["width"] is not None or any(key in plan.provenance for key in MADE_OTHERWISE)
        if other or row["criterion"] == "not named":
            continue
        made = ["moekern", "plan", "s.safetensors", "--criterion", row["criterion"]]
        made += ["--keep", row["keep"] or str(row["kept"][0])]
        made += [] if row["budget"] == "uniform" else ["--budget", row["budget"]]
        made += ["--allow-nonuniform"] if len(row["kept"]) > 1 and row["replace"] is None else []
        made += [] if row["replace"] is None else ["--replace", str(row["replace"])]
        made += [] if row["domains"] in ([], list(statistics.domains)) else [
            word for each in row["domains"] for word in ("--domain", each)
        ]  # fmt: skip
        lines.append(shlex.join([*made, "--out", f"{row['name']}.json"]))
    if evaluated:
        files = [f"{row['name']}.json" for row in rows]
        lines.append(shlex.join(["moekern", "evaluate", "MODEL", *files, "--data", "TEXT", "--out", "losses.json"]))
    return lines

"""What the artefacts tell of how they were made: the model, the text, the plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekern.estimation.overview import Overview
from moekern.plan.document import Plan
from moekern.statistics.file import Statistics

WIDEST = 300  # characters of a text that a file holds


def text_of(value: Any) -> str:
    """What a file says, short enough to be shown; nothing is trusted to be of its type."""
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


@dataclass(frozen=True)
class Sizes:
    """Of a checkpoint, by its headers: bytes `after` each plan; the "bytes" that keys and values of so many "tokens"
    take beside them, where that is known (`cache`)."""

    overview: Overview
    after: Mapping[str, int]
    cache: Mapping[str, int] | None = None


def model_of(statistics: Statistics, sizes: Sizes | None) -> dict[str, Any]:
    """The model that was measured, and what its headers tell."""
    header = statistics.header
    experts = [statistics.num_experts(key) for key in statistics.layers]
    found = {
        "family": header["family"], "fingerprint": header["fingerprint"], "score": header["score"],
        "layers": len(experts), "experts": sorted(set(experts)), "top_k": header["top_k"],
        "n_group": header["n_group"], "topk_group": header["topk_group"], "tiers": list(statistics.tiers),
        "statistics": statistics.sha256,
    }  # fmt: skip
    if sizes is None:
        return {**found, "name": None, "bytes": None, "routed_bytes": None, "after": {}, "cache": None}
    seen = sizes.overview
    return {
        **found, "name": seen.model, "bytes": seen.total_bytes, "routed_bytes": seen.routed_bytes,
        "after": dict(sizes.after), "cache": None if sizes.cache is None else dict(sizes.cache),
    }  # fmt: skip


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
            "chunk": _count(data, "chunk"),
            "seed": _count(data, "seed"),
            "rows": data.get("pack") is False,
            "thinking": text_of(data.get("thinking")),
            "dtype": text_of(run.get("dtype")),
            "model": text_of(run.get("model")),
            "versions": _versions(run.get("versions")),
        })  # fmt: skip
    if rows and any(row["domains"] for row in rows):
        return rows
    whole = [{"name": name, "tokens": n, "source": ""} for name, n in statistics.header["tokens"].items()]
    first = rows[0] if rows else {
        **dict.fromkeys(("sequence_length", "chunk", "seed")), "rows": False,
        **dict.fromkeys(("thinking", "dtype", "model", "versions"), ""),
    }  # fmt: skip
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
